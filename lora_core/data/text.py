"""Plain text for pretraining: one stream of tokens, cut into windows of equal length.

Documents are encoded one by one, each followed by the tokenizer's end token, and laid end to end;
row i is the slice [i·length, (i + 1)·length) of that stream and every token in it is graded. No
padding, no truncation: a document that does not fit goes on in the next row. The tokens of the
last, incomplete window are left out and counted (`dropped`). The trade-off against packing whole
documents: a row may hold the end of one document and the start of the next, with the end token
between them, and attention sees both.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from lora_core.data.tokenizer import Tokenizer

Row = dict[str, list[int]]


class TextWindows(Sequence[Row]):
    """Rows of exactly `length` tokens cut from one stream: {"input_ids", "labels"}.

    Args:
        ids: the token stream, any sequence of integers (list, array, 1-d tensor).
        length: tokens a row, at least 2.

    Raises:
        ValueError: length below 2, or fewer ids than one row needs.
    """

    def __init__(self, ids: Iterable[int], length: int) -> None:
        if length < 2:
            raise ValueError(f"length must be at least 2 (one token is graded); got {length}")
        if not isinstance(ids, array):
            ids = array("i", ids.tolist() if hasattr(ids, "tolist") else ids)
        if len(ids) < length:
            raise ValueError(f"{len(ids)} tokens do not fill one window of {length}; add text")
        self.ids = ids
        self.length = length

    @classmethod
    def from_texts(cls, texts: Iterable[str], tok: Tokenizer, length: int) -> "TextWindows":
        """Encode documents with the tokenizer's end token after each, then cut into windows."""
        return cls(encode_documents(texts, tok), length)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], length: int) -> "TextWindows":
        """Lay documents that are tokenised already, end token included, end to end; then cut.

        Args:
            rows: {"input_ids", …}, a document each.
            length: tokens a row; where all the documents together have fewer, that many.

        Raises:
            ValueError: length below 2, or fewer than two tokens in all.
        """
        ids = array("i")
        for row in rows:
            ids.extend(row["input_ids"])
        return cls(ids, min(length, max(len(ids), 2)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, all the same."""
        return [self.length] * len(self)

    @property
    def dropped(self) -> int:
        """Tokens at the end of the stream that fill no window."""
        return len(self.ids) % self.length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index % len(self) * self.length
        ids = self.ids[start : start + self.length].tolist()
        return {"input_ids": ids, "labels": list(ids)}


def encode_documents(texts: Iterable[str], tok: Tokenizer) -> "array[int]":
    """The token stream of documents: prefix (BOS, if the tokenizer has one), text, end token.

    Raises:
        ValueError: the tokenizer names no end token.
    """
    if tok.eos_id is None:
        raise ValueError(
            "the tokenizer names no eos_token, which is needed between documents; name one in "
            "tokenizer_config.json"
        )
    stream = array("i")
    for text in texts:
        stream.extend(tok.with_prefix(tok.encode(text)))
        stream.append(tok.eos_id)
    return stream
