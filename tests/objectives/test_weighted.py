"""Reward-weighted likelihood: against plain float64 arithmetic, whatever the cut; bad rewards."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.objectives.weighted import (
    WeightedLoss,
    effective_rows,
    read_row_rewards,
    reward_weights,
    weighted_batch,
)

REWARDS = st.lists(st.floats(-50, 50), min_size=1, max_size=20)


def rows() -> list[dict[str, Any]]:
    """Six rows of other lengths: some tokens graded, in one none at all before the last."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate((4, 9, 6, 3, 12, 2)):
        ids = torch.randint(1, 40, (length,), generator=draw).tolist()
        graded = torch.rand(length, generator=draw) < 0.6
        graded[-1], graded[0] = True, False
        labels = [i if keep else -100 for i, keep in zip(ids, graded.tolist(), strict=True)]
        made.append({"input_ids": ids, "labels": labels, "weight": 0.25 + 0.5 * number})
    return made


def by_hand(model: nn.Module, some: list[dict[str, Any]], tokens: int) -> torch.Tensor:
    """The loss in float64, a row and a token at a time, by the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for row in some:
        ids = torch.tensor([row["input_ids"]])
        log_probs = model(ids).logits[0].double().log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if place and label != -100:
                total = total - row["weight"] * log_probs[place - 1, label]
    return total / tokens


def gradients(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([grad.flatten().double() for grad in found])


@pytest.mark.parametrize("cut", [[6], [1, 5], [2, 2, 2], [1] * 6])
def test_the_loss_is_its_definition_however_the_step_is_cut(
    cut: list[int], small_decoder: Callable[..., nn.Module]
) -> None:
    model, every, loss = small_decoder(), rows(), WeightedLoss()
    tokens = sum(label != -100 for row in every for label in row["labels"][1:])
    wanted = by_hand(model, every, tokens)
    chunks = [every[sum(cut[:i]) : sum(cut[: i + 1])] for i in range(len(cut))]
    batches = [weighted_batch(chunk, pad_id=3) for chunk in chunks]
    counted = sum(loss.count(batch) for batch in batches)
    assert counted == tokens
    results = [loss(model, batch, counted) for batch in batches]
    value = torch.stack([result.value for result in results]).sum()
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    ours, theirs = gradients(model, value), gradients(model, wanted)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    figures = [result.figures for result in results]
    nll = sum(float(figure["nll"][0]) for figure in figures)
    unweighted = by_hand(model, [row | {"weight": 1.0} for row in every], 1)
    assert nll == pytest.approx(float(unweighted.detach()), rel=1e-5)
    assert sum(figure["nll"][1] for figure in figures) == tokens
    assert sum(float(figure["weight"][0]) for figure in figures) == sum(r["weight"] for r in every)


def test_a_row_of_weight_0_teaches_nothing(small_decoder: Callable[..., nn.Module]) -> None:
    model, every, loss = small_decoder(), rows(), WeightedLoss()
    every[1]["weight"] = 0.0
    whole = loss(model, weighted_batch(every), 10).value.detach()
    without = loss(model, weighted_batch([*every[:1], *every[2:]]), 10).value.detach()
    assert float(whole) == pytest.approx(float(without), rel=1e-6)


@given(REWARDS, st.floats(0.1, 10))
def test_weights_are_exponentials_with_the_mean_1(rewards: list[float], beta: float) -> None:
    weights = reward_weights(rewards, "exp", beta)
    assert sum(weights) / len(weights) == pytest.approx(1)
    best = weights[rewards.index(max(rewards))]
    for reward, weight in zip(rewards, weights, strict=True):
        wanted = math.exp((reward - max(rewards)) / beta)
        assert weight / best == pytest.approx(wanted, rel=1e-9)
    assert effective_rows(weights) * (1 + 1e-9) >= 1
    assert effective_rows(weights) <= len(rewards) * (1 + 1e-9)


@given(REWARDS, st.floats(-20, 20))
def test_a_constant_in_all_rewards_changes_nothing(rewards: list[float], more: float) -> None:
    moved = reward_weights([reward + more for reward in rewards], "exp", 2.0)
    assert moved == pytest.approx(reward_weights(rewards, "exp", 2.0), rel=1e-6, abs=1e-12)


def test_weights_by_the_reward_itself() -> None:
    assert reward_weights([0.0, 1.0, 3.0, 4.0], "reward") == [0.0, 0.5, 1.5, 2.0]
    assert effective_rows([1.0, 1.0, 1.0]) == 3
    assert effective_rows([3.0, 0.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("rewards", "kind", "said"),
    [
        ([], "exp", "no rewards: weights need a row"),
        ([1.0, -0.5], "reward", "the least is -0.5: choose --weights exp"),
        ([0.0, 0.0], "reward", "every reward is 0, so that every weight is"),
    ],
)
def test_rewards_that_make_no_weights(rewards: list[float], kind: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reward_weights(rewards, kind)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"reward": math.nan}, "2: reward must be a finite number; got nan"),
        ({"reward": -math.inf}, "2: reward must be a finite number; got -inf"),
        ({"reward": "0.5"}, "2: reward must be a finite number; got '0.5'"),
        ({"reward": None}, "2: reward must be a finite number; got None"),
        ({"reward": True}, "2: reward must be a finite number; got True"),
        ({}, r"2: no reward; keys are \['completion', 'prompt'\]"),
    ],
)
def test_a_bad_reward_is_named(held: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b", "reward": -2}
    path = tmp_path / "rows.jsonl"
    rows = [good, {"prompt": "a", "completion": "b", **held}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:{said}"):
        read_row_rewards(str(path))


def test_rewards_by_place_and_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b", "score": 2}\n\n{"text": "x", "score": -1}\n'
    )
    found = read_row_rewards(str(path), {"reward": "score"})
    assert found == {f"{path}:1": 2.0, f"{path}:3": -1.0}
