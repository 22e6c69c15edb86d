"""Rows to batches to optimizer steps, in an order that a seed and a position determine.

A data set is either a sequence of rows (`{"input_ids": [...], "labels": [...]}`, optionally
`"source"`), which is shuffled anew each epoch and collated here, or any iterable of ready batches,
which is taken as it comes. The permutation of epoch e is a function of (seed, e) and of nothing
else, so a position (epoch, group) can be returned to without replaying the random numbers before
it. The last batch of an epoch may be short, and so may the last group of batches: normalising by
graded tokens gives their tokens the weight of any other's within their step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lora_core.data import collate as default_collate

T = TypeVar("T")

Batch = Any
"""What the loss is given: by default a mapping with `input_ids` and `labels`."""


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter (itertools has it from Python 3.12 on)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


class BatchSource(Protocol):
    """Batches epoch by epoch, with a known number of them or None."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        ...

    def per_epoch(self) -> int | None:
        """Batches in an epoch, if known."""
        ...


class RowBatches:
    """Batches of a sequence of rows, in an order drawn anew for each epoch."""

    def __init__(
        self,
        rows: Sequence[Any],
        batch_size: int,
        seed: int | None,
        collate: Callable[[Sequence[Any]], Batch] = default_collate,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed  # None: the rows' own order, for evaluation
        self.collate = collate

    def per_epoch(self) -> int:
        """Batches in an epoch, the short last one included."""
        return -(-len(self.rows) // self.batch_size)

    def order(self, epoch: int) -> list[int]:
        """The rows' numbers in the order of this epoch."""
        if self.seed is None:
            return list(range(len(self.rows)))
        # the CPU generator keeps 32 bits of its seed
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * epoch) % 2**32)
        return torch.randperm(len(self.rows), generator=generator).tolist()

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        for chosen in islice(_batched(self.order(number), self.batch_size), start, None):
            rows = [self.rows[i] for i in chosen]
            batch = self.collate(rows)
            if isinstance(batch, dict):
                batch["row"] = chosen
                if isinstance(rows[0], Mapping) and "source" in rows[0]:
                    batch["source"] = [row["source"] for row in rows]
            yield batch


class ReadyBatches:
    """An iterable of batches, read from its beginning in every epoch."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def per_epoch(self) -> int | None:
        """Batches in an epoch, where the iterable says its length."""
        return len(self.batches) if isinstance(self.batches, Sized) else None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        return islice(iter(self.batches), start, None)


def _is_row(item: object) -> bool:
    """Whether an item has one row's ids (a list, or a tensor of one dimension), not a batch's."""
    if not isinstance(item, Mapping) or "input_ids" not in item:
        return False
    ids = item["input_ids"]
    return getattr(ids, "ndim", 1) == 1


def make_batches(
    data: Iterable[Any],
    batch_size: int,
    seed: int | None,
    collate: Callable[[Sequence[Any]], Batch] | None = None,
    *,
    packing: int | None = None,
    by_length: bool = False,
    few_lengths: bool = False,
) -> BatchSource:
    """Batches from rows or from batches, whichever `data` holds.

    Args:
        data: a sequence of rows, or an iterable of batches.
        batch_size: rows in a batch; not used for ready batches.
        seed: of the order; None keeps the rows' own; not used for ready batches.
        collate: rows -> batch. When given, `data` is a sequence of rows of any kind.
        packing: tokens of a row into which short samples are packed; None: a row a sample.
        by_length: batches of samples of about the same length.
        few_lengths: pad to one of a few lengths, for what is compiled once for each.

    Returns:
        The source of batches.

    Raises:
        ValueError: there is no row, or rows without labels.
        TypeError: `collate` for something else than a sequence of rows.
    """
    sequence = isinstance(data, Sized) and hasattr(data, "__getitem__")
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError("the data set is empty; it needs at least one row")
    first: Any = data[0] if sequence and collate is None else None  # type: ignore[index]  # has it
    if _is_row(first) and "labels" not in first:
        raise ValueError(
            "rows need labels beside input_ids: the same ids, with -100 where nothing is graded; "
            f"got {sorted(first)}"
        )
    if sequence and (collate is not None or _is_row(first)):
        return RowBatches(data, batch_size, seed, collate or default_collate)  # type: ignore[arg-type]
    if collate is not None:
        raise TypeError("collate needs a sequence of rows, with a length and an index")
    return ReadyBatches(data)


def step_groups(
    source: BatchSource, accumulate: int, epoch: int = 0, group: int = 0
) -> Iterator[tuple[int, int, list[Batch]]]:
    """The batches of one optimizer step after another, without end.

    Args:
        source: batches by epoch.
        accumulate: batches in a step; the last step of an epoch takes what is left.
        epoch: the epoch to begin in.
        group: the step within that epoch to begin at.

    Yields:
        (epoch, number of the group within it, its batches).

    Raises:
        ValueError: an epoch without a batch, as of a generator that was read before.
    """
    while True:
        some = group > 0
        for batches in _batched(source.epoch(epoch, group * accumulate), accumulate):
            some = True
            yield epoch, group, batches
            group += 1
        if not some:
            raise ValueError(
                f"epoch {epoch + 1} has no batch; a generator can be read once, so give a list or "
                "an object that can be iterated again"
            )
        epoch, group = epoch + 1, 0


def steps_per_epoch(source: BatchSource, accumulate: int) -> int | None:
    """Optimizer steps in an epoch, where the number of batches is known."""
    count = source.per_epoch()
    return None if count is None else -(-count // accumulate)


def tokens_in(batch: Batch) -> int:
    """Tokens fed to the model, padding not counted; 0 for a batch without `input_ids`."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return 0
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum())
    return int(batch["input_ids"].numel())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; lists, tuples and mappings keep their kind."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and any(isinstance(x, Tensor) for x in batch):
        return type(batch)(to_device(x, device) for x in batch)
    return batch
