"""How figures are made and become files: one style, two shapes.

A figure of 7 × 4 inches shown on a phone has letters of 6 pixels. So a figure knows two shapes, one
for wide screens and one for narrow, with letters of the same size in both; what depends on the
shape (where labels fit, whether panels stand side by side) is arranged by functions that are called
before each drawing. SVG keeps text as text: small, sharp, and found by a search in the page.

matplotlib's object interface is used, without pyplot: no window system is looked for and no figure
is kept alive. Importing it takes about a second, so it is imported where something is drawn.
"""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lora_core.files import atomic_write
from lora_core.report.cells import visible
from lora_core.report.inline_svg import inline_svg
from lora_core.report.palette import INK, LIGHT

__all__ = ["new_figure", "no_matplotlib", "on_layout", "png", "save", "svg"]

MISSING = "matplotlib is not installed (pip install 'lora-core[plots]')"
SMALL = 9.5  # points: the least size of letters; on a phone a point is 1.2 pixels
WIDE, NARROW = (7.0, 4.0), (3.6, 3.7)  # inches
_DPI = 192  # of a PNG: twice the 96 of a screen
_LONGEST = 40  # characters of a name inside a figure

Size = tuple[float, float]
_shapes: "WeakKeyDictionary[Any, tuple[Size, Size]]" = WeakKeyDictionary()
_arrange: "WeakKeyDictionary[Any, list[Callable[[bool], None]]]" = WeakKeyDictionary()

_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["faint"],
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "lora-core",
}


def no_matplotlib() -> str | None:
    """Why nothing can be drawn.

    Returns:
        One line that says what to install, or None where matplotlib is there.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return MISSING
    return None


def styled() -> Any:
    """A context in which matplotlib draws in this package's style.

    Raises:
        ImportError: matplotlib is not installed, in one line.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(MISSING) from None
    return matplotlib.rc_context(_STYLE)


def new_figure(wide: Size = WIDE, narrow: Size = NARROW) -> Any:
    """An empty figure; call it, and all that draws, within `styled()`.

    Args:
        wide: inches, width and height, for a wide screen and for files.
        narrow: the same for a phone.

    Returns:
        A matplotlib Figure whose layout is computed when it is drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=wide, layout="constrained")
    _shapes[figure] = (wide, narrow)
    return figure


def on_layout(figure: Any, arrange: Callable[[bool], None], *, first: bool = False) -> None:
    """Have `arrange(narrow)` called before each drawing, when the figure has its size.

    Args:
        figure: a figure of `new_figure`.
        arrange: told whether the figure is in its narrow shape.
        first: before those already there, for what moves the panels.
    """
    known = _arrange.setdefault(figure, [])
    known.insert(0 if first else len(known), arrange)


def label(name: object) -> str:
    """A name as text of a figure: one line, not too long, no mathematics, never left out.

    matplotlib reads what is between two dollars as mathematics and hides names that begin with an
    underscore.
    """
    line = " ".join(visible(name).split())
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 1] + "…"
    return (" " + line if line.startswith("_") else line).replace("$", r"\$")


def _shaped(figure: Any, narrow: bool) -> None:
    """Give a figure its shape and arrange it."""
    if figure in _shapes:
        figure.set_size_inches(*_shapes[figure][narrow])
    for arrange in _arrange.get(figure, ()):
        arrange(narrow)


def _drawn(figure: Any, narrow: bool, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    with styled(), warnings.catch_warnings():
        # measured with a replacement; a browser has the letters
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        _shaped(figure, narrow)
        figure.savefig(stream, format=form, **options)
    return stream.getvalue()


def png(figure: Any) -> bytes:
    """A figure as PNG, on white, at twice the pixels of its size on a screen.

    Args:
        figure: a matplotlib Figure.

    Returns:
        The file's bytes.
    """
    return _drawn(figure, False, "png", dpi=_DPI, facecolor="white")


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure to a file, whole or not at all.

    Args:
        figure: a matplotlib Figure.
        path: the suffix names the format: .png, .svg, .pdf …

    Returns:
        `path`.

    Raises:
        ValueError: a suffix that names no format.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    check_format(figure, path)
    form = path.suffix[1:].lower()
    return atomic_write(path, _drawn(figure, False, form, dpi=_DPI, facecolor="white"))


def check_format(figure: Any, path: Path, what: str = "") -> None:
    """Refuse a suffix that matplotlib writes nothing for.

    Raises:
        ValueError: with the formats there are.
    """
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{what}{path} names no format; known: {', '.join(sorted(formats))}")


def svg(figure: Any, alt: str, *, narrow: bool) -> str:
    """A figure as an SVG element for a page.

    Args:
        figure: a matplotlib Figure.
        alt: what it shows, in words.
        narrow: in the shape for a phone.

    Returns:
        `<svg …>…</svg>`: no outside references, colours of `palette.LIGHT` as CSS variables, text
        in the page's font.
    """
    text = _drawn(figure, narrow, "svg", metadata={"Date": None}, transparent=True).decode()
    return inline_svg(text, alt, "narrow" if narrow else "wide")


def legend_above(figure: Any, axes: Any) -> None:
    """A legend above the panel, in as many columns as the figure's shape has room for."""

    def arrange(narrow: bool) -> None:
        handles, names = axes.get_legend_handles_labels()
        longest = max(map(len, names), default=0) + 6  # the handle, in letters
        columns = max(1, min(len(names), (48 if narrow else 90) // longest))
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3}
        axes.legend(handles, names, ncols=columns, handlelength=1.6, **place)

    on_layout(figure, arrange)
