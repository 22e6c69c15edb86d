"""Where batches come from: rows in an order that a seed and an epoch determine, or ready batches.

The permutation of epoch e is a function of (seed, e) and of nothing else, so a position (epoch,
group) can be returned to without replaying the random numbers before it.

*Batches by length* compute less padding and leave each sample in a row of its own: the shuffled
order is cut into windows of 50 batches, each window is sorted by length, and the batches are
shuffled. So what meets in a batch changes from epoch to epoch, which it would not if all the data
were sorted. (packed.py packs several samples into a row instead.)

*Few lengths*, for what is compiled once for each: a batch is padded to the next of 32, 48, 64, 96,
128 … (two to an octave, at most half as many tokens again).
"""

import functools
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from lora_core.data import collate as default_collate
from lora_core.data.packing import Efficiency
from lora_core.train.snapshot import generators, restore_generators

T = TypeVar("T")

Batch = Any
"""What the loss is given: by default a mapping with `input_ids` and `labels`."""


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (itertools has it from Python 3.12 on)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@runtime_checkable
class BatchSource(Protocol):
    """Batches epoch by epoch, with a known number of them or None."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        ...

    def per_epoch(self) -> int | None:
        """Batches in an epoch, if known; the same in each."""
        ...

    def note(self) -> str | None:
        """A line for the run's beginning, if there is something to say."""
        ...

    def largest(self) -> tuple[Batch, str] | None:
        """A batch as large as any of any epoch, and its size in words; None: not known."""
        ...


@runtime_checkable
class StatefulSource(BatchSource, Protocol):
    """A source that remembers more than its position, such as answers that a policy sampled."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which another source goes on; taken after a step's batches."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from a state; `epoch` is then asked for the position it was taken at."""
        ...


class SourceError(ValueError):
    """A source cannot make its next batches; what was trained so far is good."""


WINDOW = 50  # batches that are sorted by length at a time
SHORTEST = 32  # of the few lengths


def generator_of(seed: int | None, epoch: int) -> torch.Generator | None:
    """The generator of an epoch's order; None: the rows' own order, for evaluation."""
    if seed is None:
        return None
    # the CPU generator keeps 32 bits of its seed
    return torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**32)


def shuffled(items: Sequence[T], generator: torch.Generator | None) -> list[T]:
    """A permutation of the items; without a generator their own order."""
    if generator is None:
        return list(items)
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def few_length(tokens: int) -> int:
    """The least of 32, 48, 64, 96, 128, 192 … that holds so many tokens."""
    octave = max(SHORTEST, 1 << (tokens - 1).bit_length())  # a power of two, not below
    three_quarters = octave * 3 // 4
    return three_quarters if max(tokens, SHORTEST) <= three_quarters else octave


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """Tokens of each row: `rows.lengths` where there is such a sequence, as SFTDataset's.

    Else all rows are read once, with a bar where that takes time.
    """
    known = getattr(rows, "lengths", None)
    if isinstance(known, Sequence) and len(known) == len(rows):
        return known
    from tqdm import tqdm

    bar = tqdm(rows, desc="lengths", unit=" rows", delay=2, leave=False)
    return [len(row["input_ids"]) for row in bar]


def named(batch: Batch, numbers: list[int], rows: Sequence[Any]) -> Batch:
    """The batch with its rows' numbers and, where they have one, their sources."""
    if isinstance(batch, dict):
        batch["row"] = numbers
        if isinstance(rows[0], Mapping) and "source" in rows[0]:
            batch["source"] = [row["source"] for row in rows]
    return batch


class RowBatches:
    """Batches of a sequence of rows, in an order drawn anew for each epoch.

    Args:
        rows: a sequence of rows, of any kind if `collate` takes it.
        batch_size: rows in a batch.
        seed: of the order; None: the rows' own.
        collate: rows -> batch; None: `lora_core.data.collate`.
        by_length: batches of rows of about the same length.
        few_lengths: pad to one of a few lengths; not with a `collate`.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        batch_size: int,
        seed: int | None,
        collate: Callable[[Sequence[Any]], Batch] | None = None,
        *,
        by_length: bool = False,
        few_lengths: bool = False,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.collate = collate
        self.by_length = by_length
        self.few_lengths = few_lengths

    @functools.cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row."""
        return lengths_of(self.rows)

    def per_epoch(self) -> int:
        """Batches in an epoch, the short last one included."""
        return -(-len(self.rows) // self.batch_size)

    def plan(self, epoch: int, by_length: bool | None = None) -> list[list[int]]:
        """The rows' numbers of each batch of an epoch."""
        generator, size = generator_of(self.seed, epoch), self.batch_size
        order = shuffled(range(len(self.rows)), generator)
        if not (self.by_length if by_length is None else by_length):
            return list(batched(order, size))
        windows = (sorted(w, key=self.lengths.__getitem__) for w in batched(order, size * WINDOW))
        return shuffled([batch for w in windows for batch in batched(w, size)], generator)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        return map(self.batch, islice(self.plan(number), start, None))

    def batch(self, chosen: list[int]) -> Batch:
        """The batch of some rows."""
        rows = [self.rows[i] for i in chosen]
        if self.collate is not None:
            return named(self.collate(rows), chosen, rows)
        longest = max(len(row["input_ids"]) for row in rows)
        return named(default_collate(rows, length=self.width(longest)), chosen, rows)

    def width(self, longest: int) -> int:
        """T of a batch whose longest row has so many tokens."""
        return few_length(longest) if self.few_lengths else longest

    def note(self) -> str | None:
        """How much less is padded than in a random order."""
        if not self.by_length:
            return None
        here, before = (self.computed(self.plan(0, by_length)) for by_length in (True, False))
        share = Efficiency(len(self.rows), sum(self.lengths), here, before)
        return f"batches by length: {share}"

    def computed(self, plan: list[list[int]]) -> int:
        """Tokens of some batches, padding included."""
        return sum(len(b) * self.width(max(self.lengths[i] for i in b)) for b in plan)

    def largest(self) -> tuple[Batch, str] | None:
        """The longest rows in one batch: any epoch may have their shape; None for unknown rows."""
        if not is_row(self.rows[0]):
            return None
        chosen = heapq.nlargest(self.batch_size, range(len(self.rows)), self.lengths.__getitem__)
        tokens = self.width(self.lengths[chosen[0]])
        return self.batch(chosen), f"row {chosen[0]}: {tokens} tokens x {len(chosen)} rows"


class ReadyBatches:
    """An iterable of batches, read from its beginning in every epoch."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def per_epoch(self) -> int | None:
        """Batches in an epoch, where the iterable says its length."""
        return len(self.batches) if isinstance(self.batches, Sized) else None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on.

        What is read on the way to that one leaves the random generators as they are: a DataLoader
        draws from them as it begins, and the run that is continued has done so already.
        """
        if not start:
            return iter(self.batches)
        saved = generators()
        try:
            batches = iter(self.batches)
            for _ in islice(batches, start):
                pass
        finally:
            restore_generators(*saved)
        return batches

    def note(self) -> None:
        """Nothing: they are taken as they come."""

    def largest(self) -> None:
        """Not known: reading them all may take as long as the run, or be possible once."""


def is_row(item: object) -> bool:
    """Whether an item has one row's ids (a list, or a tensor of one dimension), not a batch's."""
    if not isinstance(item, Mapping) or "input_ids" not in item:
        return False
    ids = item["input_ids"]
    return getattr(ids, "ndim", 1) == 1
