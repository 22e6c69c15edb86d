"""The processes of a run: one by default, several under `torchrun`.

The loop asks this file whatever concerns more than its own process: which batches are its own, what
a number sums to over all of them, whether it is the one that writes. With one process every answer
is the trivial one, so the loop has no branch for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    """number of this process"""
    world: int = 1
    """number of processes"""

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number summed over all processes."""
        return numbers

    def own(self, batches: Sequence[T]) -> Sequence[T]:
        """The part of a step's batches that this process computes."""
        return batches

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, each of which has those of its own batches."""
