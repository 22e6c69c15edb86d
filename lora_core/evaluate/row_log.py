r"""A JSON Lines file that grows row by row: what a long run has found is on disk when it stops.

Each row is one `write` of one line, flushed at once. A process that is killed inside of it leaves a
line without an end, which the next `RowLog` on the file takes away (a whole row that only lacks its
line feed, as editors leave it, is kept). Nothing else is ever changed: what stands was found.

A log may begin with a header, a first line that says what the rows were measured on. Rows of two
settings in one file would be a result of neither, so another header is refused, and the message
names what differs. A file that is no log is never written to.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.data.lines import read_rows

Row = dict[str, Any]


class RowLog:
    """Rows on disk as they come.

    Args:
        path: the file; its folder must exist. None: nothing is kept, and `append` does nothing.
        header: the first line, JSON values by name, "format" among them; None: the file has none.

    Attributes:
        kept: the rows that were there already, each with its file:line.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the file holds something else, or rows under another header.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.kept: list[tuple[str, Row]] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {self.path}: no folder {self.path.parent}")
        if _mended(self.path):
            self.kept = list(read_rows(self.path))
            if header is not None:
                _check_header(self.path, self.kept.pop(0)[1], json.loads(json.dumps(header)))
        elif header is not None:
            self.append(header)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row to the end, and out of this process's buffers."""
        if self.path is not None:
            with self.path.open("ab") as stream:
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _mended(path: Path) -> bool:
    """Whether the file holds rows; half a line that a killed process left is taken off first."""
    if not path.exists():
        return False
    content = path.read_bytes()
    if content and not content.startswith(b"{"):
        raise ValueError(f"{path} is no file of rows ({content[:20]!r} …): write to another file")
    whole = content.rfind(b"\n") + 1
    if tail := content[whole:]:
        try:
            json.loads(tail)
        except ValueError:
            os.truncate(path, whole)
            return whole > 0
        with path.open("ab") as stream:
            stream.write(b"\n")
    return bool(content)


def _check_header(path: Path, before: Row, now: Row) -> None:
    if before.get("format") != now.get("format"):
        raise ValueError(
            f"{path} does not begin as a {now.get('format')} does: write to another file"
        )
    if differing := differing_settings(before, now):
        raise ValueError(
            f"{path} holds results of other settings: {differing}; write to another file, or "
            "remove it"
        )


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, each with both values; "" where none does."""
    return "; ".join(
        f"{name} was {short(before.get(name))}, is {short(now.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    )


def short(value: Any, width: int = 60) -> str:
    """A value as JSON on one line of at most `width` characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= width else f"{text[: width - 2]} …"
