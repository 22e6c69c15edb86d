"""The gate of the feed-forward in every backend: values, gradients, layouts, what is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import swiglu
from lora_kernels.cpu import machine
from lora_kernels.gpu import swiglu as gpu
from lora_kernels.swiglu import ACTIVATIONS, swiglu_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = torch.ops.lora_kernels
Judge = Callable[..., None]


# everything below holds for every backend
pytestmark = pytest.mark.usefixtures("backend")


def step(
    gated: Callable[..., Tensor], gate: Tensor, up: Tensor, dout: Tensor, activation: str
) -> list[Tensor]:
    """out, dgate, dup."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = gated(gate, up, activation)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), dout.to(out.dtype))]


@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    scale=st.sampled_from([0.1, 1.0, 6.0, 60.0]),
    seed=st.integers(0, 2**31),
)
def test_it_is_as_accurate_as_pytorch(
    as_accurate_as: Judge,
    shape: list[int],
    dtype: torch.dtype,
    activation: str,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    gate, up, dout = (torch.randn(shape).to(dtype) for _ in range(3))
    gate = gate * scale
    found = [
        step(swiglu, gate, up, dout, activation),
        step(swiglu_reference, gate, up, dout, activation),
        step(swiglu_reference, gate.double(), up.double(), dout.double(), activation),
    ]
    for ours, theirs, truth in zip(*found, strict=True):
        # the truth about float64 has roundings of its own
        as_accurate_as(ours, theirs, truth, truth * 4 if dtype == torch.float64 else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_gate_from_far_below_to_far_above(
    backend: str, dtype: torch.dtype, activation: str
) -> None:
    """A small value may not be lost beside a large one, so each is judged by itself."""
    if backend == "reference":
        pytest.skip("PyTorch's GELU loses small values: 1 + tanh cancels")
    gate = torch.cat([s * torch.logspace(-6, 2.5, 200) for s in (-1, 1)]).to(dtype)
    gate = torch.cat((gate, torch.tensor([0.0, -0.0, 87.0, 88.7, -87.3, -88.8, -104.0]).to(dtype)))
    one = torch.ones_like(gate)
    ours = step(swiglu, gate, one, one, activation)
    truth = step(swiglu_reference, gate.double(), one.double(), one.double(), activation)
    # of values that end in a subnormal number nothing more is asked than that they are tiny
    for a, t in zip(ours, truth, strict=True):
        near = 8 * torch.finfo(dtype).eps * t.abs() + 2.0**-23 * gate.double().abs().clamp(max=1)
        assert ((a.double() - t).abs() <= near + torch.finfo(dtype).tiny).all()


def test_nan_stays_and_keeps_to_itself() -> None:
    gate, up, dout = torch.randn(3, 50)
    clean = step(swiglu, gate, up, dout, "silu")
    gate[17] = torch.nan
    rest = torch.arange(50) != 17
    for ours, before in zip(step(swiglu, gate, up, dout, "silu"), clean, strict=True):
        assert ours[17].isnan()
        assert torch.equal(ours[rest], before[rest])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [7, gpu.BLOCK + 3])
def test_everything_is_written_whatever_the_layout(
    backend: str, dtype: torch.dtype, columns: int
) -> None:
    gate, up, dout = torch.randn(3, 2, 3, columns).to(dtype).unbind()
    wanted = step(swiglu, gate, up, dout, "silu")
    assert all(t.isfinite().all() for t in wanted)
    both = torch.cat((gate, torch.full_like(gate, torch.nan), up), -1)  # of one product
    columnwise = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (gate, up, dout)]
    for given_gate, given_up, given_dout in (
        (both[..., :columns], both[..., 2 * columns :], dout),
        (gate, up, columnwise[2]),
        columnwise,
    ):
        ours = step(swiglu, given_gate, given_up, given_dout, "silu")
        assert all(t.is_contiguous() for t in ours)
        for a, b in zip(ours, wanted, strict=True):
            # PyTorch's own bits depend on the layout
            assert torch.allclose(a, b) if backend == "reference" else torch.equal(a, b)


def test_backward_again_gives_the_same_and_writes_into_nothing() -> None:
    gate, up = torch.randn(2, 30).requires_grad_().unbind()
    before = gate.detach().clone(), up.detach().clone()
    out = swiglu(gate, up)
    runs = [torch.autograd.grad(out.sum(), (gate, up), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_are_all_that_is_kept(activation: str) -> None:
    gate, up = (torch.randn(5, 8).bfloat16().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up, activation)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_higher_derivatives(activation: str) -> None:
    gate, up = (torch.randn(7, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda g, u: swiglu(g, u, activation), (gate, up), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda g, u: swiglu(g, u, activation), (gate, up), fast_mode=True
    )
    found = []  # up and gate depend on each other: each gradient is of its own path alone
    for gated in (swiglu, swiglu_reference):
        out = gated(gate, gate.sin(), activation)
        (first,) = torch.autograd.grad(out.sum(), gate, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), gate)[0])
    torch.testing.assert_close(*found)


def test_the_definition_is_what_the_decoder_computed_all_along(backend: str) -> None:
    gate, up, dout = torch.randn(3, 64)
    if backend == "reference":
        assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
        assert torch.equal(swiglu(gate, up, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up)
        plain = step(lambda g, u, a: F.silu(g) * u, gate, up, dout, "silu")
        ours = step(swiglu, gate, up, dout, "silu")
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_many_elements_by_any_number_of_threads(
    as_accurate_as: Judge, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up = torch.randn(2, 3, 20_003).unbind()
    first = swiglu(gate, up)
    as_accurate_as(first, F.silu(gate) * up, F.silu(gate.double()) * up.double())
    if backend != "native":
        return
    for isa in machine.available():
        monkeypatch.setenv("LORA_KERNELS_ISA", isa)
        one = swiglu(gate[:, 1:], up[:, 1:])
        torch.set_num_threads(3)
        try:
            assert torch.equal(swiglu(gate[:, 1:], up[:, 1:]), one)
        finally:
            torch.set_num_threads(1)
        as_accurate_as(one, first[:, 1:], F.silu(gate.double()[:, 1:]) * up.double()[:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    gate, up, dout = torch.randn(3, 3, 8).to(dtype).unbind()
    for activation, t in (("silu", gate), ("gelu_tanh", gate.t())):
        leaves = t.clone().requires_grad_(), t.sin().requires_grad_()
        torch.library.opcheck(OPS.swiglu.default, (*leaves, activation))
    torch.library.opcheck(OPS.swiglu_backward.default, (dout, gate, up, "silu"))


def test_it_compiles_in_one_graph() -> None:
    gate, up, dout = torch.randn(3, 4, 9).unbind()
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    pairs = zip(*(step(f, gate, up, dout, "silu") for f in (compiled, swiglu)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_dtypes_are_promoted_as_a_product_does() -> None:
    gate, up = torch.randn(5).bfloat16().requires_grad_(), torch.randn(5).requires_grad_()
    out = swiglu(gate, up)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert gate.grad is not None
    assert gate.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"gate": torch.ones(3).int()}, TypeError, "gate must be floating-point; got"),
        ({"up": torch.ones(3).bool()}, TypeError, "up must be floating-point; got"),
        ({"up": torch.ones(1, 3)}, ValueError, r"must have one shape; got \(3,\) and \(1, 3\)"),
        ({"up": torch.ones(3, device="meta")}, ValueError, "gate is on cpu and up on meta"),
        ({"activation": "relu"}, ValueError, "must be one of silu, gelu_tanh; got 'relu'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        swiglu(**({"gate": torch.ones(3), "up": torch.ones(3)} | change))
