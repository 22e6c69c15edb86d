"""A prompt and its continuations as one row, in which the prompt stands once.

Of a pair that shares a prompt of n tokens, or of a group of G answers to it, the prompt is computed
once where rows of their own would compute it 2 or G times:

    input_ids      p1 … p(n-1) | pn  c1 c2 c3 | pn  d1 d2 | padding
    branch_ids     0  …   0    |  1   1  1  1 |  2   2  2 |   -1
    positions      0  …  n-2   | n-1  n n+1 … | n-1  n … |
    labels        -100 …       |-100 c1 c2 c3 |-100 d1 d2 |  -100

A token sees branch 0 and the earlier tokens of its own branch (lora_core/models/attention.py), so
that each branch is computed as if it alone followed the prompt. The prompt's last token predicts
the first token of *every* branch: it is repeated at the head of each, where the loss's usual shift
by one then finds it. The trade-off: that token is computed once a branch, and a mask (T, T) takes
the place of the causal path.

Models that cannot do so get a row a completion, `shared=False`, with the same `completions`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
PADDED = -1


@dataclass(frozen=True)
class Branched:
    """A prompt and what may follow it, in tokens."""

    prompt: tuple[int, ...]
    """one id or more"""
    completions: tuple[tuple[int, ...], ...]
    """ids of each continuation, one or more each"""
    graded: tuple[tuple[bool, ...], ...] | None = None
    """which of them are graded; None: all"""
    where: str = ""
    """file:line, for messages"""

    def __post_init__(self) -> None:
        place = f"{self.where}: " if self.where else ""
        if not self.prompt:
            raise ValueError(f"{place}a prompt needs a token to predict the next one from")
        if not self.completions or not all(self.completions):
            raise ValueError(f"{place}a completion needs a token; got {self.completions}")
        if self.graded is not None and [*map(len, self.graded)] != [*map(len, self.completions)]:
            raise ValueError(
                f"{place}graded must have a flag for each token of the completions, "
                f"{[*map(len, self.completions)]}; got {[*map(len, self.graded)]}"
            )

    def flags(self, number: int) -> tuple[bool, ...]:
        """Which tokens of a completion are graded."""
        return (
            (True,) * len(self.completions[number])
            if self.graded is None
            else (self.graded[number])
        )

    @property
    def tokens(self) -> int:
        """Tokens of the shared row, the copies of the prompt's last one included."""
        return len(self.prompt) - 1 + sum(1 + len(c) for c in self.completions)


@dataclass
class _Row:
    """One row being laid out."""

    ids: list[int]
    branches: list[int]
    labels: list[int]
    places: list[list[int]]
    """of each completion, the columns that predict its graded tokens"""
    ends: list[int]
    """of each completion, the column of its last token"""

    def add(self, ids: Sequence[int], branch: int, flags: Sequence[bool]) -> None:
        """Append tokens of a branch; a completion's graded ones are predicted a column earlier."""
        for token, graded in zip(ids, flags, strict=True):
            if graded:
                self.places[-1].append(len(self.ids) - 1)
            self.ids.append(token)
            self.branches.append(branch)
            self.labels.append(token if graded else IGNORED)


def _shared(row: Branched) -> Iterator[_Row]:
    """The prompt once, then every completion."""
    laid = _Row([], [], [], [], [])
    laid.add(row.prompt[:-1], 0, [False] * (len(row.prompt) - 1))
    for number, completion in enumerate(row.completions):
        laid.places.append([])
        laid.add([row.prompt[-1], *completion], number + 1, [False, *row.flags(number)])
        laid.ends.append(len(laid.ids) - 1)
    yield laid


def _apart(row: Branched) -> Iterator[_Row]:
    """The prompt before each completion."""
    for number, completion in enumerate(row.completions):
        laid = _Row([], [], [], [[]], [])
        laid.add(row.prompt, 0, [False] * len(row.prompt))
        laid.add(completion, 0, row.flags(number))
        laid.ends.append(len(laid.ids) - 1)
        yield laid


def branch_batch(
    rows: Sequence[Branched], *, shared: bool = True, pad_id: int = 0
) -> dict[str, Tensor]:
    """A batch of prompts and their completions, padded on the right.

    Args:
        rows: R prompts with N completions in all.
        shared: a prompt's completions in one row; else a row a completion.
        pad_id: stands in the padding, which nothing sees.

    Returns:
        `input_ids`, `labels` (-100 where not graded) and `attention_mask`, int64 (B, T), B being R
        or N; shared also `branch_ids` (B, T): 0 what all completions share, k the k-th, -1 padding.
        `completions` (N, L) int64: for each completion, row by row, the flat places b·T + t whose
        logits predict its graded tokens, in order, -1 after the last; L is the most that one has.
        `ends` (N,) int64: the flat place of each completion's last token.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("a batch needs a row")
    laid = [line for row in rows for line in (_shared(row) if shared else _apart(row))]
    width = max(len(line.ids) for line in laid)
    longest = max(len(places) for line in laid for places in line.places)

    def padded(values: list[list[int]], size: int, fill: int) -> Tensor:
        return torch.tensor([[*line, *[fill] * (size - len(line))] for line in values])

    flat = [
        [at * width + place for place in places]
        for at, line in enumerate(laid)
        for places in line.places
    ]
    batch = {
        "input_ids": padded([line.ids for line in laid], width, pad_id),
        "labels": padded([line.labels for line in laid], width, IGNORED),
        "attention_mask": padded([[1] * len(line.ids) for line in laid], width, 0),
        "completions": padded(flat, max(longest, 1), PADDED),
        "ends": torch.tensor(
            [at * width + end for at, line in enumerate(laid) for end in line.ends]
        ),
    }
    if shared:
        batch["branch_ids"] = padded([line.branches for line in laid], width, PADDED)
    return batch
