"""Each loss on preferences and its gradient, against its formula in sixty digits."""

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
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)

# sums over completions, ordinary ones and such as make margins of ten thousand
SUMS = st.one_of(st.floats(-300, 0), st.sampled_from([-1e4, -2e4, 0.0, -1e-9]))
MEANS = st.one_of(st.floats(-12, -1e-3), st.sampled_from([-1e-7, -1e-12, -700.0, -math.log(2)]))
BETAS = st.sampled_from([0.01, 0.1, 1.0, 5.0])
EPSILONS = st.sampled_from([0.0, 0.1, 0.49])


def rows_of(numbers: st.SearchStrategy[float], width: int) -> Any:
    return st.lists(st.tuples(*[numbers] * width), min_size=1, max_size=4)


def check(
    loss: Callable[..., Tensor],
    formula: Callable[[Sequence[Decimal]], Decimal],
    rows: Sequence[Sequence[float]],
    gradient: Callable[..., list[float]],
) -> None:
    """Value and gradient of every row in float64, the mean, and the value in float32."""
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    leaves = [c.clone().requires_grad_() for c in columns]
    each = loss(*leaves, reduction="none")
    assert each.dtype is torch.float64
    assert each.shape == (len(rows),)
    truth = [float(formula([Decimal(x) for x in row])) for row in rows]
    # a margin of 1e4 in float64 is known to 2e-12, and the loss may be its exponential; sixty
    # digits of a number near 1 are 1e-60, divided by the step for a derivative
    torch.testing.assert_close(each.tolist(), truth, rtol=1e-10, atol=1e-50)
    mean = loss(*leaves).item()
    torch.testing.assert_close(mean, math.fsum(truth) / len(truth), rtol=1e-10, atol=1e-50)
    found = torch.autograd.grad(each.sum(), leaves)
    slopes = [gradient(formula, row) for row in rows]
    for k, column in enumerate(found):
        torch.testing.assert_close(column.tolist(), [s[k] for s in slopes], rtol=1e-10, atol=1e-35)
    narrow = loss(*(c.float() for c in columns), reduction="none")
    assert narrow.dtype is torch.float32
    assert narrow.isfinite().all()


@given(rows=rows_of(SUMS, 4), beta=BETAS, smoothing=EPSILONS)
def test_dpo(precise: Any, rows: Any, beta: float, smoothing: float) -> None:
    b, e = Decimal(beta), Decimal(smoothing)

    def formula(x: Sequence[Decimal]) -> Decimal:
        margin = b * ((x[0] - x[2]) - (x[1] - x[3]))
        right, wrong = precise.log_sigmoid(margin), precise.log_sigmoid(-margin)
        return -(1 - e) * right - e * wrong

    def loss(*tensors: Tensor, **options: Any) -> Tensor:
        return dpo_loss(*tensors, beta, smoothing, **options)

    check(loss, formula, rows, precise.gradient)


