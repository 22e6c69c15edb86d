"""Advantages against plain Python, and what is exact at their edges."""

import math
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.losses import gae, group_advantages, rloo_advantages, whiten

REWARDS = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0, 0.1, 1e6, math.nan]))
SEEDS = st.integers(0, 10_000)


@st.composite
def grouped(draw: Any) -> tuple[list[float], int]:
    size, groups = draw(st.integers(2, 5)), draw(st.integers(0, 4))
    count = size * groups
    return draw(st.lists(REWARDS, min_size=count, max_size=count)), size


def direct(rewards: list[float], size: int, scale: str, eps: float) -> list[float]:
    """Group by group, with Python's own mean and deviation (exact fractions inside)."""
    known = [r for r in rewards if not math.isnan(r)]
    found = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        valid = [r for r in group if not math.isnan(r)]
        across = {"group": valid, "batch": known, "none": [0.0, 0.0]}[scale]
        for r in group:
            if math.isnan(r) or len(valid) < 2 or len(set(valid)) == 1:
                found.append(0.0)
            else:
                divisor = 1.0 if scale == "none" else stdev(across) + eps
                found.append((r - mean(valid)) / divisor)
    return found


@given(grouped(), st.sampled_from(["group", "batch", "none"]), st.sampled_from([1e-4, 0.0]))
def test_group_advantages(case: tuple[list[float], int], scale: Any, eps: float) -> None:
    rewards, size = case
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), size, scale, eps)
    truth = direct(rewards, size, scale, eps)
    # rewards of 1e6 beside others of 1e-6 leave nine digits of a difference
    torch.testing.assert_close(found.tolist(), truth, rtol=1e-7, atol=1e-7)
    narrow = group_advantages(torch.tensor(rewards), size, scale, eps)
    assert narrow.dtype is torch.float32
    assert narrow.isfinite().all()


@given(grouped())
def test_rloo_advantages_are_against_the_others_and_sum_to_zero(
    case: tuple[list[float], int],
) -> None:
    rewards, size = case
    found = rloo_advantages(torch.tensor(rewards, dtype=torch.float64), size)
    truth = []
    for i, r in enumerate(rewards):
        start = i - i % size
        others = [rewards[j] for j in range(start, start + size) if j != i]
        others = [x for x in others if not math.isnan(x)]
        truth.append(0.0 if math.isnan(r) or not others else r - mean(others))
    torch.testing.assert_close(found.tolist(), truth, rtol=1e-9, atol=1e-9)
    sums = found.view(-1, size).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@given(reward=st.floats(-1e6, 1e6), size=st.integers(2, 9), unknown=st.booleans())
def test_equal_rewards_give_exactly_zero(
    dtype: torch.dtype, reward: float, size: int, unknown: bool
) -> None:
    rewards = torch.full((2 * size,), reward, dtype=dtype)
    if unknown:
        rewards[0] = math.nan
    for scale in ("group", "batch", "none"):
        for eps in (0.0, 1e-4):
            assert not group_advantages(rewards, size, scale, eps).any()  # type: ignore[arg-type]
    assert not rloo_advantages(rewards, size).any()


def test_a_reward_that_is_not_known_leaves_the_others_of_its_group_as_without_it() -> None:
    rewards = torch.tensor([1.0, math.nan, 0.0, 3.0, 5.0, 5.0, math.nan, math.nan, 2.0])
    found = group_advantages(rewards, 3, "none")
    assert found.tolist() == [
        0.5,
        0.0,
        -0.5,
        pytest.approx(-4 / 3),
        *[pytest.approx(2 / 3)] * 2,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("function", [group_advantages, rloo_advantages])
def test_groups_that_say_nothing_are_refused(function: Any) -> None:
    rewards = torch.zeros(6)
    for size in (1, 0, -2):
        with pytest.raises(ValueError, match=f"it needs 2 completions or more; got {size}"):
            function(rewards, size)
    with pytest.raises(ValueError, match="6 rewards do not divide into groups of 4"):
        function(rewards, 4)
    with pytest.raises(ValueError, match="reward 2 is -inf: give a finite number, or NaN"):
        function(torch.tensor([0, 0, -math.inf, 0.0]), 2)
    with pytest.raises(ValueError, match=r"rewards must be \(B,\)"):
        function(rewards.view(2, 3), 3)
    with pytest.raises(TypeError, match=r"floating dtype; got torch.int64"):
        function(torch.zeros(6, dtype=torch.int64), 3)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r'scale must be "group", "batch" or "none"; got \'all\''):
        group_advantages(torch.zeros(4), 2, "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps must be 0 or more; got -1"):
        group_advantages(torch.zeros(4), 2, eps=-1.0)
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]; got 1.1"):
        gae(x, x, mask, gamma=1.1)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]; got nan"):
        gae(x, x, mask, lam=math.nan)
    with pytest.raises(TypeError, match=r"mask must be bool; got torch.float32"):
        gae(x, x, x)
    with pytest.raises(ValueError, match=r"mask must be \(N, L\) = \(2, 3\); got \(3,\)"):
        whiten(x, mask[0])


def steps(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes and empty rows; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 1 + seed % 3, 1 + seed % 7
    rewards, values = (
        torch.randn(rows, length, generator=generator, dtype=dtype) for _ in range(2)
    )
    mask = torch.rand(rows, length, generator=generator) < (seed % 4) / 3
    return rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan), mask


@given(SEEDS, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_the_sum_over_later_steps(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = steps(seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for n in range(len(mask)):
        kept = mask[n].nonzero().flatten().tolist()
        r = [float(rewards[n, t]) for t in kept]
        v = [float(values[n, t]) for t in kept] + [0.0]
        for i, t in enumerate(kept):
            deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(i, len(kept))]
            truth = math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas))
            assert float(advantages[n, t]) == pytest.approx(truth, rel=1e-12, abs=1e-12)
            assert float(returns[n, t]) == pytest.approx(truth + v[i], rel=1e-12, abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@given(SEEDS)
def test_gae_without_discount_is_the_rewards_to_come_minus_the_value(seed: int) -> None:
    rewards, values, mask = steps(seed)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.nan_to_num().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[mask], to_come[mask])
    torch.testing.assert_close(advantages[mask], (to_come - values)[mask])


@given(SEEDS, st.booleans())
def test_whiten(seed: int, shift: bool) -> None:
    _, x, mask = steps(seed)
    found = whiten(x, mask, shift)
    kept = x[mask].tolist()
    assert not found[~mask].any()
    if len(kept) < 2:
        assert found[mask].tolist() == ([0.0] * len(kept) if shift else kept)
        return
    middle, spread = mean(kept), math.sqrt(stdev(kept) ** 2 + 1e-8)
    truth = [(v - middle) / spread + (0 if shift else middle) for v in kept]
    torch.testing.assert_close(found[mask].tolist(), truth, rtol=1e-10, atol=1e-10)


def test_whitening_equal_numbers_gives_exactly_zero() -> None:
    x, mask = torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)
    assert not whiten(x, mask).any()
    assert whiten(x[:0], mask[:0]).shape == (0, 3)


def test_nothing_is_differentiated_through() -> None:
    x = torch.randn(2, 2, requires_grad=True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert not any(found.requires_grad for found in gae(x, x, mask))
    assert not group_advantages(x.flatten(), 2).requires_grad
    assert not rloo_advantages(x.flatten(), 2).requires_grad
