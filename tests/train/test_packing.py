"""Packed batches and batches by length: order, position, what is reported, what is refused."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.data import SFTDataset, collate, load_tokenizer
from lora_core.losses import count_graded
from lora_core.train import CausalLoss, TrainConfig, train
from lora_core.train.batches import make_batches, step_groups, steps_per_epoch, tokens_in
from lora_core.train.sources import WINDOW, few_length

Make = Callable[..., Any]


def rows_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Row i has these tokens: i, i, …"""
    return [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]


def shape(batch: Any) -> list[int]:
    return list(batch["input_ids"].shape)


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)
HOW = st.sampled_from([{"packing": 12}, {"by_length": True}, {"packing": 16, "few_lengths": True}])


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), HOW)
def test_each_epoch_shows_each_sample_once(
    lengths: list[int], size: int, accumulate: int, seed: int, how: dict[str, Any]
) -> None:
    source = make_batches(rows_of(lengths), size, seed, **how)
    steps = steps_per_epoch(source, accumulate)
    assert steps == math.ceil(source.per_epoch() / accumulate)
    groups = step_groups(source, accumulate)
    for epoch in range(3):
        taken = [next(groups) for _ in range(steps)]
        assert [(e, g) for e, g, _ in taken] == [(epoch, g) for g in range(steps)]
        batches = [batch for _, _, some in taken for batch in some]
        assert len(batches) == source.per_epoch()
        assert all(len(batch["input_ids"]) <= size for batch in batches)
        assert sorted(i for batch in batches for i in batch["row"]) == list(range(len(lengths)))
        seen = Counter(i for b in batches for i in b["input_ids"][real(b)].tolist())
        assert seen == Counter(dict(enumerate(lengths)))
        assert sum(map(tokens_in, batches)) == sum(lengths)
        assert sum(count_graded(b["labels"]) for b in batches) == sum(n - 1 for n in lengths)


def real(batch: Any) -> torch.Tensor:
    if "document_ids" in batch:
        return batch["document_ids"] >= 0
    return batch["attention_mask"].bool()


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 20), HOW)
def test_a_position_can_be_returned_to(
    lengths: list[int], size: int, accumulate: int, done: int, how: dict[str, Any]
) -> None:
    straight = step_groups(make_batches(rows_of(lengths), size, 5, **how), accumulate)
    epoch, group = 0, 0
    for _ in range(done):
        epoch, last, _ = next(straight)
        group = last + 1
    torch.manual_seed(done)  # no generator but their own
    resumed = step_groups(make_batches(rows_of(lengths), size, 5, **how), accumulate, epoch, group)
    for (e1, g1, b1), (e2, g2, b2) in islice(zip(straight, resumed, strict=False), 4):
        assert (e1, g1, [b["row"] for b in b1]) == (e2, g2, [b["row"] for b in b2])


@pytest.mark.parametrize("how", [{"packing": 12}, {"by_length": True}])
def test_the_order_depends_on_seed_and_epoch(how: dict[str, Any]) -> None:
    lengths = [1 + i % 9 for i in range(60)]

    def order(seed: int, epoch: int) -> list[list[int]]:
        source = make_batches(rows_of(lengths), 2, seed, **how)
        return [batch["row"] for batch in source.epoch(epoch)]

    assert order(3, 0) == order(3, 0)
    assert order(3, 0) != order(3, 1) != order(4, 1)
    # not only the batches' order: what is in a batch changes too
    assert sorted(map(sorted, order(3, 0))) != sorted(map(sorted, order(3, 1)))


def test_packed_rows_do_not_come_longest_first() -> None:
    lengths = list(range(1, 61))
    source = make_batches(rows_of(lengths), 1, 0, packing=60)
    longest = [max(lengths[i] for i in batch["row"]) for batch in source.epoch(0)]
    assert longest != sorted(longest, reverse=True)  # the order in which they are opened


def test_batches_by_length_are_sorted_within_windows_of_a_random_order() -> None:
    lengths = [1 + (37 * i) % 200 for i in range(2 * WINDOW * 3 + 5)]
    source = make_batches(rows_of(lengths), 3, 0, by_length=True)
    batches = [batch["row"] for batch in source.epoch(0)]
    assert sorted(map(len, batches)) == [2] + [3] * (len(batches) - 1)
    plain = [batch["row"] for batch in make_batches(rows_of(lengths), 3, 0).epoch(0)]
    windows = [set(chain(*plain[i : i + WINDOW])) for i in range(0, len(plain), WINDOW)]
    for batch in batches:
        assert any(window.issuperset(batch) for window in windows)
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)
    widths = [max(lengths[i] for i in batch) for batch in batches]
    assert widths[:WINDOW] != sorted(widths[:WINDOW])  # the batches are shuffled afterwards,
    first = set(chain(*batches[:WINDOW]))
    assert not any(window.issuperset(first) for window in windows)  # across windows
    # of each window the batches do not overlap in length
    for window in windows:
        spans = sorted((lengths[b[0]], lengths[b[-1]]) for b in batches if window.issuperset(b))
        assert all(one[1] <= two[0] for one, two in pairwise(spans))


