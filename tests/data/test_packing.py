"""Best-fit decreasing, and packed rows as tensors."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import collate_packed, pack
from lora_core.data.packing import Efficiency
from lora_core.losses import count_graded

LENGTHS = st.lists(st.integers(1, 12), max_size=40)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The tokens in each row by the textbook: a search through all rows for each sample."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return sorted(capacity - r for r in room)


def used(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return sorted(sum(lengths[i] for i in row) for row in rows)


@given(LENGTHS, st.integers(12, 30), st.integers(0, 9))
def test_rows_are_those_of_the_textbook_whatever_the_order(
    lengths: list[int], capacity: int, seed: int
) -> None:
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert used(rows, lengths) == best_fit_decreasing(lengths, capacity)
    assert rows == pack(lengths, capacity)
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    assert used(pack(shuffled, capacity), shuffled) == used(rows, lengths)


def test_the_fullest_row_with_room_is_taken() -> None:
    # 6 and 5 open rows with 4 and 5 left; 4 goes where it leaves nothing, 3 where 4 would not fit
    assert pack([3, 6, 4, 5], 10) == [[1, 2], [3, 0]]
    assert pack([], 5) == []
    assert pack([5, 5], 5) == [[0], [1]]


def test_many_samples_take_work_in_proportion() -> None:
    class Counted(list[int]):
        """Counts how often an element is looked at, one by one or all in a row."""

        looks = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.looks += 1
            return super().__getitem__(index)

        def __iter__(self) -> Any:
            Counted.looks += len(self)
            return super().__iter__()

    generator = random.Random(0)
    lengths = Counted(min(2048, int(generator.lognormvariate(5, 1)) + 1) for _ in range(100_000))
    rows = pack(lengths, 2048)
    assert len(lengths) <= Counted.looks <= 8 * len(lengths)  # a search through rows: thousands
    assert len(rows) <= -(-sum(lengths) // 2048) * 1.001 + 1


LONG = (
    "row 1 of the data has 9 tokens, 2 of 3 rows have more than packing=8: set packing to 11, or "
    "cut the data by max_length"
)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 9, 11], 8, LONG),
        ([3, 0], 8, "row 1 of the data has no token; leave it out"),
        ([3], 0, "packing needs rows of at least 1 token; got 0"),
    ],
)
def test_what_no_row_holds(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        pack(lengths, capacity)


def sample(*ids: int, graded: int = 0) -> dict[str, Any]:
    """A row of these ids, graded from the `graded`-th on."""
    return {"input_ids": list(ids), "labels": [-100] * graded + list(ids[graded:])}


def test_packed_rows_as_tensors() -> None:
    rows = [[sample(1, 2, 3, graded=1), sample(4, 5)], [sample(6, 7)]]
    batch = collate_packed(rows, pad_id=9)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]],
        "labels": [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        "document_ids": [[0, 0, 0, 1, 1], [2, 2, -1, -1, -1]],
        "document_bounds": [0, 3, 5, 7, 10],
    }
    assert batch["document_bounds"].dtype == torch.int32
    assert all(v.dtype == torch.int64 for k, v in batch.items() if k != "document_bounds")
    wide = collate_packed(rows, 6)
    assert wide["input_ids"].shape == (2, 6)
    assert wide["document_bounds"].tolist() == [0, 3, 5, 6, 8, 12]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 3),
)
def test_no_grade_across_a_joint(rows: list[list[tuple[int, int]]], more: int) -> None:
    samples = [[sample(*range(1, n + 1), graded=min(g, n)) for n, g in row] for row in rows]
    length = max(sum(n for n, _ in row) for row in rows) + more
    batch = collate_packed(samples, length)
    alone = (torch.tensor([one["labels"]]) for row in samples for one in row)
    assert count_graded(batch["labels"]) == sum(map(count_graded, alone))
    ids, positions = batch["document_ids"], batch["position_ids"]
    assert (batch["labels"][positions == 0] == -100).all()
    assert (batch["labels"][ids == -1] == -100).all()
    # bounds, ids and positions tell the same story
    bounds = batch["document_bounds"].tolist()
    assert bounds[-1] == ids.numel()
    flat, place = ids.flatten().tolist(), positions.flatten().tolist()
    for start, end in pairwise(bounds):
        assert len(set(flat[start:end])) == 1
        assert place[start:end] == list(range(end - start))
    assert sorted(set(flat) - {-1}) == list(range(sum(map(len, rows))))


def test_what_cannot_be_collated() -> None:
    with pytest.raises(ValueError, match="needs at least one row, and a sample in each"):
        collate_packed([])
    with pytest.raises(ValueError, match="needs at least one row, and a sample in each"):
        collate_packed([[sample(1)], []])
    with pytest.raises(ValueError, match="a sample of row 0 has 2 input_ids but 1 labels"):
        collate_packed([[{"input_ids": [1, 2], "labels": [1]}]])
    with pytest.raises(ValueError, match="row 1 has 3 tokens for 2"):
        collate_packed([[sample(1)], [sample(1, 2, 3)]], 2)


def test_tensors_are_samples_too() -> None:
    tensors = {k: torch.tensor(v) for k, v in sample(1, 2, 3, graded=1).items()}
    ours, theirs = (collate_packed([[one]]) for one in (tensors, sample(1, 2, 3, graded=1)))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_efficiency_is_said() -> None:
    share = Efficiency(samples=3, tokens=75, computed=100, before=300)
    assert share.padding == 0.25
    assert share.padding_before == 0.75
    assert str(share) == (
        "padding is 25.0% of the tokens computed (75.0% in a random order, one sample a row): "
        "75 of 100 are real"
    )
