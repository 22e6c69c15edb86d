"""KL estimates against sixty digits, and the controllers of their weight."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.losses import AdaptiveKL, FixedKL, kl_estimate

GAPS = st.one_of(
    st.floats(-30, 30), st.sampled_from([0.25, -0.25, 1e-4, -1e-4, 1e-9, 1e-15, 0.0, -300.0])
)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@given(gaps=st.lists(GAPS, min_size=1, max_size=5))
def test_equals_the_definition(precise: Any, kind: Any, gaps: list[float]) -> None:
    def formula(x: Sequence[Decimal]) -> Decimal:
        (gap,) = x
        return {"k1": gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}[kind]

    policy = torch.tensor(gaps, dtype=torch.float64, requires_grad=True)
    found = kl_estimate(policy, torch.zeros_like(policy), kind)
    truth = [float(formula([Decimal(g)])) for g in gaps]
    # relative, near 0 too: k3 of 1e-15 is 5e-31
    torch.testing.assert_close(found.tolist(), truth, rtol=1e-13, atol=1e-50)
    (slope,) = torch.autograd.grad(found.sum(), policy)
    slopes = [precise.gradient(formula, [g])[0] for g in gaps]
    torch.testing.assert_close(slope.tolist(), slopes, rtol=1e-13, atol=1e-35)
    if kind == "k3":
        assert (found >= 0).all()


@given(gaps=st.lists(GAPS, min_size=1, max_size=5))
def test_k3_in_float32_is_never_negative_and_exact_to_rounding(gaps: list[float]) -> None:
    policy = torch.tensor(gaps)
    found = kl_estimate(policy, torch.zeros_like(policy))
    truth = kl_estimate(policy.double(), torch.zeros(len(gaps), dtype=torch.float64))
    assert (found >= 0).all()
    inside = truth < 3e38
    torch.testing.assert_close(found[inside].double(), truth[inside], rtol=1e-6, atol=1e-44)
    assert (found[~inside] == math.inf).all()


def test_the_expectation_of_k1_and_k3_is_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=generator).double().log_softmax(0) for _ in range(2))
    kl = float((p.exp() * (p - q)).sum())
    for kind in ("k1", "k3"):
        assert float((p.exp() * kl_estimate(p, q, kind)).sum()) == pytest.approx(kl, rel=1e-12)


def test_what_is_refused() -> None:
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r'kl must be "k1", "k2" or "k3"; got \'k4\''):
        kl_estimate(z, z, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ref_log_probs must have the shape .*\(2, 3\); got \(3"):
        kl_estimate(z, z[0])


@pytest.mark.parametrize("kl", [0.0, 3.0, 5.5, 6.0, 6.6, 7.0, 1e9])
def test_an_adaptive_weight_moves_towards_its_target_by_at_most_a_fifth(kl: float) -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000.0)
    controller.update(kl, 500)
    error = min(max((kl - 6) / 6, -0.2), 0.2)
    assert controller.coef == pytest.approx(0.1 * (1 + error * 500 / 1000), rel=1e-12)


def test_weights_never_fall_below_zero_and_stay_over_a_checkpoint() -> None:
    adaptive = AdaptiveKL(0.1, target=6.0, horizon=10.0)
    adaptive.update(0.0, 1000)
    assert adaptive.coef == 0
    fixed = FixedKL(0.3)
    fixed.update(1e9, 1000)
    assert fixed.coef == 0.3
    other = AdaptiveKL(0.7)
    other.load_state_dict(fixed.state_dict())
    assert other.coef == 0.3


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="kl_coef must be 0 or more; got -1"):
        FixedKL(-1.0)
    with pytest.raises(ValueError, match="kl_coef must be a number above 0; got 0"):
        AdaptiveKL(0.0)
    with pytest.raises(ValueError, match="kl_target must be a number above 0; got 0"):
        AdaptiveKL(0.1, target=0.0)
    with pytest.raises(ValueError, match="kl_horizon must be a number above 0; got nan"):
        AdaptiveKL(0.1, horizon=math.nan)
