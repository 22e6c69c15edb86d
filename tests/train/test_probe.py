"""The largest batch first: which it is, that nothing of it stays, what is said where it fails."""

import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.train import CausalLoss, TrainConfig, probe, train
from lora_core.train.batches import make_batches
from lora_core.train.probe import advice, probe_due, run_longest, state_to_come

Make = Callable[..., Any]


def config(**kwargs: Any) -> TrainConfig:
    usual = {"batch_size": 2, "accumulate": 3, "epochs": 2, "lr": 1e-2, "progress": False}
    return TrainConfig(**(usual | kwargs))


def rows_of(lengths: list[int]) -> list[dict[str, list[int]]]:
    return [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)]


HOW = st.sampled_from(
    [{}, {"by_length": True}, {"few_lengths": True}, {"packing": 12}, {"packing": 40}]
)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 5), HOW, st.integers(0, 9)
)
def test_no_batch_of_any_epoch_is_larger(
    lengths: list[int], size: int, how: dict[str, Any], seed: int
) -> None:
    source = make_batches(rows_of(lengths), size, seed, **how)
    largest = source.largest()
    assert largest is not None
    rows, tokens = largest[0]["input_ids"].shape
    for epoch in range(3):
        for batch in source.epoch(epoch):
            other = batch["input_ids"].shape
            assert other[0] <= rows
            assert other[1] <= tokens
    assert f"{tokens} tokens x {rows} " in largest[1]


def test_the_size_in_words() -> None:
    rows = rows_of([3, 9, 5, 8])
    for how, wanted in [
        ({}, "row 1: 9 tokens x 3 rows"),
        ({"few_lengths": True}, "row 1: 32 tokens x 3 rows"),
        ({"packing": 13}, "row 3 and others: 13 tokens x 2 packed rows"),
    ]:
        largest = make_batches(rows, 3, None, **how).largest()
        assert largest is not None
        assert largest[1] == wanted


class Shapes(CausalLoss):
    """The usual loss; keeps the shapes it saw, and draws from every generator."""

    seen: list[tuple[int, ...]]

    def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> Any:
        self.seen.append(tuple(batch["input_ids"].shape))
        loss, rows = super().__call__(model, batch, normalizer)
        return loss * (1 + random.random() + np.random.rand() + torch.rand(())), rows


def recorded() -> Shapes:
    loss = Shapes()
    object.__setattr__(loss, "seen", [])
    return loss


@pytest.mark.parametrize("how", [{}, {"group_by_length": True}])
def test_a_run_with_a_probe_is_bit_equal(
    tiny: Make, make_rows: Make, without_times: Make, how: dict[str, Any]
) -> None:
    rows = make_rows(count=13)
    outcomes = []
    for on in (False, True):
        model, loss = tiny(dropout=0.3), recorded()
        result = train(model, rows, config(probe=on, **how), loss=loss)
        outcomes.append((without_times(result.history), model.state_dict(), loss.seen))
    (plain, weights, shapes), (probed, others, more) = outcomes
    assert plain == probed
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    assert more[1:] == shapes
    assert more[0] == (2, max(len(row["input_ids"]) for row in rows))


def test_lora_dropout_is_what_it_is_without_a_probe(
    small_decoder: Make, make_rows: Make, without_times: Make
) -> None:
    outcomes = []
    for on in (False, True):
        torch.manual_seed(1)
        model = small_decoder()
        model.init_weights(0.3)
        add_adapter(model, LoRAConfig(r=4, dropout=0.3))
        result = train(model, make_rows(), config(probe=on, packing=16))
        outcomes.append((without_times(result.history), model.state_dict()))
    (plain, weights), (probed, others) = outcomes
    assert plain == probed
    assert all(torch.equal(weights[k], others[k]) for k in weights)


def test_packed_rows_are_probed(small_decoder: Make, make_rows: Make) -> None:
    loss = recorded()
    model = small_decoder()
    model.init_weights()
    train(model, make_rows(), config(probe=True, packing=16, steps=1), loss=loss)
    assert loss.seen[0] == max(loss.seen)


