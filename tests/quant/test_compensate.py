"""Requantizing by sample inputs: never worse than the start, in its format, exact if it can be."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.quant import NF4Tensor, quantize_4bit
from lora_core.quant.compensate import output_cost, requantize_4bit
from lora_core.quant.nearest_point import factor, search

CUSTOM = torch.linspace(-1.0, 1.0, 16) ** 3


def problem(
    n: int, k: int, rows: int, seed: int, share: float = 0.02, **options: object
) -> tuple[NF4Tensor, Tensor, Tensor]:
    """A 4-bit weight, the weight with an update of that share of its size, and Xᵀ X."""
    g = torch.Generator().manual_seed(seed)
    start = quantize_4bit(torch.randn(n, k, generator=g), **options)  # type: ignore[arg-type]
    weight = start.dequantize()
    update = torch.randn(n, 3, generator=g) @ torch.randn(3, k, generator=g)
    target = weight + update * (share * weight.norm() / update.norm())
    mix = torch.randn(k, k, generator=g) * torch.arange(1, k + 1) ** -1.0
    x = torch.randn(rows, k, generator=g) @ mix.t()
    return start, target, x.double().t() @ x.double()


def damped(moment: Tensor, damping: float) -> Tensor:
    moment = moment / moment.diagonal().mean()
    return moment + damping * torch.eye(len(moment))


def same_tensors(one: NF4Tensor, other: NF4Tensor) -> bool:
    return torch.equal(one.packed, other.packed) and torch.equal(one.scales, other.scales)


@given(
    n=st.integers(1, 9),
    k=st.sampled_from([32, 64, 128, 7, 45, 96]),
    rows=st.sampled_from([1, 5, 200]),
    code=st.sampled_from(["nf4", "fp4", "fp4_e3m0", "int4", CUSTOM]),
    block_size=st.sampled_from([32, 64]),
    double_quant=st.booleans(),
    beams=st.sampled_from([1, 3, 8]),
    share=st.sampled_from([1e-3, 0.02, 0.3]),
    seed=st.integers(0, 999),
)
def test_no_row_is_worse_than_in_the_start_and_the_format_stays(
    n: int,
    k: int,
    rows: int,
    code: str | Tensor,
    block_size: int,
    double_quant: bool,
    beams: int,
    share: float,
    seed: int,
) -> None:
    options = {"code": code, "block_size": block_size, "double_quant": double_quant}
    start, target, moment = problem(n, k, rows, seed, share, **options)
    before = start.packed.clone(), start.scales.clone(), target.clone(), moment.clone()
    made = requantize_4bit(start, target, moment, beams=beams)
    metric = damped(moment, 0.01)
    now = output_cost(made.dequantize().double() - target, metric)
    then = output_cost(start.dequantize().double() - target, metric)
    # the two costs are compared in float64 on float32 values that both sides decode alike
    assert (now <= then * (1 + 1e-9)).all()
    # bits a weight: the same tensors of the same sizes, and the same group scales and offset
    assert (made.shape, made.dtype, made.block_size) == (start.shape, start.dtype, block_size)
    assert made.code is start.code
    assert made.packed.dtype == torch.uint8
    assert made.packed.shape == start.packed.shape
    assert made.scales.dtype == start.scales.dtype
    assert made.scales.shape == start.scales.shape
    assert made.nbytes == start.nbytes
    assert made.bits_per_param == start.bits_per_param
    assert made.scale_absmax is start.scale_absmax
    assert made.scale_offset is start.scale_offset
    if (n * k) % 2:
        assert made.packed[-1] & 15 == start.packed[-1] & 15
    if code == "fp4":  # its second zero is never written
        assert not ((made.packed >> 4) == 8).any()
        assert not ((made.packed & 15) == 8).any()
    # nothing was written into the arguments
    assert torch.equal(start.packed, before[0])
    assert torch.equal(start.scales, before[1])
    assert torch.equal(target, before[2])
    assert torch.equal(moment, before[3])


@given(seed=st.integers(0, 99), double_quant=st.booleans(), k=st.sampled_from([64, 45]))
def test_a_target_that_is_on_the_grid_is_found(seed: int, double_quant: bool, k: int) -> None:
    """At cost zero there is a path through the search, and no step of descent leaves it."""
    torch.manual_seed(seed)
    start, _, moment = problem(6, k, 300, seed, double_quant=double_quant)
    assert same_tensors(requantize_4bit(start, start.dequantize(), moment), start)
    codes = torch.randint(16, start.packed.shape, dtype=torch.uint8) * 17
    flip = torch.rand(start.packed.shape) < 0.1
    other = NF4Tensor(
        torch.where(flip, codes, start.packed),
        start.scales,
        start.shape,
        start.dtype,
        start.code,
        64,
        start.scale_absmax,
        start.scale_offset,
    )
    made = requantize_4bit(start, other.dequantize(), moment)
    # scales may move by what float32 leaves of a cost of zero
    torch.testing.assert_close(made.dequantize(), other.dequantize(), rtol=1e-2, atol=0)
    assert torch.equal(
        requantize_4bit(start, other.dequantize(), moment, sweeps=0).dequantize(),
        other.dequantize(),
    )


def test_uncorrelated_inputs_leave_the_codes_as_they_are() -> None:
    """In the identity's metric the nearest point to W0 + D is W0, D below half a step."""
    start, target, _ = problem(16, 128, 1, 0, share=1e-4)
    assert same_tensors(requantize_4bit(start, target, torch.eye(128), sweeps=0), start)


