"""Losses on preferences at the edges: certain completions, no rows, and what is refused."""

import decimal
import math
from collections.abc import Callable
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    log1mexp,
    orpo_loss,
    reward_loss,
    robust_dpo_loss,
    simpo_loss,
)

Z = torch.zeros(3)
GOOD = torch.tensor([True, False, True])
WITH_REFERENCE: list[Callable[..., Tensor]] = [dpo_loss, robust_dpo_loss, hinge_loss, ipo_loss]
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo_loss": lambda x, **o: dpo_loss(x, x, x, x, **o),
    "robust_dpo_loss": lambda x, **o: robust_dpo_loss(x, x, x, x, **o),
    "hinge_loss": lambda x, **o: hinge_loss(x, x, x, x, **o),
    "ipo_loss": lambda x, **o: ipo_loss(x, x, x, x, **o),
    "simpo_loss": lambda x, **o: simpo_loss(x, x, **o),
    "orpo_loss": lambda x, **o: orpo_loss(x - 1, x - 1, x, **o),
    "kto_loss": lambda x, **o: kto_loss(x, x, x > 0, 0.0, **o),
    "reward_loss": lambda x, **o: reward_loss(x, x, x, **o),
}


@given(st.one_of(st.floats(-800, -1e-300), st.sampled_from([-1e-12, -math.log(2), -40.0, -1e4])))
def test_log1mexp_is_exact_on_both_sides_of_its_border(x: float) -> None:
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = log1mexp(at)
    # 1 - e^x has to be other than 1 and than 0, so the digits are as many as the number is small
    with decimal.localcontext() as context:
        context.prec = 720
        d = Decimal(x)
        truth = float((1 - d.exp()).ln()) if x > -750 else 0.0
        slope = float(-d.exp() / (1 - d.exp()))
    assert found.item() == pytest.approx(truth, rel=4e-16, abs=1e-300)
    (derivative,) = torch.autograd.grad(found, at)
    assert derivative.item() == pytest.approx(slope, rel=1e-14, abs=1e-300)


def test_log1mexp_at_its_ends() -> None:
    ends = torch.tensor([0.0, -math.inf, -1e-30, 1.0], requires_grad=True)
    found = log1mexp(ends)
    assert found[0] == -math.inf
    assert found[1] == 0
    assert found[2].item() == pytest.approx(-30 * math.log(10))
    assert found[3].isnan()
    (slope,) = torch.autograd.grad(found[1], ends)
    assert slope[1] == 0


def test_orpo_of_certain_completions_is_finite_and_so_is_its_gradient() -> None:
    chosen = torch.tensor([0.0, -2.0, 0.0, -1e-9], requires_grad=True)
    rejected = torch.tensor([-2.0, 0.0, 0.0, -30.0], requires_grad=True)
    each = orpo_loss(chosen, rejected, torch.zeros(4), 0.5, reduction="none")
    found = torch.autograd.grad(each.sum(), (chosen, rejected))
    assert each.isfinite().all()
    assert each[2].item() == pytest.approx(0.5 * math.log(2))
    for slope in found:
        assert slope.isfinite().all()
    # a certain chosen one: the limit -beta · odds of the rejected one; a certain rejected: bounded
    assert float(found[0][0]) == pytest.approx(-0.5 / (math.exp(2) - 1), rel=1e-5)
    assert 0 < float(found[1][1]) <= 0.5 / torch.finfo(torch.float32).eps * 1.01


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_row_is_a_loss_of_zero(name: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss = LOSSES[name](empty)
    assert loss.item() == 0
    loss.backward()
    assert LOSSES[name](empty, reduction="none").shape == (0,)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_every_loss_refuses(name: str) -> None:
    loss = LOSSES[name]
    with pytest.raises(ValueError, match=r'reduction must be "mean" or "none"; got \'sum\''):
        loss(Z, reduction="sum")
    with pytest.raises(ValueError, match=r"must be \(B,\), a number a row; got \(3, 1\)"):
        loss(torch.zeros(3, 1))
    with pytest.raises(TypeError, match=r"floating dtype; got torch.int64"):
        loss(torch.zeros(3, dtype=torch.int64))
    if name != "reward_loss":
        for beta in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"beta must be a number above 0; got {beta}"):
                loss(Z, beta=beta)


@pytest.mark.parametrize("loss", WITH_REFERENCE)
def test_shapes_that_would_broadcast_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"ref_chosen must have the shape of chosen, \(3,\)"):
        loss(Z, Z, torch.zeros(1), Z)
    with pytest.raises(TypeError, match="rejected must be a tensor of floating dtype; got float"):
        loss(Z, 1.0, Z, Z)


@pytest.mark.parametrize("loss", [dpo_loss, robust_dpo_loss])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_smoothing_is_below_a_half(loss: Callable[..., Tensor], smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 0.5\).*{smoothing}"):
        loss(Z, Z, Z, Z, label_smoothing=smoothing)


def test_what_single_losses_refuse() -> None:
    with pytest.raises(ValueError, match="gamma must be 0 or more; got -1"):
        simpo_loss(Z, Z, gamma=-1.0)
    with pytest.raises(ValueError, match="rejected must hold mean log-probabilities, at most 0"):
        orpo_loss(Z - 1, Z + 0.5, Z)
    orpo_loss(Z + 1e-6, Z - 1, Z)  # what a sum's rounding makes of 0
    with pytest.raises(ValueError, match="desirable_weight must be 0 or more; got -1"):
        kto_loss(Z, Z, GOOD, 0.0, desirable_weight=-1.0)
    with pytest.raises(ValueError, match="undesirable_weight must be 0 or more; got nan"):
        kto_loss(Z, Z, GOOD, 0.0, undesirable_weight=math.nan)
    with pytest.raises(TypeError, match=r"desirable must be bool, one a row; got torch.float32"):
        kto_loss(Z, Z, Z, 0.0)
    with pytest.raises(ValueError, match=r"desirable must have the shape of log_probs, \(3,\)"):
        kto_loss(Z, Z, GOOD[:2], 0.0)
    with pytest.raises(ValueError, match=r"kl must be one number for the batch; got \(3,\)"):
        kto_loss(Z, Z, GOOD, Z)
    with pytest.raises(ValueError, match="ref_log_probs must have the shape of log_probs"):
        kto_baseline(Z, Z[:2])
