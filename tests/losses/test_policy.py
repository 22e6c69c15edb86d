"""Losses of sampled completions and their gradients, against loops over tokens in sixty digits."""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.losses import (
    AGGREGATIONS,
    aggregate,
    aggregation_count,
    clipped,
    grpo_loss,
    log_ratios,
    policy_token_losses,
    ppo_loss,
    value_loss,
)

SEEDS = st.integers(0, 10_000)
LONGEST = 6  # max_length for dr_grpo


def batch(seed: int) -> dict[str, Tensor]:
    """Completions in float64, some without a token, with NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 1 + seed % 3, 1 + seed % 5
    made = {
        name: torch.randn(rows, length, generator=generator, dtype=torch.float64) * size
        for name, size in (("new", 1.0), ("old", 0.3), ("ref", 1.0), ("token_gain", 1.0))
    }
    made["old"] = made["new"] + made["old"]
    made["mask"] = torch.rand(rows, length, generator=generator) < (0.0, 0.6, 1.0)[seed % 3]
    for name in ("new", "old", "ref"):
        made[name] = made[name].masked_fill(~made["mask"], math.nan)
    made["gain"] = torch.randn(rows, generator=generator, dtype=torch.float64)
    made["gain"][seed % rows] *= seed % 2  # an advantage of 0
    return made


def tokens(made: dict[str, Tensor]) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in made["mask"]]


def direct(
    made: dict[str, Tensor],
    gain: Callable[[int, int], Decimal],
    low: float,
    high: float,
    kl: tuple[float, str],
    how: str,
    ratio: str,
) -> tuple[Callable[[Sequence[Decimal]], Decimal], list[float]]:
    """The loss as a function of the kept tokens' log-probabilities, and where it is taken."""
    kept = tokens(made)
    places = [(n, t) for n, row in enumerate(kept) for t in row]

    def loss(x: Sequence[Decimal]) -> Decimal:
        logp = dict(zip(places, x, strict=True))
        sums = []
        for n, row in enumerate(kept):
            log_rho = [logp[n, t] - Decimal(float(made["old"][n, t])) for t in row]
            if ratio == "sequence" and row:
                log_rho = [sum(log_rho, Decimal(0)) / len(row)] * len(row)
            total = Decimal(0)
            for t, d in zip(row, log_rho, strict=True):
                rho, a = d.exp(), gain(n, t)
                bounded = min(max(rho, 1 - Decimal(low)), 1 + Decimal(high))
                x_ref = logp[n, t] - Decimal(float(made["ref"][n, t]))
                k = {"k1": x_ref, "k2": x_ref**2 / 2, "k3": (-x_ref).exp() - 1 + x_ref}[kl[1]]
                total += -min(rho * a, bounded * a) + Decimal(kl[0]) * k
            sums.append((total, len(row)))
        rows = [(total, count) for total, count in sums if count]
        if not rows:
            return Decimal(0)
        whole, count = sum((s for s, _ in rows), Decimal(0)), sum(c for _, c in rows)
        if how == "grpo":
            return sum((s / c for s, c in rows), Decimal(0)) / len(rows)
        return whole / (len(rows) * LONGEST) if how == "dr_grpo" else whole / count

    return loss, [float(made["new"][n, t]) for n, t in places]


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@given(
    seed=SEEDS,
    bounds=st.sampled_from([(0.2, None), (0.2, 0.28), (0.0, 0.0), (1.0, 3.0)]),
    kl=st.tuples(st.sampled_from([0.0, 0.04]), st.sampled_from(["k1", "k2", "k3"])),
)
def test_grpo(
    precise: Any, seed: int, how: Any, ratio: Any, bounds: Any, kl: tuple[float, Any]
) -> None:
    made = batch(seed)
    low, high = bounds[0], bounds[0] if bounds[1] is None else bounds[1]

    def gain(n: int, t: int) -> Decimal:
        return Decimal(float(made["gain"][n]))

    formula, at = direct(made, gain, low, high, kl, how, ratio)
    new = made["new"].clone().requires_grad_()
    found = grpo_loss(
        new,
        made["old"],
        made["gain"],
        made["mask"],
        made["ref"],
        *bounds,
        *kl,
        aggregation=how,
        max_length=LONGEST,
        ratio=ratio,
    )
    truth = float(formula([Decimal(x) for x in at]))
    assert found.item() == pytest.approx(truth, rel=1e-11, abs=1e-12)
    (slope,) = torch.autograd.grad(found, new)
    torch.testing.assert_close(
        slope[made["mask"]].tolist(), precise.gradient(formula, at), rtol=1e-10, atol=1e-12
    )
    assert not slope[~made["mask"]].any()