def test_inputs_of_one_direction_are_met_almost_exactly() -> None:
    """One equation a row, many codes: the error can be made to cancel."""
    start, target, _ = problem(16, 64, 1, 0)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5)).double()
    made = requantize_4bit(start, target, x.t() @ x, damping=1e-6)
    update = ((target - start.dequantize()).double() @ x.t()).norm()
    assert ((made.dequantize() - target).double() @ x.t()).norm() < 0.01 * update


@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_gptq(seed: int) -> None:
    """GPTQ as in its paper, by the inverse of the metric, in float64, in the same order."""
    start, target, moment = problem(8, 64, 400, seed, block_size=32, double_quant=False)
    made = requantize_4bit(start, target, moment, beams=1, sweeps=0)
    metric = damped(moment, 0.01)
    order, _, _ = factor(metric)
    step = start.absmax.view(8, 2).repeat_interleave(32, 1).double()
    weight, expected = target.double().clone(), torch.zeros(8, 64, dtype=torch.float64)
    levels = start.code.table().double()
    for t, j in enumerate(order.tolist()):
        left = order[t:]
        inverse = torch.linalg.inv(metric[left][:, left])
        rank = (weight[:, j, None] / step[:, j, None] - levels).abs().argmin(1)
        expected[:, j] = levels[rank] * step[:, j]
        error = (weight[:, j] - expected[:, j]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
    value = made.dequantize().double()
    worse = output_cost(expected - target, metric) >= output_cost(
        start.dequantize() - target, metric
    )
    expected[worse] = start.dequantize().double()[worse]
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert not worse.all()


def test_the_factor_is_exact_and_its_order_puts_the_smallest_variance_last() -> None:
    _, _, moment = problem(1, 100, 300, 1)
    metric = damped(moment, 1e-3)
    order, unit, weight = factor(metric)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(unit, unit.triu())
    assert (unit.diagonal() == 1).all()
    again = unit.double() @ weight.double().diag() @ unit.double().t()
    bound = (unit.abs().double() @ weight.double().diag() @ unit.abs().double().t()) * 1e-6
    assert ((again - metric[order][:, order]).abs() <= bound).all()
    for t in (99, 98, 97, 60, 3):  # the variance of each, given those behind it
        given, first = order[t + 1 :], order[: t + 1]
        known = metric[given][:, given]
        rest = metric[first][:, first] - metric[first][:, given] @ torch.linalg.solve(
            known, metric[given][:, first]
        )
        assert rest.diagonal().argmin() == t
        assert abs(float(weight[t]) / float(rest[t, t]) - 1) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_optimum(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-1.0, 0.1, 0.9])
    mix = torch.randn(5, 5, generator=g).double()
    _, unit, weight = factor(mix @ mix.t() + 0.01 * torch.eye(5))
    target, scale = torch.randn(4, 5, generator=g), torch.rand(4, 5, generator=g) + 0.5
    ranks = search(target, scale, unit, weight, levels, beams=3**5)
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))  # (243, 5)
    metric = unit.double() @ weight.double().diag() @ unit.double().t()
    for i in range(4):
        cost = output_cost(levels[every] * scale[i] - target[i], metric)
        assert torch.equal(ranks[i].long(), every[cost.argmin()])


def test_beams_are_carried_whole_from_block_to_block() -> None:
    """Beginnings that change places at the end of a block keep their own codes."""
    start, target, moment = problem(32, 192, 600, 2)
    metric = damped(moment, 0.01)
    order, unit, weight = factor(metric)
    levels = start.code.table()
    scale = start.absmax.view(32, 3).repeat_interleave(64, 1)[:, order]
    costs = {}
    for beams in (1, 8):
        ranks = search(target[:, order], scale, unit, weight, levels, beams)
        error = levels[ranks.int()] * scale - target[:, order]
        costs[beams] = output_cost(error, metric[order][:, order])
    assert costs[8].sum() < 0.9 * costs[1].sum()
    assert (costs[8] <= costs[1]).sum() >= 30


