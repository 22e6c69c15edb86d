"""Lines of a JSON Lines file, strictly: UTF-8, one object a line, no key twice.

The file is read in binary, so that a bad byte is reported with its line, and lines end at line
feeds only (JSON text may hold Unicode's other line separators). A UTF-8 byte order mark, which some
editors write, is passed over; UTF-16 is refused by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of each line with its file:line; blank lines are passed over.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not JSON, not an object, a key twice, or nothing in the file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no data file {str(file)!r}")
    found = False
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            raw = _without_byte_order_mark(line, where) if number == 1 else line
            if raw.strip():
                found = True
                yield where, _parse_line(raw, where)
    if not found:
        raise ValueError(f"{file} is empty: no record in it")


def _without_byte_order_mark(raw: bytes, where: str) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where}: the file is UTF-16; save it as UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _parse_line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        ) from None
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        shown = text[max(0, error.pos - 20) : error.pos + 20].strip()
        raise ValueError(
            f"{where}: not JSON: {error.msg} at column {error.colno}, near {shown!r}; "
            "the format is one JSON object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: a line must be a JSON object {{…}}; got {type(row).__name__} "
            "(a .json array must be written one object a line)"
        )
    if "\\u" in text:  # an escaped half of a surrogate pair cannot be encoded
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: contains half of a surrogate pair (\\ud8xx)") from None
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return row