def test_what_the_first_lines_say() -> None:
    rows = rows_of([10, 2, 3, 5, 10])
    assert make_batches(rows, 1, None).note() is None
    assert make_batches(rows, 2, None, packing=10).note() == (
        "packing: 5 samples in 3 rows of at most 10 tokens; padding is 0.0% of the tokens computed "
        "(25.0% in a random order, one sample a row): 30 of 30 are real"
    )
    assert make_batches(rows, 2, None, by_length=True).note() == (
        "batches by length: padding is 16.7% of the tokens computed (25.0% in a random order, one "
        "sample a row): 30 of 36 are real"
    )
    for how in ({"packing": 12}, {"by_length": True}, {"by_length": True, "few_lengths": True}):
        source = make_batches(rows, 2, 1, **how)
        computed = sum(batch["input_ids"].numel() for batch in source.epoch(0))
        assert f"30 of {computed} are real" in source.note()


def test_few_lengths() -> None:
    sizes = sorted({few_length(n) for n in range(1, 1025)})
    assert sizes == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for n in range(1, 5000):
        assert n <= few_length(n) == few_length(few_length(n))
        assert few_length(n) <= max(32, 1.5 * n)
    rows = rows_of([5, 33, 70, 2])
    source = make_batches(rows, 1, None, few_lengths=True)
    assert [shape(b) for b in source.epoch(0)] == [[1, 32], [1, 48], [1, 96], [1, 32]]
    assert [tokens_in(b) for b in source.epoch(0)] == [5, 33, 70, 2]
    packed = make_batches(rows[:2], 1, None, packing=40, few_lengths=True)
    assert [shape(b) for b in packed.epoch(0)] == [[1, 40]]
    packed = make_batches(rows[:2], 1, None, packing=40)
    assert [shape(b) for b in packed.epoch(0)] == [[1, 38]]