def test_without_a_largest_batch_that_is_said(tiny: Make, make_rows: Make, capfd: Any) -> None:
    from lora_core.data import collate

    said = "no probe: of batches that are made elsewhere the largest is not known\n"
    rows, loss = make_rows(), recorded()
    train(tiny(), [collate(rows[:2])] * 3, config(probe=True, steps=1), loss=loss)
    assert len(loss.seen) == 3
    assert capfd.readouterr().err.count(said) == 1
    pairs = [(row["input_ids"], row["labels"]) for row in rows]

    def of_pairs(some: Any) -> Any:
        return collate([{"input_ids": ids, "labels": labels} for ids, labels in some])

    train(tiny(), pairs, config(probe=True, steps=1), collate=of_pairs)
    assert capfd.readouterr().err.count(said) == 1
    loss = recorded()
    train(tiny(), rows, config(probe=True, steps=1), collate=collate, loss=loss)  # known rows
    assert loss.seen[0] == (2, max(len(row["input_ids"]) for row in rows))


def test_too_little_memory_is_one_line(tiny: Make, make_rows: Make) -> None:
    rows = make_rows()
    longest = max(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    tokens = len(rows[longest]["input_ids"])

    class Full(CausalLoss):
        def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> Any:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …"
            )

    with pytest.raises(ValueError, match="does not fit") as caught:
        train(tiny(), rows, config(probe=True), loss=Full())
    assert str(caught.value) == (
        f"the longest batch (row {longest}: {tokens} tokens x 2 rows) does not fit: CUDA out of "
        f"memory. Tried to allocate 2 GiB.; {advice(config())}"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^step 1: CUDA out of memory\. Tried .* 2 GiB\.; lower"):
        train(tiny(), rows, config(probe=False), loss=Full())


def test_generators_are_put_back_after_an_error(make_rows: Make) -> None:
    source = make_batches(make_rows(), 2, 0)

    def run(batch: Any) -> None:
        torch.rand(3)
        random.random()
        np.random.rand()
        raise KeyboardInterrupt

    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    with pytest.raises(KeyboardInterrupt):
        run_longest(source, run, config())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_advice_names_only_what_is_not_on_already() -> None:
    base = "load the base in 4 bits (quantize, or method qlora) if it is not"
    assert advice(config(batch_size=4)) == (
        "lower batch_size (4) and raise accumulate by as much; or set activation_checkpointing; "
        f"or lower max_length; or set optimizer to adamw8bit; or {base}"
    )
    checkpointed = {"batch_size": 1, "activation_checkpointing": True, "optimizer": "adamw8bit"}
    assert advice(config(**checkpointed)) == (
        f"set offload_activations; or lower max_length; or {base}"
    )
    assert advice(config(**checkpointed, offload_activations=True, packing=512)) == (
        f"lower max_length and packing (512); or {base}"
    )


def test_the_optimizers_memory_is_set_aside(tiny: Make) -> None:
    model = tiny()
    count = sum(p.numel() for p in model.parameters())
    for optimizer, each in {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "adamw-paged": 0.0}.items():
        held = state_to_come(config(optimizer=optimizer), model.parameters())
        assert sum(t.nbytes for t in held) == pytest.approx(count * each, abs=len(held))
        assert {t.device for t in held} == {torch.device("cpu")}


def test_it_is_held_while_the_batch_runs(make_rows: Make, monkeypatch: Any) -> None:
    class Held(list[Any]):
        pass

    made: list[Any] = []
    alive: list[bool] = []

    def hold(config: TrainConfig, parameters: Any) -> Held:
        held = Held(parameters)
        made.append(weakref.ref(held))
        return held

    monkeypatch.setattr(probe, "state_to_come", hold)
    source = make_batches(make_rows(), 2, 0)
    run_longest(source, lambda batch: alive.append(made[0]() is not None), config(), [])
    assert alive == [True]
    assert made[0]() is None  # and no longer


def test_a_probe_is_for_gpus_unless_asked_for() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [probe_due(config(), device) for device in (cpu, gpu)] == [False, True]
    assert [probe_due(config(probe=on), cpu) for on in (True, False)] == [True, False]
    assert not probe_due(config(probe=False), gpu)
