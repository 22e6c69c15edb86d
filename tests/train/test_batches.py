"""Order, position and grouping of batches."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.train.batches import (
    make_batches,
    step_groups,
    steps_per_epoch,
    to_device,
    tokens_in,
)


def numbers(count: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [i, i], "labels": [i, i]} for i in range(count)]


def seen(batches: list[Any]) -> list[int]:
    return [i for batch in batches for i in batch["input_ids"][:, 0].tolist()]


@given(st.integers(1, 23), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_each_epoch_shows_each_row_once(rows: int, size: int, accumulate: int, seed: int) -> None:
    source = make_batches(numbers(rows), size, seed)
    steps = steps_per_epoch(source, accumulate)
    assert steps == math.ceil(math.ceil(rows / size) / accumulate)
    groups = step_groups(source, accumulate)
    for epoch in range(3):
        taken = [next(groups) for _ in range(steps)]
        assert [(e, g) for e, g, _ in taken] == [(epoch, g) for g in range(steps)]
        assert sorted(i for _, _, b in taken for i in seen(b)) == list(range(rows))


@given(st.integers(1, 23), st.integers(1, 6), st.integers(1, 4), st.integers(0, 30))
def test_a_position_can_be_returned_to(rows: int, size: int, accumulate: int, done: int) -> None:
    source = make_batches(numbers(rows), size, 5)
    straight = step_groups(source, accumulate)
    epoch, group = 0, 0
    for _ in range(done):
        epoch, last, _ = next(straight)
        group = last + 1
    # where an epoch is over, the position is one past its last group
    resumed = step_groups(source, accumulate, epoch, group)
    for _ in range(5):
        (e1, g1, b1), (e2, g2, b2) = next(straight), next(resumed)
        assert (e1, g1, seen(b1)) == (e2, g2, seen(b2))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int | None, epoch: int) -> list[int]:
        return seen(list(make_batches(numbers(50), 7, seed).epoch(epoch)))

    torch.manual_seed(1)
    first = order(3, 0)
    torch.manual_seed(2)
    assert order(3, 0) == first
    assert order(3, 1) != first != order(4, 0)
    assert order(None, 0) == order(None, 1) == list(range(50))


def test_batches_are_taken_as_they_come() -> None:
    batches = [{"input_ids": torch.tensor([[i]]), "labels": torch.tensor([[i]])} for i in range(5)]
    groups = step_groups(make_batches(batches, 99, 0), 2)
    assert [seen(next(groups)[2]) for _ in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_rows_of_tensors_are_rows_and_collate_makes_anything_rows() -> None:
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}] * 3
    assert make_batches(rows, 2, 0).per_epoch() == 2
    pairs = make_batches([(1, 2), (3, 4)], 2, None, collate=torch.tensor)
    assert next(pairs.epoch(0)).tolist() == [[1, 2], [3, 4]]


def test_a_generator_gives_one_epoch() -> None:
    def once() -> Iterator[dict[str, torch.Tensor]]:
        for i in range(3):
            yield {"input_ids": torch.tensor([[i]]), "labels": torch.tensor([[i]])}

    source = make_batches(once(), 1, 0)
    assert source.per_epoch() is None
    groups = step_groups(source, 2)
    assert [seen(next(groups)[2]) for _ in range(2)] == [[0, 1], [2]]
    with pytest.raises(ValueError, match="epoch 2 has no batch; a generator can be read once"):
        next(groups)


def test_sources_and_row_numbers_travel_with_the_batch(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(count=4, sources=True)
    batch = next(make_batches(rows, 3, None).epoch(0))
    assert batch["source"] == ["a", "b", "a"]
    assert batch["row"] == [0, 1, 2]
    assert tokens_in(batch) == sum(len(row["input_ids"]) for row in rows[:3])
    assert tokens_in({"input_ids": torch.zeros(2, 3)}) == 6
    assert tokens_in((torch.zeros(2, 3),)) == 0


def test_to_device_keeps_the_kind() -> None:
    x = torch.zeros(1)
    moved = to_device({"a": x, "b": [x, x], "c": (x,), "d": ["text"]}, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][1].device.type == moved["c"][0].device.type
    assert moved["a"].device.type == "meta"
    assert moved["d"] == ["text"]


def test_what_is_no_data_set() -> None:
    with pytest.raises(ValueError, match="the data set is empty; it needs at least one row"):
        make_batches([], 1, 0)
    with pytest.raises(TypeError, match="collate needs a sequence of rows, with a length"):
        make_batches(iter([1]), 1, 0, collate=list)
