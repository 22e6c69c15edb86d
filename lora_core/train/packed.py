"""Batches of rows into which short samples are packed (lora_core/data/packing.py).

Each epoch packs its own permutation and shuffles the packed rows. How many there are, and how full
each is, is the same in every epoch: best-fit decreasing looks at lengths alone, and the order
decides between samples of one length. So the steps of a run are known before it, and the fullest
batch too. The trade-off: samples of rare lengths meet the same neighbours in every epoch; they do
not see each other, but they share a step.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from lora_core.data import collate_packed, pack
from lora_core.data.packing import Efficiency, check_lengths
from lora_core.train.sources import (
    Batch,
    RowBatches,
    batched,
    generator_of,
    lengths_of,
    named,
    shuffled,
)


class PackedBatches:
    """Batches of rows into which short samples are packed, each epoch anew.

    Args:
        rows: the samples, each {"input_ids", "labels"}.
        batch_size: packed rows in a batch.
        seed: of the order; None: the samples' own.
        capacity: tokens of a packed row.
        few_lengths: pad every row to `capacity`; else to the fullest of its batch.

    Raises:
        ValueError: a sample longer than `capacity`, or without a token.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        batch_size: int,
        seed: int | None,
        capacity: int,
        few_lengths: bool = False,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.capacity = capacity
        self.few_lengths = few_lengths
        self.lengths = lengths_of(rows)
        check_lengths(self.lengths, capacity)  # here a number is the row's own
        self._packed: tuple[int, list[list[int]]] | None = None
        self.count = len(self.packed(0))

    def per_epoch(self) -> int:
        """Batches in an epoch: as many packed rows in each, however the samples are shuffled."""
        return -(-self.count // self.batch_size)

    def packed(self, epoch: int) -> list[list[int]]:
        """The samples' numbers in each packed row of an epoch; the last epoch asked for is kept."""
        if self._packed is None or self._packed[0] != epoch:
            generator = generator_of(self.seed, epoch)
            order = shuffled(range(len(self.rows)), generator)
            rows = pack([self.lengths[i] for i in order], self.capacity)
            self._packed = epoch, shuffled([[order[i] for i in row] for row in rows], generator)
        return self._packed[1]

    def plan(self, epoch: int) -> Iterator[list[list[int]]]:
        """For each batch of an epoch, for each of its packed rows, the samples' numbers."""
        return batched(self.packed(epoch), self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        return map(self.batch, islice(self.plan(number), start, None))

    def batch(self, chosen: list[list[int]]) -> Batch:
        """The batch of some packed rows."""
        rows = [[self.rows[i] for i in samples] for samples in chosen]
        batch = collate_packed(rows, self.width(chosen))
        return named(batch, list(chain(*chosen)), list(chain(*rows)))

    def width(self, chosen: list[list[int]]) -> int:
        """T of a batch of some packed rows."""
        return self.capacity if self.few_lengths else max(map(self._used, chosen))

    def _used(self, samples: list[int]) -> int:
        return sum(self.lengths[i] for i in samples)

    def note(self) -> str:
        """How much less is padded than with one sample a row."""
        apart = RowBatches(self.rows, self.batch_size, self.seed, few_lengths=self.few_lengths)
        apart.lengths = self.lengths
        computed = sum(len(chosen) * self.width(chosen) for chosen in self.plan(0))
        before = apart.computed(apart.plan(0))
        share = Efficiency(len(self.rows), sum(self.lengths), computed, before)
        rows = f"{self.count:,} rows of at most {self.capacity:,} tokens"
        return f"packing: {share.samples:,} samples in {rows}; {share}"

    def largest(self) -> tuple[Batch, str]:
        """The fullest rows in one batch: how full rows are is the same in every epoch."""
        chosen = heapq.nlargest(self.batch_size, self.packed(0), self._used)
        size = f"{self.width(chosen)} tokens x {len(chosen)} packed rows"
        return self.batch(chosen), f"row {chosen[0][0]} and others: {size}"