@given(seed=SEEDS, clip=st.sampled_from([0.1, 0.2]))
def test_ppo(precise: Any, seed: int, clip: float) -> None:
    made = batch(seed)

    def gain(n: int, t: int) -> Decimal:
        return Decimal(float(made["token_gain"][n, t]))

    formula, at = direct(made, gain, clip, clip, (0.0, "k1"), "dapo", "token")
    new = made["new"].clone().requires_grad_()
    found = ppo_loss(new, made["old"], made["token_gain"], made["mask"], clip)
    truth = float(formula([Decimal(x) for x in at]))
    assert found.item() == pytest.approx(truth, rel=1e-11, abs=1e-12)
    (slope,) = torch.autograd.grad(found, new)
    torch.testing.assert_close(
        slope[made["mask"]].tolist(), precise.gradient(formula, at), rtol=1e-10, atol=1e-12
    )


@given(seed=SEEDS, clip=st.sampled_from([None, 0.2, 3.0]))
def test_value_loss(precise: Any, seed: int, clip: float | None) -> None:
    made = batch(seed)
    places = [(n, t) for n, row in enumerate(tokens(made)) for t in row]

    def formula(x: Sequence[Decimal]) -> Decimal:
        total = Decimal(0)
        for (n, t), v in zip(places, x, strict=True):
            old, aim = Decimal(float(made["old"][n, t])), Decimal(float(made["ref"][n, t]))
            squares = [(v - aim) ** 2]
            if clip is not None:
                c = Decimal(clip)
                squares.append((old + min(max(v - old, -c), c) - aim) ** 2)
            total += max(squares) / 2
        return total / max(len(places), 1)

    at = [float(made["new"][n, t]) for n, t in places]
    new = made["new"].clone().requires_grad_()
    found = value_loss(new, made["old"], made["ref"], made["mask"], clip)
    truth = float(formula([Decimal(x) for x in at]))
    assert found.item() == pytest.approx(truth, rel=1e-11, abs=1e-12)
    (slope,) = torch.autograd.grad(found, new)
    # inside the clip both squares are the same, and so is their slope
    torch.testing.assert_close(
        slope[made["mask"]].tolist(), precise.gradient(formula, at), rtol=1e-10, atol=1e-12
    )


