"""A report: one HTML file that needs nothing else.

It is to be sent by mail, opened on a phone and kept for years, so it loads nothing: the style sheet
and the figures are inside, there is no script, and a content policy in its head forbids both. What
goes into it is hostile by assumption, model output above all: every text passes `visible`
(cells.py) and `html.escape`, and there is no method that takes HTML.

Pieces are added in reading order and held as strings; `write` puts the file in place in one step,
so that who has the old page open never loads half of a new one.

Why no template engine: a dozen pieces, each a line of HTML, need no language of their own, and the
one place where text becomes HTML is easy to check.
"""

import base64
import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lora_core.files import atomic_write
from lora_core.report.cells import (
    EstimateLike,
    count_text,
    is_number,
    number,
    value_and_interval,
    visible,
)
from lora_core.report.stylesheet import style_sheet

__all__ = ["Page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
_CONTENTS = 3  # from so many headings on there is a list of them
_PNG = b"\x89PNG\r\n\x1a\n"


class Page:
    """A report in the making.

    Args:
        title: heading of the page and name of its tab.
        subtitle: a line below it.
        lang: language of the text, for screen readers and hyphenation.
    """

    def __init__(self, title: str, subtitle: str = "", *, lang: str = "en") -> None:
        self.title, self.subtitle, self.lang = title, subtitle, lang
        self._parts: list[str] = []
        self._headings: list[str] = []

    def heading(self, text: object, level: int = 2) -> None:
        """Begin a section.

        Args:
            text: its name.
            level: 2, or 3 for a part of a section.

        Raises:
            ValueError: another level.
        """
        if level not in (2, 3):
            raise ValueError(f"level must be 2, or 3 for a part of a section; got {level}")
        if level == 3:
            self._parts.append(f"<h3>{_safe(text)}</h3>")
            return
        self._headings.append(_safe(text))
        self._parts.append(f'<h2 id="s{len(self._headings)}">{_safe(text)}</h2>')

    def text(self, text: object) -> None:
        """Add prose; blank lines part its paragraphs."""
        for paragraph in visible(text).split("\n\n"):
            if paragraph.strip():
                self._parts.append(f'<p dir="auto">{escape(paragraph.strip())}</p>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add names and values, one pair a line.

        Args:
            facts: values are text, numbers, estimates; lists are joined; None is a dash.
        """
        pairs = (f"<dt>{_safe(k)}</dt><dd>{_cell(v)}</dd>" for k, v in facts.items())
        self._parts.append(f"<dl>{''.join(pairs)}</dl>")

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        caption: str | None = None,
        *,
        numeric: Collection[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Add a table; the first column names the rows and stays in sight when it scrolls.

        Args:
            columns: their headings.
            rows: cells in the order of the columns: text, numbers, None, estimates (anything with
                value, low, high, count and unit), shown as value [low, high] and count; a count
                that a whole column shares stands in its heading.
            caption: what the table shows.
            numeric: names of the columns to align as figures; None: those that hold only numbers,
                estimates and None.
            notes: lines below it.

        Raises:
            ValueError: a row of another length, or a numeric column that does not exist.
        """
        for place, row in enumerate(rows, 1):
            if len(row) != len(columns):
                raise ValueError(
                    f"row {place} has {len(row)} cells; the table has {len(columns)} columns"
                )
        aligned = _aligned(columns, rows, numeric)
        counts = [_common_count([row[i] for row in rows]) for i in range(len(columns))]
        head = "".join(
            f'<th scope="col"{_class(i in aligned)}><div>{_safe(name)}{counts[i]}</div></th>'
            for i, name in enumerate(columns)
        )
        body = "".join(f"<tr>{_row(row, aligned, counts)}</tr>" for row in rows)
        named = "" if caption is None else f"<caption><div>{_safe(caption)}</div></caption>"
        label = escape(visible(caption or "table"), quote=True)
        self._parts.append(
            f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{named}'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        self._notes(notes)

    def figure(self, figure: Any, *, alt: str, caption: str | None = None) -> None:
        """Add a picture, inside the file.

        Args:
            figure: a matplotlib figure, drawn as SVG in two shapes, for narrow and wide screens,
                in colours that follow the reader's scheme; or the bytes of a PNG, on white.
            alt: what it shows, in words, for who does not see it.
            caption: a line below it.

        Raises:
            TypeError: something else.
            ValueError: bytes that are no PNG, or no `alt`.
        """
        if not alt.strip():
            raise ValueError("a figure needs alt=: what it shows, in words")
        if isinstance(figure, bytes):
            if not figure.startswith(_PNG):
                raise ValueError(f"the bytes of a figure must be a PNG; they begin {figure[:8]!r}")
            data = base64.b64encode(figure).decode()
            inner = f'<img alt="{_safe(alt)}" src="data:image/png;base64,{data}">'
        else:
            inner = _drawn(figure, alt)
        below = "" if caption is None else f"<figcaption>{_safe(caption)}</figcaption>"
        self._parts.append(f"<figure>{inner}{below}</figure>")

    def quote(self, text: object, who: str = "") -> None:
        """Add what somebody wrote, as it stands, its spaces and lines kept.

        Args:
            text: a prompt, an answer.
            who: whose words.
        """
        named = f'<span class="who">{_safe(who)}</span>' if who else ""
        said = _safe(text) or '<span class="who">(empty)</span>'
        self._parts.append(f'<blockquote dir="auto" tabindex="0">{named}{said}</blockquote>')

    def code(self, text: object) -> None:
        """Add a command or a program, its spaces and lines kept."""
        self._parts.append(f'<pre tabindex="0"><code>{_safe(text)}</code></pre>')

    @contextlib.contextmanager
    def details(self, summary: object, *, opened: bool = False) -> Iterator["Page"]:
        """Fold what is added within the block; `with page.details("all answers"): …`.

        Args:
            summary: the line that unfolds it.
            opened: whether it is unfolded from the start.

        Yields:
            The page.
        """
        start = len(self._parts)
        yield self
        inner = "".join(self._parts[start:])
        how = " open" if opened else ""
        self._parts[start:] = [
            f"<details{how}><summary>{_safe(summary)}</summary>{inner}</details>"
        ]

    def html(self) -> str:
        """The file's text.

        Returns:
            A whole document.
        """
        subtitle = f'<p class="subtitle">{_safe(self.subtitle)}</p>' if self.subtitle else ""
        return (
            f'<!doctype html>\n<html lang="{escape(self.lang, quote=True)}">\n<head>\n'
            '<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{_safe(self.title)}</title>\n<style>{style_sheet()}</style>\n</head>\n"
            f"<body>\n<main>\n<header><h1>{_safe(self.title)}</h1>{subtitle}{self._contents()}"
            "</header>\n" + "\n".join(self._parts) + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all.

        Args:
            path: where; its folder must exist.

        Returns:
            `path`.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        return atomic_write(path, self.html())

    def _contents(self) -> str:
        if len(self._headings) < _CONTENTS:
            return ""
        links = (f'<li><a href="#s{i}">{h}</a></li>' for i, h in enumerate(self._headings, 1))
        return f'<nav aria-label="contents"><ul>{"".join(links)}</ul></nav>'

    def _notes(self, notes: Sequence[str]) -> None:
        self._parts += [f'<p class="note" dir="auto">{_safe(note)}</p>' for note in notes]


def _safe(text: object) -> str:
    """Text as HTML: visible and escaped, for content and for attributes in double quotes."""
    return escape(visible(text), quote=True)


def _class(figure: bool) -> str:
    return ' class="num"' if figure else ""


def _aligned(
    columns: Sequence[str], rows: Sequence[Sequence[object]], numeric: Collection[str] | None
) -> set[int]:
    """Places of the columns that hold figures."""
    if numeric is None:
        return {
            i for i in range(1, len(columns)) if rows and all(is_number(row[i]) for row in rows)
        }
    unknown = [name for name in numeric if name not in columns]
    if unknown:
        raise ValueError(f"no column {unknown[0]!r} in the table: {', '.join(columns)}")
    return {i for i, name in enumerate(columns) if name in numeric}


def _common_count(cells: Sequence[object]) -> str:
    """The count that all estimates of a column share, for its heading; "" where they differ."""
    counts = {count_text(cell) for cell in cells if isinstance(cell, EstimateLike)}
    several = sum(isinstance(cell, EstimateLike) for cell in cells) > 1
    return _small("count", counts.pop()) if several and len(counts) == 1 else ""


def _row(row: Sequence[object], aligned: Collection[int], counts: Sequence[str]) -> str:
    cells = []
    for i, cell in enumerate(row):
        tag, scope = ("td", "") if i else ("th", ' scope="row"')
        inner = _cell(cell, count=not counts[i])
        cells.append(f'<{tag}{scope}{_class(i in aligned)}><div dir="auto">{inner}</div></{tag}>')
    return "".join(cells)


def _cell(value: object, *, count: bool = True) -> str:
    """A value as HTML, an estimate with its count or without."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return number(value)
    if isinstance(value, EstimateLike):
        shown, interval = value_and_interval(value)
        between = f" {_small('range', interval)}" if interval else ""
        return shown + between + (f" {_small('count', count_text(value))}" if count else "")
    if isinstance(value, list | tuple):
        return _safe(", ".join(map(str, value))) or "–"
    return _safe(value)


def _small(kind: str, text: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'


def _drawn(figure: Any, alt: str) -> str:
    """A matplotlib figure as SVG in two shapes; the style sheet shows the one that fits."""
    from lora_core.report.drawing import svg

    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"a figure must be matplotlib's or the bytes of a PNG; got {type(figure).__name__}"
        )
    return svg(figure, alt, narrow=True) + svg(figure, alt, narrow=False)