@given(rows=rows_of(st.floats(-30, 0), 4), beta=BETAS, smoothing=EPSILONS)
def test_robust_dpo(precise: Any, rows: Any, beta: float, smoothing: float) -> None:
    b, e = Decimal(beta), Decimal(smoothing)

    def formula(x: Sequence[Decimal]) -> Decimal:
        margin = b * ((x[0] - x[2]) - (x[1] - x[3]))
        right, wrong = precise.log_sigmoid(margin), precise.log_sigmoid(-margin)
        return (-(1 - e) * right + e * wrong) / (1 - 2 * e)

    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    leaves = [c.requires_grad_() for c in columns]
    each = robust_dpo_loss(*leaves, beta, smoothing, reduction="none")
    truth = [float(formula([Decimal(x) for x in row])) for row in rows]
    # it may cross 0, so its error is that of its terms: margin / (1 - 2 ε), at most 600 · 50
    torch.testing.assert_close(each.tolist(), truth, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(each.sum(), leaves)
    slopes = [precise.gradient(formula, row) for row in rows]
    for k, column in enumerate(found):
        torch.testing.assert_close(column.tolist(), [s[k] for s in slopes], rtol=1e-9, atol=1e-11)


@given(share=st.sampled_from([0.1, 0.3, 0.45]), margin=st.floats(-40, 40), beta=BETAS)
def test_robust_dpo_on_flipped_labels_is_dpo_on_right_ones(
    share: float, margin: float, beta: float
) -> None:
    a, b = torch.tensor([margin], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    right = robust_dpo_loss(a, b, b, b, beta, share)
    wrong = robust_dpo_loss(b, a, b, b, beta, share)
    expected = (1 - share) * right + share * wrong
    torch.testing.assert_close(expected, dpo_loss(a, b, b, b, beta), rtol=1e-9, atol=1e-9)


@given(rows=rows_of(SUMS, 4), beta=BETAS)
def test_hinge(precise: Any, rows: Any, beta: float) -> None:
    b = Decimal(beta)
    # not within rounding of the corner, where the slope is either
    rows = [r for r in rows if abs(1 - beta * ((r[0] - r[2]) - (r[1] - r[3]))) > 1e-6]

    def formula(x: Sequence[Decimal]) -> Decimal:
        return max(Decimal(0), 1 - b * ((x[0] - x[2]) - (x[1] - x[3])))

    def loss(*tensors: Tensor, **options: Any) -> Tensor:
        return hinge_loss(*tensors, beta, **options)

    if rows:
        check(loss, formula, rows, precise.gradient)


@given(rows=rows_of(st.floats(-12, 0), 4), beta=st.sampled_from([0.1, 1.0]))
def test_ipo(precise: Any, rows: Any, beta: float) -> None:
    b = Decimal(beta)
    # the square's relative error grows without bound at its zero
    rows = [r for r in rows if abs((r[0] - r[2]) - (r[1] - r[3]) - 0.5 / beta) > 1e-3]

    def formula(x: Sequence[Decimal]) -> Decimal:
        return (((x[0] - x[2]) - (x[1] - x[3])) - 1 / (2 * b)) ** 2

    def loss(*tensors: Tensor, **options: Any) -> Tensor:
        return ipo_loss(*tensors, beta, **options)

    if rows:
        check(loss, formula, rows, precise.gradient)


@given(rows=rows_of(MEANS, 2), beta=BETAS, gamma=st.sampled_from([0.0, 1.0, 1.6]))
def test_simpo(precise: Any, rows: Any, beta: float, gamma: float) -> None:
    b, g = Decimal(beta), Decimal(gamma)

    def formula(x: Sequence[Decimal]) -> Decimal:
        return -precise.log_sigmoid(b * (x[0] - x[1]) - g)

    def loss(*tensors: Tensor, **options: Any) -> Tensor:
        return simpo_loss(*tensors, beta, gamma, **options)

    check(loss, formula, rows, precise.gradient)


@given(rows=rows_of(MEANS, 3), beta=BETAS)
def test_orpo(precise: Any, rows: Any, beta: float) -> None:
    b = Decimal(beta)

    def odds(x: Decimal) -> Decimal:
        return x.exp() / (1 - x.exp())

    def formula(x: Sequence[Decimal]) -> Decimal:
        return -x[2] - b * precise.log_sigmoid((odds(x[0]) / odds(x[1])).ln())

    def loss(chosen: Tensor, rejected: Tensor, nll: Tensor, **options: Any) -> Tensor:
        return orpo_loss(chosen, rejected, -nll, beta, **options)

    check(loss, formula, rows, precise.gradient)


@given(
    rows=rows_of(SUMS, 2),
    good=st.integers(0, 15),
    kl=st.sampled_from([0.0, 0.5, 40.0]),
    beta=BETAS,
)
def test_kto(precise: Any, rows: Any, good: int, kl: float, beta: float) -> None:
    b, z = Decimal(beta), Decimal(kl)
    desirable = [bool(good >> i & 1) for i in range(len(rows))]

    def value(kind: bool) -> Callable[[Sequence[Decimal]], Decimal]:
        def formula(x: Sequence[Decimal]) -> Decimal:
            gain = x[0] - x[1] - z
            if kind:
                return Decimal(3) - 3 / (1 + (-b * gain).exp())
            return Decimal("0.5") - Decimal("0.5") / (1 + (b * gain).exp())

        return formula

    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    policy, reference = (c.requires_grad_() for c in columns)
    baseline = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    flags = torch.tensor(desirable)
    each = kto_loss(policy, reference, flags, baseline, beta, 3.0, 0.5, reduction="none")
    truth = [float(value(k)([Decimal(x) for x in r])) for k, r in zip(desirable, rows, strict=True)]
    torch.testing.assert_close(each.tolist(), truth, rtol=1e-10, atol=1e-40)
    (slope, none) = torch.autograd.grad(each.sum(), (policy, baseline), allow_unused=True)
    slopes = [precise.gradient(value(k), r)[0] for k, r in zip(desirable, rows, strict=True)]
    # sigmoid's derivative y (1 - y) is exact to a rounding of 1, times 3 beta
    torch.testing.assert_close(slope.tolist(), slopes, rtol=1e-10, atol=15 * 2**-52)
    assert none is None


@given(rows=rows_of(st.floats(-300, 0), 2))
def test_the_kto_baseline_is_the_mean_or_zero_and_has_no_gradient(rows: Any) -> None:
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*rows, strict=True)]
    found = kto_baseline(columns[0].requires_grad_(), columns[1])
    mean = math.fsum(a - b for a, b in rows) / len(rows)
    assert not found.requires_grad
    assert found.item() == pytest.approx(max(0.0, mean), rel=1e-12, abs=1e-12)


@given(st.lists(SUMS, min_size=2, max_size=6), BETAS, EPSILONS)
def test_dpo_of_the_reference_itself_is_ln_2(
    sums: list[float], beta: float, smoothing: float
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor(sums, dtype=dtype)
        y = x.flip(0)
        loss = float(dpo_loss(x, y, x, y, beta, smoothing))
        assert abs(loss - math.log(2)) <= 1e-7
        assert float(kto_loss(x, x, x > -1, 0.0, beta)) == 0.5


def test_dpo_in_float32_loses_no_more_than_its_inputs_do() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = [(-200 * torch.rand(1000, generator=generator)) for _ in range(4)]
    truth = dpo_loss(*(s.double() for s in sums), reduction="none")
    found = dpo_loss(*sums, reduction="none")
    # beta times three roundings of numbers up to 400, and one of the loss
    assert float((found - truth).abs().max()) <= 0.1 * 3 * 400 * 2**-24 + 40 * 2**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    sums = [torch.tensor(x, dtype=dtype) for x in ([-200.0, -31.5], [-201, -30], [-99, 0], [-7, 1])]
    found = dpo_loss(*sums, reduction="none")
    assert found.dtype is torch.float32
    assert torch.equal(found, dpo_loss(*(s.float() for s in sums), reduction="none"))