@given(seed=SEEDS)
def test_the_policy_that_sampled_has_the_plain_policy_gradient(seed: int) -> None:
    made = batch(seed)
    new = made["new"].clone().requires_grad_()
    plain = -(made["gain"].unsqueeze(1) * torch.where(made["mask"], new, 0.0)).sum()
    (truth,) = torch.autograd.grad(plain / made["mask"].sum().clamp(min=1), new)
    for old in (None, new.detach()):
        loss = grpo_loss(new, old, made["gain"], made["mask"])
        (slope,) = torch.autograd.grad(loss, new)
        torch.testing.assert_close(slope, truth, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_stands_in_the_padding_does_not_matter(ratio: Any) -> None:
    mask = torch.tensor([[True, True, False, False]])
    kept = {"new": [-1.0, -2.0], "old": [-1.1, -1.9], "ref": [-1.3, -2.1]}
    found = []
    for padding in ([0.0, 0.0], [math.nan, math.inf], [-1e6, -math.inf], [1e6, math.nan]):
        x = {
            name: torch.tensor([row + (padding if name == "new" else padding[::-1])])
            for name, row in kept.items()
        }
        new = x["new"].requires_grad_()
        for gain in (1.0, -1.0):
            loss = grpo_loss(
                new, x["old"], torch.tensor([gain]), mask, x["ref"], kl_coef=0.1, ratio=ratio
            )
            (slope,) = torch.autograd.grad(loss, new)
            found.append((loss.item(), slope[0, :2].tolist()))
            assert not slope[0, 2:].any()
    assert all(other == first for first, other in zip(found[:2] * 3, found[2:], strict=True))


def test_only_the_policy_has_a_gradient() -> None:
    x = [torch.randn(2, 3, requires_grad=True) for _ in range(3)]
    gain = torch.randn(2, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = grpo_loss(x[0], x[1], gain, mask, x[2], kl_coef=0.1)
    found = torch.autograd.grad(loss, [*x, gain], allow_unused=True)
    assert [slope is not None for slope in found] == [True, False, False, False]
    loss = ppo_loss(x[0], x[1], x[2], mask) + value_loss(x[0], x[1], x[2], mask)
    found = torch.autograd.grad(loss, x, allow_unused=True)
    assert [slope is not None for slope in found] == [True, False, False]


def test_advantages_that_sum_to_zero_give_a_value_of_zero_and_a_gradient() -> None:
    new = torch.randn(4, 3, requires_grad=True)
    gain = torch.tensor([1.0, -1.0, 0.5, -0.5])
    loss = grpo_loss(new, None, gain, torch.ones(4, 3, dtype=torch.bool))
    assert loss.item() == 0
    (slope,) = torch.autograd.grad(loss, new)
    assert slope.tolist() == [[pytest.approx(-float(g) / 12)] * 3 for g in gain]


@pytest.mark.parametrize("how", AGGREGATIONS)
@given(seed=SEEDS)
def test_a_step_may_be_cut_anywhere(how: Any, seed: int) -> None:
    made = batch(3 * seed + 1)  # with masked tokens
    losses, mask = made["token_gain"], made["mask"]
    parts = [(losses[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
    count = sum(aggregation_count(m, how) for _, m in parts)
    summed = sum(
        aggregate(x, m, how, max_length=LONGEST, normalizer=count).item() for x, m in parts
    )
    whole = aggregate(losses, mask, how, max_length=LONGEST).item()
    if how == "bnpo":  # the mean of the batches' means, by definition
        means = [x[m].mean().item() for x, m in parts if m.any()]
        whole = math.fsum(means) / max(len(means), 1)
    assert summed == pytest.approx(whole, rel=1e-12, abs=1e-14)
    assert count == {
        "dapo": int(mask.sum()),
        "bnpo": int(mask.any(1).sum()),
    }.get(how, int(mask.any(1).sum()))


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_no_token_is_a_loss_of_zero_without_gradient(how: Any) -> None:
    new = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = grpo_loss(new, new, torch.ones(2), mask, new, kl_coef=0.1, aggregation=how, max_length=3)
    assert loss.item() == 0
    loss.backward()
    assert new.grad is not None
    assert not new.grad.any()


def test_clipping_is_on_the_side_the_advantage_pulls_to() -> None:
    log_rho = torch.tensor([[1.3, 1.27, 0.79, 0.81, 1.3, 0.79]]).log()
    gain = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0, 1.0]])
    assert clipped(log_rho, gain, 0.2, 0.28).tolist() == [[True, False, True, False, False, False]]
    assert clipped(log_rho, gain)[0, 1]  # 0.2 on both sides
    assert not clipped(log_rho, 0 * gain).any()
    assert not clipped(torch.tensor([[-800.0]]), -torch.ones(1, 1), 1.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clipped_overflow_is_harmless_and_another_is_refused(dtype: torch.dtype) -> None:
    new = torch.tensor([[0.0, -1.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-1e4, -1.0]], dtype=dtype)
    mask = torch.ones(1, 2, dtype=torch.bool)
    losses = policy_token_losses(new, old, torch.ones(1, dtype=dtype), mask)
    assert losses.tolist() == [[pytest.approx(-1.2), -1.0]]
    (slope,) = torch.autograd.grad(losses.sum(), new)
    assert slope.tolist() == [[0.0, -1.0]]
    quiet = policy_token_losses(new, old, torch.zeros(1, dtype=dtype), mask)
    assert not quiet.any()
    (slope,) = torch.autograd.grad(quiet.sum(), new)
    assert not slope.any()
    with pytest.raises(ValueError, match=r"loss of completion 0, token 0 is infinite: .* by 10000"):
        policy_token_losses(new, old, -torch.ones(1, dtype=dtype), mask)
    with pytest.raises(
        ValueError, match=r"loss of completion 0, token 0 is infinite: .* by -10000"
    ):
        grpo_loss(old, None, torch.ones(1), mask, new, kl_coef=0.1)


def test_16_bits_are_computed_in_float32() -> None:
    made = {k: v.nan_to_num() for k, v in batch(8).items()}
    narrow = [made[k].bfloat16() for k in ("new", "old")]
    found = grpo_loss(*narrow, made["gain"], made["mask"])
    assert found.dtype is torch.float32
    assert found == grpo_loss(*(x.float() for x in narrow), made["gain"], made["mask"])


def test_what_is_refused() -> None:
    x, gain, mask = torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"clip_low must be in \[0, 1\].*; got 1.5"):
        grpo_loss(x, x, gain, mask, clip_low=1.5)
    with pytest.raises(ValueError, match=r"clip_high must be 0 or more; got -0.1"):
        grpo_loss(x, x, gain, mask, clip_high=-0.1)
    with pytest.raises(ValueError, match=r"kl_coef must be 0 or more; got -0.1"):
        grpo_loss(x, x, gain, mask, kl_coef=-0.1)
    with pytest.raises(ValueError, match=r"kl_coef is 0.1, which needs ref_log_probs; got none"):
        grpo_loss(x, x, gain, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"advantages must be \(N,\), one a completion"):
        grpo_loss(x, x, x, mask)
    with pytest.raises(ValueError, match=r"advantages must be \(N,\) = \(2,\) or \(N, L\)"):
        policy_token_losses(x, x, gain[:1], mask)
    with pytest.raises(TypeError, match=r"advantages must be of floating dtype; got torch.bool"):
        policy_token_losses(x, x, gain > 0, mask)
    with pytest.raises(ValueError, match=r"advantages must be \(N, L\) = \(2, 3\), one a token"):
        ppo_loss(x, x, gain, mask)
    with pytest.raises(ValueError, match=r"aggregation must be one of dapo, .*; got 'mean'"):
        grpo_loss(x, x, gain, mask, aggregation="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"aggregation must be one of dapo, .*; got 'mean'"):
        aggregation_count(mask, "mean")  # type: ignore[arg-type]
    for length in (None, 2):
        with pytest.raises(ValueError, match=f"give it, at least 3 for this batch; got {length}"):
            grpo_loss(x, x, gain, mask, aggregation="dr_grpo", max_length=length)
    with pytest.raises(ValueError, match="normalizer is a count, 0 or more; got -1"):
        grpo_loss(x, x, gain, mask, normalizer=-1)
    with pytest.raises(ValueError, match=r'ratio must be "token" or "sequence"; got \'word\''):
        log_ratios(x, x, mask, "word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"old_log_probs must have the shape of log_probs"):
        grpo_loss(x, x[:1], gain, mask)
    with pytest.raises(TypeError, match=r"mask must be bool; got torch.float32"):
        grpo_loss(x, x, gain, mask.float())
    with pytest.raises(ValueError, match="clip must be a number above 0; got 0"):
        value_loss(x, x, x, mask, clip=0.0)
