"""LoRA beside any layer: y + s (D(x) A^T) B^T, its gradients, its dropout, what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.testing import check_operator
from lora_kernels.cpu import library
from lora_kernels.dropout import drop_reference, kept_scale
from lora_kernels.lora_update import lora_update, lora_update_reference
from lora_kernels.low_rank import LowRank

BACKENDS = ["reference", "native", "triton"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.lora_kernels.lora_update.default
OP_BACKWARD = torch.ops.lora_kernels.lora_update_backward.default


def skip_without(backend: str) -> None:
    if backend == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)


def make(n: int, k: int, r: int, adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    down, up = torch.randn(adapters, r, k) / k**0.5, torch.randn(adapters, n, r) / r**0.5
    return down, up, torch.rand(adapters) + 0.5


def step(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients, after a second backward has given the same bits."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves)
    grads, again = (torch.autograd.grad(y, leaves, dy.to(y), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, grads, again))
    return [y.detach(), *grads]


@pytest.mark.parametrize("name", BACKENDS)
@given(
    m=st.sampled_from([0, 1, 3, 17, 70]),
    n=st.sampled_from([1, 33, 70]),
    k=st.sampled_from([1, 60, 100]),
    r=st.sampled_from([1, 3, 20]),
    adapters=st.sampled_from([1, 4]),
    dtype=st.sampled_from(FLOATS),
    dropout=st.sampled_from([0.0, 0.3]),
    with_y=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_as_accurate_as_pytorch(
    as_accurate_as: Callable[..., None],
    name: str,
    m: int,
    n: int,
    k: int,
    r: int,
    adapters: int,
    dtype: torch.dtype,
    dropout: float,
    with_y: bool,
    strided: bool,
    seed: int,
) -> None:
    """Output, dx, dA, dB and dy; against the definition in float64 by ordinary autograd."""
    skip_without(name)
    torch.manual_seed(seed)
    down, up, s = make(n, k, r, adapters)
    rows = torch.randint(-1, adapters, (m,)) if adapters > 1 else None
    key = torch.tensor([seed << 30]) if dropout else None

    def some(*shape: int) -> Tensor:
        return (torch.randn(*shape, 2)[..., 0] if strided else torch.randn(shape)).to(dtype)

    inputs = [some(m, k), down, up, *([some(m, n)] if with_y else [])]
    dy = torch.randn(m, n).to(dtype)

    def ours(x: Tensor, down: Tensor, up: Tensor, y: Tensor | None = None) -> Tensor:
        return lora_update(y, x, down, up, s, rows, dropout, key)

    def theirs(x: Tensor, down: Tensor, up: Tensor, y: Tensor | None = None) -> Tensor:
        lora = LowRank(rows, down, up, s.to(up.dtype), key, dropout)
        return lora_update_reference(y, x, lora)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KERNELS", name)
        got = step(ours, inputs, dy)
    peer = step(theirs, inputs, dy)
    truth = step(theirs, [t.double() for t in inputs], dy.double())
    size = step(theirs, [t.double().abs() for t in inputs], dy.double().abs())
    for a, b, t, most in zip(got, peer, truth, size, strict=True):
        as_accurate_as(a, b, t, most)


def test_the_property_test_for_operators(backend: str) -> None:
    def run(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_update(y, x, down, up, 2.0)

    def reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return y + 2.0 * (x @ down.t()) @ up.t()

    def arguments(m: int, seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        down, up, _ = make(24, 40, 3, 1)
        return torch.randn(m, 24), torch.randn(m, 40), down[0], up[0]

    cases = st.builds(arguments, st.sampled_from([0, 1, 5, 19]), st.integers(0, 99))
    check_operator(run, reference, inputs=cases, examples=5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_update_leaves_every_bit(backend: str, dtype: torch.dtype) -> None:
    down, up, _ = make(24, 40, 3, 1)
    x, y = torch.randn(2, 5, 40).to(dtype), torch.randn(2, 5, 24).to(dtype)
    y[0, 0], y[0, 1] = -0.0, 0.0
    for sign in (1.0, -1.0):
        for dropout in (0.0, 0.5):
            z = lora_update(y, x, down[0], torch.zeros_like(up[0]), sign, dropout=dropout)
            assert torch.equal(z, y)
            assert torch.equal(z.signbit(), y.signbit())
            assert z.data_ptr() != y.data_ptr()


def test_dropout_is_the_mask_times_the_factor(backend: str) -> None:
    """In float64 against an explicit mask: the output and every gradient."""
    torch.manual_seed(1)
    down, up, _ = make(7, 33, 3, 1)
    seed, p = torch.tensor([99]), 0.4
    mask = drop_reference(torch.ones(6, 33).double(), seed, p) * kept_scale(p)
    assert 0 < (mask == 0).double().mean() < 1
    inputs = [torch.randn(6, 33), down[0], up[0], torch.randn(6, 7)]
    inputs = [t.double() for t in inputs]
    dy = torch.randn(6, 7)
    ours = step(lambda x, a, b, y: lora_update(y, x, a, b, 1.5, None, p, seed), inputs, dy)
    theirs = step(lambda x, a, b, y: y + 1.5 * (x * mask) @ a.t() @ b.t(), inputs, dy)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_each_call_draws_a_seed_of_its_own(backend: str) -> None:
    down, up, _ = make(7, 64, 3, 1)
    x = torch.randn(6, 64)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        return [lora_update(None, x, down[0], up[0], 1.0, dropout=0.5) for _ in range(2)]

    (a, b), (c, d) = run(), run()
    assert not torch.equal(a, b)
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    state = torch.get_rng_state()
    lora_update(None, x, down[0], up[0], 1.0)  # without dropout nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_recomputation_draws_the_same_mask(backend: str) -> None:
    down, up, _ = make(7, 64, 3, 1)
    results = []
    for recompute in (False, True):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in (torch.ones(6, 64), down[0], up[0])]

        def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return lora_update(None, x, a, b, 1.0, dropout=0.5).sin()

        if recompute:
            y = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
        else:
            y = run(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_operators_meet_torch_s_own_checks(
    full_run: bool, backend: str, adapters: int, dropout: float
) -> None:
    if not full_run and (adapters > 1) != (dropout > 0):
        pytest.skip("three seconds each: in the full run; one adapter without, three with dropout")
    down, up, s = make(7, 40, 3, adapters)
    down, up = down.requires_grad_(), up.requires_grad_()
    x, y = torch.randn(5, 40, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    rows = torch.randint(-1, adapters, (5,), dtype=torch.int32) if adapters > 1 else None
    lora = (rows, down, up, s, torch.tensor([5]) if dropout else None, dropout)
    torch.library.opcheck(OP, (y, x, *lora))
    torch.library.opcheck(OP, (None, x, *lora))
    dy = torch.randn(5, 7, requires_grad=True)
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OP_BACKWARD, (dy, x, *lora, *wants))


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_first_and_second_derivatives_in_float64(
    backend: str, adapters: int, seed: int | None
) -> None:
    down, up, s = make(5, 24, 2, adapters)
    rows = torch.tensor([0, -1, adapters - 1]) if adapters > 1 else None
    inputs = [
        t.double().requires_grad_() for t in (torch.randn(3, 5), torch.randn(3, 24), down, up)
    ]
    drops = (0.0, None) if seed is None else (0.3, torch.tensor([seed]))

    def run(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_update(y, x, down, up, s.double(), rows, *drops)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    for i in range(4):  # a gradient of one alone, and its derivative
        for t in inputs:
            t.requires_grad_(t is inputs[i])
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_casts_as_linear_does(backend: str, dtype: torch.dtype) -> None:
    down, up, s = make(7, 40, 3, 1)
    x = torch.randn(6, 40).to(dtype).requires_grad_()
    expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        change = lora_update(None, x, down, up, s)
        y = lora_update(torch.ones(6, 7), x, down, up, s)  # in the dtype of y
    assert change.dtype == expected
    assert torch.equal(change, lora_update(None, x.to(expected), down, up, s))
    assert y.dtype == torch.float32
    assert torch.equal(y, 1.0 + change.float())
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_shapes_and_dtypes(backend: str) -> None:
    down, up, s = make(7, 40, 3, 2)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t[0].to(dtype).requires_grad_() for t in (down, up)]
        lora_update(None, torch.randn(4, 40).bfloat16(), *leaves, 2.0).sum().backward()
        assert [t.grad.dtype for t in leaves] == [dtype, dtype]
        assert [t.grad.shape for t in leaves] == [(3, 40), (7, 3)]
    x = torch.randn(2, 5, 40, dtype=torch.float16)
    y = torch.randn(2, 7, 5).to(x).transpose(1, 2)  # with gaps
    each = torch.tensor([1, -1])
    z = lora_update(y, x, down, up, s, each)
    assert z.shape == y.shape
    assert torch.equal(z[1], y[1])
    flat = lora_update(y.reshape(10, 7), x.view(10, 40), down, up, s, each.repeat_interleave(5))
    assert torch.equal(flat.view_as(z), z)
    assert lora_update(None, x[0, 0], down[0], up[0], 1.0).shape == (7,)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_element_is_written(backend: str, dropout: float) -> None:
    down, up, s = make(33, 70, 5, 4)
    rows, key = torch.randint(-1, 3, (9,)), torch.tensor([3])  # the last adapter has no row
    inputs = [torch.randn(9, 70).bfloat16(), down, up]
    y, *grads = step(
        lambda x, a, b: lora_update(None, x, a, b, s, rows, dropout, key),
        inputs,
        torch.randn(9, 33),
    )
    assert all(t.isfinite().all() for t in (y, *grads))
    assert not grads[1][3].any()
    assert not grads[2][3].any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_whole_forward_and_backward(backend: str, dropout: float) -> None:
    down, up, s = make(24, 40, 3, 1)

    def run(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_update(y.sin(), x.cos(), down, up, s, dropout=dropout)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for m in (3, 8):
        inputs = [torch.randn(m, 24).half(), torch.randn(m, 40).half(), down[0], up[0]]
        dy, results = torch.randn(m, 24).half(), []
        for each in (compiled, run):
            torch.manual_seed(8)
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = each(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_compiler_is_told_the_layout(backend: str) -> None:
    down, up, s = make(7, 40, 3, 1)
    y, x = torch.randn(7, 5).t(), torch.randn(40, 5).t()
    lora = (None, down, up, s, None, 0.0)
    assert OP(y, x, *lora).stride() == (7, 1)
    torch.library.opcheck(OP, (y.requires_grad_(), x.requires_grad_(), *lora))


def test_inputs_that_do_not_fit() -> None:
    down, up, s = make(7, 40, 3, 2)
    x, rows = torch.ones(4, 40), torch.zeros(4).long()

    def run(x: Tensor = x, y: Tensor | None = None, **options: Any) -> Tensor:
        given = {"down": down, "up": up, "scaling": s, "rows": rows} | options
        return lora_update(y, x, **given)

    with pytest.raises(TypeError, match=r"x must be floating-point; got torch\.int64"):
        run(x.long())
    with pytest.raises(ValueError, match=r"end in the 40 columns of down; got shape \(4, 39\)"):
        run(x[:, :39])
    with pytest.raises(ValueError, match=r"y must be \(4, 7\) for this x and up; got \(4, 6\)"):
        run(y=torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"down and up must be \(L, r, 40\) and \(L, 7, r\)"):
        run(up=up[:1])
    with pytest.raises(ValueError, match=r"scaling must be \(2,\); got \(1,\)"):
        run(scaling=s[:1])
    with pytest.raises(ValueError, match="scaling takes no gradient; multiply up by it"):
        run(scaling=s.clone().requires_grad_())
    with pytest.raises(ValueError, match="rows must say which of the 2 adapters each row takes"):
        run(rows=None)
    with pytest.raises(ValueError, match=r"-1 \.\.\. 1 for 2 adapters; got 2"):
        run(rows=rows + 2)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        run(dropout=1.0)
    with pytest.raises(ValueError, match=r"seed must be int64 \(1,\); got torch\.float32 \(2,\)"):
        run(dropout=0.1, seed=torch.ones(2))