def test_8_bit_scales_are_those_of_their_own_group() -> None:
    """More than 256 blocks whose scales differ in size: two groups with scales of their own."""
    g = torch.Generator().manual_seed(0)
    size = torch.where(torch.arange(80) < 50, 1.0, 10.0)[:, None]
    start = quantize_4bit(torch.randn(80, 256, generator=g) * size)
    assert start.scales.numel() == 320
    update = size * torch.randn(80, 3, generator=g) @ torch.randn(3, 256, generator=g)
    target = start.dequantize() + 0.01 * update
    shape = spectrum(256, 1.0, 0).double()
    metric = damped(shape @ shape.t(), 0.01)
    costs = []
    for sweeps in (1, 2):
        made = requantize_4bit(start, target, shape @ shape.t(), beams=1, sweeps=sweeps)
        costs.append(output_cost(made.dequantize().double() - target, metric))
    then = output_cost(start.dequantize().double() - target, metric)
    for cost in costs:
        assert (cost <= then).all()
    assert (costs[1] <= costs[0]).all()
    for group in (slice(0, 50), slice(50, 80)):
        assert costs[1][group].sum() < 0.99 * costs[0][group].sum()


def test_descent_only_improves() -> None:
    start, target, moment = problem(40, 128, 500, 7)
    metric = damped(moment, 0.01)
    costs = [
        float(
            output_cost(
                requantize_4bit(start, target, moment, beams=2, sweeps=s).dequantize().double()
                - target,
                metric,
            ).sum()
        )
        for s in range(4)
    ]
    assert costs[0] > costs[1] >= costs[2] >= costs[3]


def spectrum(k: int, exponent: float, seed: int) -> Tensor:
    """A factor F (K, K) of a covariance whose eigenvalues fall as i^-exponent."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(k, k, generator=g))[0]
    return rotation * torch.arange(1, k + 1) ** (-exponent / 2)


def test_rows_that_the_search_makes_worse_keep_their_own_codes() -> None:
    """GPTQ by itself misses small random updates by more than leaving them out does."""
    start, target, _ = problem(64, 128, 1, 3, share=0.03)
    shape = spectrum(128, 1.0, 0).double()
    moment = shape @ shape.t()
    made = requantize_4bit(start, target, moment, beams=1, sweeps=0)
    metric = damped(moment, 0.01)
    now = output_cost(made.dequantize().double() - target, metric)
    then = output_cost(start.dequantize().double() - target, metric)
    kept = (made.dequantize() == start.dequantize()).all(1)
    assert (now <= then).all()
    assert kept.sum() > 10
    assert not kept.all()
    by_rows = made.packed.view(64, -1) == start.packed.view(64, -1)
    assert by_rows[kept].all()


def test_what_was_gained_holds_on_inputs_that_were_not_seen() -> None:
    start, target, _ = problem(64, 128, 1, 3)
    shape, g = spectrum(128, 2.0, 0), torch.Generator().manual_seed(1)
    seen, unseen = (torch.randn(4096, 128, generator=g) @ shape.t() for _ in range(2))
    held_out = unseen.double().t() @ unseen.double()
    size = output_cost(target.double() - start.dequantize(), held_out).sum()
    errors = {
        name: float(
            (output_cost(made.dequantize().double() - target, held_out).sum() / size).sqrt()
        )
        for name, made in {
            "compensated": requantize_4bit(start, target, seen.double().t() @ seen.double()),
            "plain": quantize_4bit(target),
        }.items()
    }
    assert errors["compensated"] < 0.55 < 0.9 < errors["plain"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, 64)}, r"target must have the weight's shape.*\(4, 64\).*3, 64"),
        ({"moment": torch.eye(63)}, r"moment must be \(64, 64\).*got \(63, 63\)"),
        ({"target": torch.full((4, 64), torch.nan)}, "target holds NaN or infinity"),
        ({"moment": torch.full((64, 64), torch.inf)}, "moment holds NaN or infinity"),
        ({"beams": 0}, "beams must be 1 or more"),
        ({"sweeps": -1}, "sweeps 0 or more"),
        ({"damping": 0.0}, "damping above 0"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    start, target, moment = problem(4, 64, 9, 0)
    arguments = {"target": target, "moment": moment} | change
    with pytest.raises(ValueError, match=message):
        requantize_4bit(start, **arguments)  # type: ignore[arg-type]
