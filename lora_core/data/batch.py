"""From rows to batches: padding by length, a seeded split, duplicates and overlap.

Padding is on the right and known by length alone: the attention mask comes from each row's length
and labels of the padding are -100, whatever the pad id is. Telling padding by `id == pad_id`, as
common collators do, hides every real end token when both ids are the same, and the model never
learns to stop.
"""

import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.data.encoder import IGNORED
from lora_core.data.sft import Row, Rows


def collate(
    rows: Sequence[Mapping[str, Any]], pad_id: int = 0, length: int | None = None
) -> dict[str, Tensor]:
    """Rows of different lengths as int64 tensors (B, T), padded on the right.

    Args:
        rows: each {"input_ids", "labels"} of its own length.
        pad_id: what to fill `input_ids` with; never looked at again.
        length: T, if more than the longest row has; None: the longest row's.

    Returns:
        input_ids (B, T), labels (B, T) with -100 in the padding, attention_mask (B, T) of 0 and 1.

    Raises:
        ValueError: no rows, a row whose labels have another length than its ids, or one of more
            than `length` tokens.
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    lengths = [len(row["input_ids"]) for row in rows]
    for index, (row, size) in enumerate(zip(rows, lengths, strict=True)):
        if len(row["labels"]) != size:
            raise ValueError(f"row {index} has {size} input_ids but {len(row['labels'])} labels")
        if length is not None and size > length:
            raise ValueError(f"row {index} has {size} tokens for a batch of length {length}")
    shape = (len(rows), max(lengths) if length is None else length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)  # (B, T)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)  # (B, T)
    attention_mask = torch.zeros(shape, dtype=torch.int64)  # (B, T)
    for b, (row, size) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[b, :size] = torch.tensor(row["input_ids"])
        labels[b, :size] = torch.tensor(row["labels"])
        attention_mask[b, :size] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def split(dataset: Rows, fraction: float, seed: int = 0) -> tuple[Rows, Rows]:
    """A seeded split into (train, eval); rows with the same tokens always stay on one side.

    Args:
        dataset: rows.
        fraction: share of the rows for evaluation, in [0, 1); at least one row if above 0.
        seed: of the draw.

    Returns:
        Two views, each in the dataset's order.

    Raises:
        ValueError: the fraction is out of range, or no row would be left to train on.
    """
    keys = [_fingerprint(row) for row in dataset]
    train, held_out = split_positions(keys, fraction, seed)
    return dataset.select(train), dataset.select(held_out)


def split_positions(
    keys: Sequence[Hashable], fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """A seeded split of rows into (train, eval) that keeps rows of one key on one side.

    Args:
        keys: of each row what must not stand on both sides: its tokens, its prompt.
        fraction: share of the rows for evaluation, in [0, 1); at least one row if above 0.
        seed: of the draw.

    Returns:
        Positions of each side, ascending.

    Raises:
        ValueError: the fraction is out of range, or no row would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the evaluation fraction must be in [0, 1); got {fraction}")
    groups = list(_groups(keys).values())
    random.Random(seed).shuffle(groups)
    wanted = max(1, round(fraction * len(keys))) if fraction else 0
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if fraction and groups and not chosen:
        chosen.update(groups[0])
    if len(chosen) == len(keys):
        raise ValueError(
            f"{len(keys)} rows ({len(groups)} different) cannot be split: nothing would be "
            "left to train on; add data or set the evaluation fraction to 0"
        )
    return [i for i in range(len(keys)) if i not in chosen], sorted(chosen)


def find_duplicates(dataset: Iterable[Row]) -> list[list[int]]:
    """Groups of positions whose rows have the same ids and labels, two or more each."""
    groups = _groups(_fingerprint(row) for row in dataset)
    return [group for group in groups.values() if len(group) > 1]


def find_overlap(train: Iterable[Row], evaluation: Iterable[Row]) -> dict[str, list[int]]:
    """Positions of evaluation rows that training has seen.

    Returns:
        `rows`: the whole row stands in `train`; `prompts`: what comes before the first graded
        token does (rows with no such prompt are not compared).
    """
    rows, prompts = set(), set()
    for row in train:
        rows.add(_fingerprint(row))
        prompts.add(_prompt(row))
    found: dict[str, list[int]] = {"rows": [], "prompts": []}
    for index, row in enumerate(evaluation):
        if _fingerprint(row) in rows:
            found["rows"].append(index)
        if len(_prompt(row)) > 1 and _prompt(row) in prompts:
            found["prompts"].append(index)
    return found


def _groups(keys: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


def _fingerprint(row: Row) -> Hashable:
    return tuple(row["input_ids"]), tuple(row["labels"])


def _prompt(row: Row) -> tuple[int, ...]:
    graded = (i for i, label in enumerate(row["labels"]) if label != IGNORED)
    return tuple(row["input_ids"][: next(graded, 0)])
