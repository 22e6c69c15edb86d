"""Rows to batches to optimizer steps, in an order that a seed and a position determine.

A data set is either a sequence of rows (`{"input_ids": [...], "labels": [...]}`, optionally
`"source"`), which is shuffled anew each epoch and collated here, or any iterable of ready batches,
which is taken as it comes (sources.py, packed.py). The last batch of an epoch may be short, and so
may the last group of batches: normalising by graded tokens gives their tokens the weight of any
other's within their step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from lora_core.data.packing import PADDING
from lora_core.train.config import TrainConfig
from lora_core.train.packed import PackedBatches
from lora_core.train.sources import (
    Batch,
    BatchSource,
    ReadyBatches,
    RowBatches,
    SourceError,
    StatefulSource,
    batched,
    is_row,
)

__all__ = [
    "Batch",
    "BatchSource",
    "PackedBatches",
    "ReadyBatches",
    "RowBatches",
    "SourceError",
    "StatefulSource",
    "make_batches",
    "step_groups",
    "steps_per_epoch",
    "to_device",
    "tokens_in",
    "total_steps",
]


def make_batches(
    data: Iterable[Any] | BatchSource,
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
        data: a sequence of rows, an iterable of batches, or a source, which is returned as it is.
        batch_size: rows in a batch; not used for ready batches.
        seed: of the order; None keeps the rows' own; not used for ready batches.
        collate: rows -> batch. When given, `data` is a sequence of rows of any kind.
        packing: tokens of a row into which short samples are packed; None: a row a sample.
        by_length: batches of samples of about the same length.
        few_lengths: pad to one of a few lengths, for what is compiled once for each.

    Returns:
        The source of batches.

    Raises:
        ValueError: there is no row, rows without labels, or `packing` or `by_length` for batches
            that are made elsewhere.
        TypeError: `collate` for something else than a sequence of rows.
    """
    if isinstance(data, BatchSource):
        if packing is not None or by_length or collate is not None:
            raise ValueError(
                f"{type(data).__name__} makes its batches itself: leave out packing, "
                "group_by_length and collate"
            )
        return data
    sequence = isinstance(data, Sized) and hasattr(data, "__getitem__")
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError("the data set is empty; it needs at least one row")
    first: Any = data[0] if sequence and collate is None else None  # type: ignore[index]  # has it
    if is_row(first) and "labels" not in first:
        raise ValueError(
            "rows need labels beside input_ids: the same ids, with -100 where nothing is graded; "
            f"got {sorted(first)}"
        )
    for setting, given in (("packing", packing is not None), ("group_by_length", by_length)):
        if given and not is_row(first):
            made = "batches of your own collate" if collate else "ready batches"
            raise ValueError(
                f"{setting} makes the batches itself, from a sequence of rows with input_ids and "
                f"labels; it cannot change {made}: give rows alone, or leave {setting} out"
            )
    if packing is not None:
        return PackedBatches(data, batch_size, seed, packing, few_lengths)  # type: ignore[arg-type]
    if sequence and (collate is not None or is_row(first)):
        options = {"by_length": by_length, "few_lengths": few_lengths}
        return RowBatches(data, batch_size, seed, collate, **options)  # type: ignore[arg-type]
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
        for batches in batched(source.epoch(epoch, group * accumulate), accumulate):
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


def total_steps(config: TrainConfig, source: BatchSource, world: int = 1) -> int:
    """Optimizer steps of a run on `world` processes.

    Raises:
        ValueError: neither `config.steps` nor the number of batches is known.
    """
    if config.steps is not None:
        return config.steps
    per_epoch = steps_per_epoch(source, config.accumulate * world)
    if per_epoch is None:
        raise ValueError("steps must be given where the data set does not say its length")
    return config.epochs * per_epoch


def tokens_in(batch: Batch) -> int:
    """Tokens fed to the model, padding not counted; 0 for a batch without `input_ids`."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return 0
    mask, documents = batch.get("attention_mask"), batch.get("document_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum())
    if isinstance(documents, Tensor):
        return int((documents != PADDING).sum())
    return int(batch["input_ids"].numel())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; lists, tuples and mappings keep their kind."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(item, device) for item in batch]
        # a named tuple takes its fields one by one
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