def test_a_folders_rows_tell_their_lengths(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{"word " * n}"}}\n' for n in range(1, 9)))
    rows = SFTDataset.from_jsonl(path, load_tokenizer(tokenizer_folder))
    assert make_batches(rows, 2, 0).lengths == rows.lengths == [len(r["input_ids"]) for r in rows]
    ours = make_batches(rows, 2, 0, packing=64)
    plain = make_batches([dict(row) for row in rows], 2, 0, packing=64)
    for one, two in zip(ours.epoch(1), plain.epoch(1), strict=True):
        assert one["row"] == two["row"]
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_a_sequence_may_know_its_lengths_without_being_read() -> None:
    class Slow(list[dict[str, list[int]]]):
        def __iter__(self) -> Any:
            raise AssertionError("read")

    rows = Slow(rows_of([3, 2, 4]))
    rows.lengths = [3, 2, 4]
    assert make_batches(rows, 2, 0, packing=5).per_epoch() == 1
    rows.lengths = [3, 2]  # of something else
    with pytest.raises(AssertionError, match="read"):
        make_batches(rows, 2, 0, packing=5)


@pytest.mark.parametrize(
    ("setting", "how"), [("packing", {"packing": 8}), ("group_by_length", {"by_length": True})]
)
def test_what_makes_batches_itself_is_refused(setting: str, how: dict[str, Any]) -> None:
    ready = [{"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)}]
    message = f"{setting} makes the batches itself, from a sequence of rows with input_ids and "
    with pytest.raises(ValueError, match=f"{message}.*cannot change ready batches: give rows"):
        make_batches(ready, 1, 0, **how)
    with pytest.raises(ValueError, match=f"{message}.*cannot change ready batches: give rows"):
        make_batches(iter(ready), 1, 0, **how)
    with pytest.raises(ValueError, match=f"{message}.*change batches of your own collate: give"):
        make_batches(rows_of([2, 3]), 1, 0, collate=collate, **how)
    if setting == "packing":
        with pytest.raises(ValueError, match="row 1 of the data has 9 tokens, 1 of 2 rows have"):
            make_batches(rows_of([2, 9]), 1, 0, **how)


# --- runs ---


def config(**kwargs: Any) -> TrainConfig:
    usual = {"batch_size": 2, "accumulate": 2, "epochs": 2, "lr": 1e-2, "progress": False}
    return TrainConfig(**(usual | kwargs))


def decoder(small_decoder: Make, lora: bool = True, dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    model = small_decoder()
    model.init_weights(0.3)
    if lora:
        add_adapter(model, LoRAConfig(r=4, dropout=dropout))
    return model


KEYS = ("loss", "loss/a", "loss/b", "grad_norm")


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_packed_run_is_the_unpacked_run_of_the_same_samples(
    small_decoder: Make, make_rows: Make, lora: bool, recompute: bool
) -> None:
    rows = make_rows(count=23, sources=True)
    setup = config(packing=16, activation_checkpointing=recompute, epochs=1)
    packed = train(decoder(small_decoder, lora), rows, setup)
    source = make_batches(rows, 2, setup.seed, packing=16)
    same = []
    for batch in source.epoch(0):
        chosen = [rows[i] for i in batch["row"]]
        same.append(collate(chosen) | {"source": [row["source"] for row in chosen]})
    plain = train(decoder(small_decoder, lora), same, config(epochs=1))
    assert len(packed.history) == len(plain.history) == steps_per_epoch(source, 2)
    for one, two in zip(packed.history, plain.history, strict=True):
        assert (one["graded"], one["tokens"]) == (two["graded"], two["tokens"])
        for key in KEYS:
            assert one.get(key) == pytest.approx(two.get(key), rel=2e-5), key


def test_a_resumed_packed_run_is_bit_equal(
    small_decoder: Make, make_rows: Make, without_times: Make, no_plot: None, tmp_path: Path
) -> None:
    rows = make_rows(count=23, sources=True)
    runs = {}
    for name, stops in {"straight": [8], "stopped": [3, 5, 8]}.items():
        for number, steps in enumerate(stops):
            setup = config(packing=16, steps=steps, out=tmp_path / name, resume=number > 0)
            setup = config(**{**setup.to_dict(), "schedule": "constant", "warmup": 0})
            model = decoder(small_decoder, dropout=0.3)
            result = train(model, rows, setup)
        runs[name] = (without_times(result.history), model.state_dict())
    (one, weights), (two, others) = runs.values()
    assert one == two
    assert len(one) == 8
    assert all(torch.equal(weights[k], others[k]) for k in weights)


def test_another_packing_does_not_resume(
    small_decoder: Make, make_rows: Make, no_plot: None, tmp_path: Path
) -> None:
    rows = make_rows(count=23)
    train(decoder(small_decoder), rows, config(packing=16, steps=2, out=tmp_path / "run"))
    again = config(packing=32, steps=4, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="config packing was 16, is 32"):
        train(decoder(small_decoder), rows, again)


def test_evaluation_rows_stay_apart(small_decoder: Make, make_rows: Make, capfd: Any) -> None:
    rows = make_rows(count=23, sources=True)
    setup = config(packing=16, epochs=1, lr=1e-9)
    record = train(decoder(small_decoder), rows, setup, rows[:5]).history[-1]
    plain = train(decoder(small_decoder), rows, config(epochs=1, lr=1e-9), rows[:5]).history[-1]
    assert record["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert record["eval_loss/a"] == pytest.approx(plain["eval_loss/a"], rel=1e-6)
    assert "packing: 23 samples in" in capfd.readouterr().err


def test_a_model_that_would_mix_documents_is_refused(tiny: Make, make_rows: Make) -> None:
    message = "packed rows need a model that keeps documents apart by document_ids; Tiny.forward"
    with pytest.raises(ValueError, match=message):
        train(tiny(), make_rows(), config(packing=16))


def test_a_model_without_bounds_is_given_none(small_decoder: Make, make_rows: Make) -> None:
    model = decoder(small_decoder, lora=False)

    class Own(torch.nn.Module):
        def forward(self, input_ids: Any, position_ids: Any, document_ids: Any) -> Any:
            return model(input_ids, position_ids=position_ids, document_ids=document_ids)

    batch = next(make_batches(make_rows(sources=True), 2, 0, packing=16).epoch(0))
    loss, by_token = CausalLoss()(Own(), batch, 7)
    wanted, tokens = CausalLoss()(model, batch, 7)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(by_token, tokens)
    assert by_token.shape == batch["input_ids"].shape
