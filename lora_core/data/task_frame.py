"""What a tokenizer puts around one text or two, found by asking it.

An encoder's tokenizer frames a text with its own tokens (`[CLS] a [SEP] b [SEP]`, `<s> a </s></s>
b </s>`) and says by segment ids which text a token is of. Rows are cut to length, so the frame is
needed apart from the text: it is asked for once, with a text of one letter, and put around ids that
were cut before. A decoder's tokenizer has at most a token in front; two texts are then joined by a
line feed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Frame:
    """Ids around one text (`single`) or two (`pair`), and their segment ids."""

    single: tuple[tuple[int, ...], ...]
    """before and after the text"""
    pair: tuple[tuple[int, ...], ...]
    """before, between and after the texts"""
    single_types: tuple[tuple[int, ...], int] | None
    """segment ids: of the frame's tokens in order, and of the text; None: all are 0"""
    pair_types: tuple[tuple[int, ...], int, int] | None
    """segment ids: of the frame's tokens in order, and of the texts; None: all are 0"""
    causal: bool
    """whether rows are a decoder's"""

    @classmethod
    def of(cls, tok: Tokenizer, causal: bool | None = None) -> "Frame":
        """The frame of a tokenizer.

        Args:
            tok: from `load_tokenizer`.
            causal: whether rows are for a decoder; None: unless the tokenizer names a
                classification or separation token.
        """
        if causal is None:
            causal = not {"cls_token", "sep_token"} & tok.special_tokens.keys()
        if causal:
            before = tuple(tok.prefix_ids)
            between = tuple(tok.encode("\n"))
            end = () if tok.eos_id is None else (tok.eos_id,)
            return cls((before, ()), (before, between, end), None, None, True)
        one, one_types = _around(tok, 1)
        two, two_types = _around(tok, 2)
        return cls(
            one,
            two,
            None if not any(_flat(one_types)) else (_flat(one_types[::2]), one_types[1][0]),
            None
            if not any(_flat(two_types))
            else (_flat(two_types[::2]), two_types[1][0], two_types[3][0]),
            False,
        )

    def extra(self, texts: int) -> int:
        """Tokens of the frame around so many texts."""
        return sum(map(len, self.single if texts == 1 else self.pair))

    def ids(self, *texts: Sequence[int]) -> list[int]:
        """One text's or two texts' ids in their frame."""
        parts = self.single if len(texts) == 1 else self.pair
        found = list(parts[0])
        for text, after in zip(texts, parts[1:], strict=True):
            found += [*text, *after]
        return found

    def types(self, *texts: Sequence[int]) -> list[int] | None:
        """Segment ids of what `ids` gives; None where all are 0."""
        parts = self.single if len(texts) == 1 else self.pair
        known = self.single_types if len(texts) == 1 else self.pair_types
        if known is None:
            return None
        around, own = iter(known[0]), known[1:]
        found = [next(around) for _ in parts[0]]
        for text, kind, after in zip(texts, own, parts[1:], strict=True):
            found += [kind] * len(text) + [next(around) for _ in after]
        return found

    def start(self, first: int | None = None) -> int:
        """Where a text begins: the only one, or the second behind a first one of so many ids."""
        if first is None:
            return len(self.single[0])
        return len(self.pair[0]) + first + len(self.pair[1])


def _around(tok: Tokenizer, texts: int) -> tuple[tuple[tuple[int, ...], ...], list[list[int]]]:
    """Ids around so many texts; and segment ids of before, text, after, …"""
    encoding = tok.backend.encode(*["x"] * texts, add_special_tokens=True)
    ids: list[list[int]] = [[]]
    types: list[list[int]] = [[]]
    last = None
    for index, kind, text in zip(
        encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True
    ):
        if text != last:
            if last is not None and text is not None:  # nothing between two texts
                ids.append([])
                types.append([])
            ids.append([])
            types.append([])
            last = text
        ids[-1].append(index)
        types[-1].append(kind)
    if last is not None:  # nothing behind the last text
        ids.append([])
        types.append([])
    return tuple(map(tuple, ids[::2])), types


def _flat(lists: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(number for numbers in lists for number in numbers)
