"""Replay: rows of general text shown again beside the rows that are to be learned.

What a model is not shown it forgets. The share is one of *tokens*, for rows may be of any length,
and it is kept to within half a row. Which rows are shown again is drawn from a seed, each once
before any is shown twice, and stays the same over a run's epochs. A share near 5 % keeps most of
what was known where the new text is close to the old, and near 25 % where it is far from it.

Ref: Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language
Models", arXiv:2403.08763, section 6.2.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, overload

Row = Mapping[str, Any]


def draw_replay(lengths: Sequence[int], tokens: int, share: float, seed: int) -> list[int]:
    """Rows to show again, so that they are a share of all tokens.

    Args:
        lengths: tokens of each row there is to draw from, 1 or more.
        tokens: of the rows that are to be learned.
        share: of all tokens that are replayed, in (0, 1).
        seed: of the draw.

    Returns:
        Numbers of rows, in the order they were drawn; their tokens are within half a row of
        `share / (1 - share) · tokens`.

    Raises:
        ValueError: a share out of range, no row to draw from, or a share of less than half a row.
    """
    if not 0 < share < 1:
        raise ValueError(f"replay_share must be above 0 and below 1; got {share}")
    if not lengths:
        raise ValueError("there is no row to replay")
    wanted, drawn = share / (1 - share) * tokens, 0
    generator, chosen = random.Random(seed), list[int]()
    while True:
        order = list(range(len(lengths)))
        generator.shuffle(order)
        for row in order:
            if drawn + lengths[row] / 2 > wanted:
                if not chosen:
                    raise ValueError(
                        f"replay_share {share:g} of {tokens} tokens is less than half a row of "
                        f"{lengths[row]}: give a larger share, more data, or shorter rows"
                    )
                return chosen
            chosen.append(row)
            drawn += lengths[row]


class JoinedRows(Sequence[Row]):
    """Rows of several sequences in one, each with the name of its own as "source".

    Args:
        parts: (name, rows, the numbers of those that are shown, in order).
    """

    def __init__(self, parts: Sequence[tuple[str, Sequence[Row], Sequence[int]]]) -> None:
        self.parts = [(name, rows) for name, rows, _ in parts]
        self.order = [(part, i) for part, (_, _, shown) in enumerate(parts) for i in shown]
        self.lengths = [len(self._row(part, i)["input_ids"]) for part, i in self.order]

    def _row(self, part: int, index: int) -> Row:
        return self.parts[part][1][index]

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, row = self.order[index]
        return {**self._row(part, row), "source": self.parts[part][0]}
