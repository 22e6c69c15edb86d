"""Padding by length, splits without leaks, duplicates and overlap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import SFTDataset, Tokenizer, collate, find_duplicates, find_overlap, split


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_collate_pads_by_length_never_by_id(rows: list[list[int]]) -> None:
    pad = 2  # also the id of a token that ends rows
    batch = collate([{"input_ids": ids, "labels": ids} for ids in rows], pad_id=pad)
    width = max(map(len, rows))
    for b, ids in enumerate(rows):
        fill = width - len(ids)
        assert batch["input_ids"][b].tolist() == ids + [pad] * fill
        assert batch["labels"][b].tolist() == ids + [-100] * fill
        assert batch["attention_mask"][b].tolist() == [1] * len(ids) + [0] * fill


def test_collate_errors() -> None:
    with pytest.raises(ValueError, match="collate needs at least one row"):
        collate([])
    with pytest.raises(ValueError, match="row 0 has 2 input_ids but 1 labels"):
        collate([{"input_ids": [1, 2], "labels": [1]}])


def made(tok: Tokenizer, texts: list[str]) -> SFTDataset:
    return SFTDataset([{"prompt": text[0], "completion": text[1:]} for text in texts], tok)


@given(
    numbers=st.lists(st.integers(10, 30), min_size=2, max_size=30),
    fraction=st.floats(0, 0.6),
    seed=st.integers(0, 9),
)
def test_split_parts_and_never_divides_equal_rows(
    families: dict[str, Tokenizer], numbers: list[int], fraction: float, seed: int
) -> None:
    ds = made(families["chatml"], [str(number) for number in numbers])
    if fraction > 0 and len(set(numbers)) == 1:
        with pytest.raises(ValueError, match=r"rows \(1 different\) cannot be split"):
            split(ds, fraction, seed)
        return
    with pytest.raises(ValueError, match=r"0 rows \(0 different\) cannot be split"):
        split(ds.select([]), fraction, seed)
    train, held_out = split(ds, fraction, seed)
    assert sorted(train.where + held_out.where) == sorted(ds.where)
    assert find_overlap(train, held_out)["rows"] == []
    assert len(train) > 0
    assert (len(held_out) > 0) == (fraction > 0)
    again = split(ds, fraction, seed)
    assert [part.where for part in again] == [train.where, held_out.where]


def test_split_counts_and_seeds(tok: Tokenizer) -> None:
    ds = made(tok, [f"q{i}" for i in range(100)])
    train, held_out = split(ds, 0.05, 0)
    assert (len(train), len(held_out)) == (95, 5)
    assert split(ds, 0.05, 1)[1].where != held_out.where
    with pytest.raises(ValueError, match=r"must be in \[0, 1\); got 1"):
        split(ds, 1)


def test_duplicates_and_overlap(tok: Tokenizer) -> None:
    ds = made(tok, ["qa", "qb", "qa", "pc", "qa", "pc"])
    assert find_duplicates(ds) == [[0, 2, 4], [3, 5]]
    found = find_overlap(made(tok, ["qa", "pb"]), made(tok, ["qa", "qc", "ra"]))
    assert found == {"rows": [0], "prompts": []}  # a prompt of one token is no evidence
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in [("q", "a"), ("q", "b"), ("r", "a")]
    ]
    train, held_out = SFTDataset(chats[:1], tok), SFTDataset(chats, tok)
    assert find_overlap(train, held_out) == {"rows": [0], "prompts": [0, 1]}


def test_a_batch_can_be_longer_than_its_longest_row() -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}]
    plain, longer = collate(rows, 7), collate(rows, 7, length=4)
    assert longer["input_ids"].tolist() == [[1, 2, 7, 7], [3, 7, 7, 7]]
    for name, value in {"labels": -100, "attention_mask": 0}.items():
        assert torch.equal(longer[name][:, :2], plain[name])
        assert (longer[name][:, 2:] == value).all()
    with pytest.raises(ValueError, match="row 0 has 2 tokens for a batch of length 1"):
        collate(rows, length=1)
