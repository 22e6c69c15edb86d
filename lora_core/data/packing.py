"""Packing: short samples laid end to end in rows of one length, so that little is padding.

    padded   a a a . . . . .        packed   a a a b b c c c
             b b . . . . . .                 d d d d d e e .
             c c c . . . . .

A padded batch is as wide as its longest sample, so chats of very different lengths are mostly
padding: every padded token costs as much as a real one in all matrix products. Packed, a row's
tokens are real but for a remainder at its end. What keeps the samples apart travels with the batch:
positions that begin again, a number for each document that attention keeps to, and no grade for a
document's first token, which the one before it would have to predict.

Which samples share a row is best-fit decreasing: longest first, each into the fullest row that
still has room, at most 11/9 of the least number of rows plus one (Johnson et al. 1974) and in
practice within a row or two of it. The known implementations keep rows in a segment tree over the
room left, O(n log C). Here the room left is a bit in one integer, so "the fullest row with room for
L" is a shift and its lowest set bit: n operations on C bits, a million samples in seconds.
The samples' order decides only between samples of one length, so the number of rows is the same for
every order (train/batches.py counts on it).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.data.encoder import IGNORED

PADDING = -1  # document id of a row's unused end


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows of `capacity` tokens as best-fit decreasing finds.

    Args:
        lengths: tokens of each sample, 1 ... capacity.
        capacity: tokens of a row.

    Returns:
        For each row the numbers of its samples, longest first. The number of rows and the room
        left in each do not depend on the samples' order.

    Raises:
        ValueError: a sample that is longer than a row, or that has no token.

    Ref: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
    algorithms", SIAM J. Comput. 3(4).
    """
    check_lengths(lengths, capacity)
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity)]  # rows with so many tokens left
    rooms = 0  # bit r is set where by_room[r] has a row
    for sample in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[sample]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def check_lengths(lengths: Sequence[int], capacity: int) -> None:
    """Refuse samples that no row holds.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.

    Raises:
        ValueError: names the first such sample, and the longest.
    """
    if capacity < 1:
        raise ValueError(f"packing needs rows of at least 1 token; got {capacity}")
    wrong = next((i for i, length in enumerate(lengths) if not 0 < length <= capacity), None)
    if wrong is None:
        return
    if lengths[wrong] < 1:
        raise ValueError(f"row {wrong} of the data has no token; leave it out")
    count = sum(length > capacity for length in lengths)
    raise ValueError(
        f"row {wrong} of the data has {lengths[wrong]} tokens, {count} of {len(lengths)} rows have "
        f"more than packing={capacity}: set packing to {max(lengths)}, or cut the data by "
        "max_length"
    )


@dataclass(frozen=True)
class Efficiency:
    """How much of what is computed is real; `str()` is the line that a run begins with."""

    samples: int
    """samples in an epoch"""
    tokens: int
    """their tokens"""
    computed: int
    """tokens of an epoch's batches, padding included"""
    before: int
    """the same for batches of a random order, one sample a row"""

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1 - self.tokens / self.computed

    @property
    def padding_before(self) -> float:
        """The same for batches of a random order, one sample a row."""
        return 1 - self.tokens / self.before

    def __str__(self) -> str:
        return (
            f"padding is {self.padding:.1%} of the tokens computed ({self.padding_before:.1%} in a "
            f"random order, one sample a row): {self.tokens:,} of {self.computed:,} are real"
        )


def collate_packed(
    rows: Sequence[Sequence[Mapping[str, Any]]], length: int | None = None, pad_id: int = 0
) -> dict[str, Tensor]:
    """Packed rows as int64 tensors (B, T), padded on the right.

    Args:
        rows: for each packed row its samples in order, each {"input_ids", "labels"}.
        length: T; None: the tokens of the fullest row.
        pad_id: what to fill `input_ids` with; never looked at again.

    Returns:
        * input_ids (B, T);
        * labels (B, T): -100 in the padding and at each document's first token, so that nothing
          is graded across a joint;
        * position_ids (B, T), from 0 in each document, and in the padding;
        * document_ids (B, T): 0 ... N-1 over the whole batch, in order; -1 in the padding, which
          sees itself alone;
        * document_bounds (M + 1,) int32: where documents begin in the flattened batch, and B T at
          the end; the padding of a row is one of them.

        There is no attention mask: `document_ids` say it all.

    Raises:
        ValueError: no rows, a row without samples, labels of another length than the ids, or more
            tokens than `length`.
    """
    if not rows or not all(rows):
        raise ValueError("collate_packed needs at least one row, and a sample in each")
    used = [sum(len(sample["input_ids"]) for sample in row) for row in rows]
    total = max(used) if length is None else length
    if max(used) > total:
        raise ValueError(f"row {used.index(max(used))} has {max(used)} tokens for {total}")
    shape = (len(rows), total)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)  # (B, T)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)  # (B, T)
    position_ids = torch.zeros(shape, dtype=torch.int64)  # (B, T)
    document_ids = torch.full(shape, PADDING, dtype=torch.int64)  # (B, T)
    bounds, document = [0], 0
    for b, row in enumerate(rows):
        start = 0
        for sample in row:
            ids, graded = sample["input_ids"], sample["labels"]
            if len(graded) != len(ids):
                raise ValueError(
                    f"a sample of row {b} has {len(ids)} input_ids but {len(graded)} labels"
                )
            end = start + len(ids)
            input_ids[b, start:end] = torch.as_tensor(ids)
            labels[b, start + 1 : end] = torch.as_tensor(graded)[1:]
            position_ids[b, start:end] = torch.arange(len(ids))
            document_ids[b, start:end] = document
            bounds.append(b * total + end)
            start, document = end, document + 1
        position_ids[b, start:] = torch.arange(total - start)
        if start < total:
            bounds.append((b + 1) * total)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "document_ids": document_ids,
        "document_bounds": torch.tensor(bounds, dtype=torch.int32),
    }
