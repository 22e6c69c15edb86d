"""Text as it comes, token by token: whole characters only, and an end at the first stop string.

Tokens are not text. A character may be spread over several of them, and a tokenizer may take a
space off a text's front, so each piece is the difference of two decodings of a short window:

    window  the tokens since the last piece but one
    piece   decode(window + new), less decode(window)

which costs the same at every step, where decoding the whole answer again would make n tokens cost
n^2. While the window ends in U+FFFD, which stands for bytes that make no character yet, nothing is
given out.

A stop string may span tokens, and a token may hold the end of one and more. So that the result does
not depend on how the text was cut, the stop string that is complete first, counted in characters,
ends the text (of two that end together the longer); text that may yet become one is held back.
transformers looks for stop strings in the tokens, by a table over the vocabulary, and leaves the
stop string in the text; here the text before it is the answer.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

UNFINISHED = "\ufffd"


class TextStream:
    """Turns the tokens of one answer into text.

    Args:
        tok: anything with `.decode(ids)`.
        stop: strings that end the text.

    Attributes:
        stopped: whether a stop string was found; further tokens change nothing.
        text: all that was given out so far.
    """

    def __init__(self, tok: Any, stop: Sequence[str] = ()) -> None:
        self.tok, self.stop = tok, stop_strings(stop)
        self.stopped = False
        self.text = ""
        self._ids: list[int] = []
        self._start = 0  # of the window
        self._read = 0  # tokens whose text was given out, or is held back
        self._known = ""  # the text of the window up to there
        self._held = ""  # text that may be the beginning of a stop string

    def feed(self, token: int) -> str:
        """Take a token; return the text that is certain now, perhaps none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self.tok.decode(self._ids[self._start :])
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(self._known) :]
        self._start, self._read = self._read, len(self._ids)
        self._known = self.tok.decode(self._ids[self._start :])
        return self._give(piece, last=False)

    def finish(self) -> str:
        """Say that no token follows; return what was held back."""
        if self.stopped:
            return ""
        text = self.tok.decode(self._ids[self._start :])
        piece, self._known = text[len(self._known) :], text
        return self._give(piece, last=True)

    def _give(self, piece: str, *, last: bool) -> str:
        """Text before a stop string, or before what may become one."""
        text, self._held = self._held + piece, ""
        end = first_stop(text, self.stop)
        if end is not None:
            self.stopped = True
            text = text[:end]
        elif not last:
            keep = len(text) - possible_stop(text, self.stop)
            text, self._held = text[:keep], text[keep:]
        self.text += text
        return text


class Answers:
    """The texts of a batch in the making.

    Args:
        tok: anything with `.decode(ids)`.
        rows: B.
        ends: tokens that end a row and are no text.
        stops: strings that end a row's text.
        on_text: called with a row's number and each piece of its text.
    """

    def __init__(
        self,
        tok: Any,
        rows: int,
        ends: Collection[int],
        stops: Sequence[str],
        on_text: Callable[[int, str], object],
    ) -> None:
        self.streams = [TextStream(tok, stops) for _ in range(rows)]
        self.ends, self.on_text = ends, on_text

    def take(self, tokens: list[int | None]) -> list[int]:
        """Pass on what is certain after a step; return the rows that a stop string has ended."""
        stopped = []
        for row, (stream, token) in enumerate(zip(self.streams, tokens, strict=True)):
            if token is None or token in self.ends:
                continue
            self._give(row, stream.feed(token))
            if stream.stopped:
                stopped.append(row)
        return stopped

    def finish(self) -> list[str]:
        """Pass on what was held back; return the whole texts."""
        for row, stream in enumerate(self.streams):
            self._give(row, stream.finish())
        return [stream.text for stream in self.streams]

    def _give(self, row: int, piece: str) -> None:
        if piece:
            self.on_text(row, piece)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Check stop strings.

    Args:
        stop: one, or several.

    Returns:
        Them.

    Raises:
        TypeError: something else.
        ValueError: an empty one, which would end every text before it begins.
    """
    found = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in found:
        if not isinstance(text, str):
            raise TypeError(f"stop must be strings; got {text!r}")
        if not text:
            raise ValueError("a stop string is empty: it would end every text at once")
    return found


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first in a text; None: there is none."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return min(found)[1] if found else None


def possible_stop(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(max((len(s) - 1 for s in stop), default=0), len(text))
    for size in range(longest, 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
