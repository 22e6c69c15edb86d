r"""Answers as a terminal may show them: harmless, short, and where two texts part.

A model can write anything: escape sequences that recolour the terminal or retitle its window, marks
that turn the line's direction, an answer of a hundred thousand characters. What is shown goes
through here; what is stored stays as it was.
"""

import unicodedata
from typing import TextIO

_WIDTH = 100
_ALLOWED = "\n\t\u200c\u200d\u200e\u200f"  # joiners and direction marks: Persian, Hindi, emoji


def harmless(text: str) -> str:
    r"""A text without characters that steer a terminal; they stand as escapes (`\x1b`).

    Args:
        text: any text. Line feeds, tabs, blanks of all kinds and joiners stay.

    Returns:
        What can be printed.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else _escape(c) for c in text)


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in _ALLOWED or unicodedata.category(c) == "Zs"


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def cut(text: str, width: int = _WIDTH, middle: int = 0) -> str:
    """One line of a text, of at most `width` characters.

    Args:
        text: any text; white space becomes one blank.
        width: characters.
        middle: place that has to be seen; the cut is made around it.

    Returns:
        The line; … stands for what is left out.
    """
    start = middle - width // 3 if middle > width // 2 else 0
    part = harmless(" ".join(text[start : start + width].split()))
    more = start + width < len(text) or len(part) > width
    return f"{'…' if start else ''}{part[:width]}{'…' if more else ''}"


def quoted(text: str, width: int = _WIDTH, middle: int = 0) -> str:
    """As `cut`, in quotes."""
    return f"'{cut(text, width, middle)}'"


def parting(one: str, other: str) -> int:
    """The place of the first character in which two texts differ."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def difference(expected: str, said: str) -> str:
    """Where an answer parts from what was expected, in one line.

    Args:
        expected: the right text.
        said: another.

    Returns:
        The character's number, counted from 1, and both texts around it.
    """
    if unicodedata.normalize("NFC", expected) == unicodedata.normalize("NFC", said):
        return "looks the same and is written with other Unicode characters (composed, decomposed)"
    place = parting(expected, said)
    both = (quoted(text, 40, place) for text in (expected, said))
    return "differs at character {}: expected {}, got {}".format(place + 1, *both)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def say(screen: TextIO, text: str) -> None:
    """Write a line where its reader sees it, in whatever encoding the terminal has."""
    encoding = getattr(screen, "encoding", None) or "utf-8"
    screen.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    screen.flush()
