"""x Wᵀ + s (x Aᵀ) Bᵀ on 4-bit weights: values, all gradients, mixed batches, what is saved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from lora_core.quant.double_quant import dynamic_map
from lora_core.quant.nf4 import quantize_4bit
from lora_core.testing import check_operator
from lora_kernels import Weight4, lora_linear, matmul4
from lora_kernels.cpu import library
from lora_kernels.lora_linear import lora_linear4, lora_linear4_reference, row_dtypes
from lora_kernels.operands import flat

BACKENDS = ["reference", "native", "triton"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.lora_kernels.lora_linear4.default
OP_BACKWARD = torch.ops.lora_kernels.lora_linear4_backward.default


def skip_without(backend: str) -> None:
    """Tests of C need a compiler."""
    if backend == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture(params=["planes", "halves", "dense"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of Triton's routes by turns, whatever the number of rows."""
    from lora_kernels.gpu import routes4

    choose = routes4.route

    def route(rows: int, weight: Weight4, dtype: torch.dtype, device: torch.device) -> str:
        usual = choose(rows, weight, dtype, device)
        return usual if dtype not in lora_linear.HALF else request.param

    monkeypatch.setenv("LORA_KERNELS", "triton")
    monkeypatch.setattr(routes4, "route", route)
    return request.param


def make_weight(n: int = 24, k: int = 128, dq: bool = True) -> Weight4:
    q = quantize_4bit(torch.randn(n, k), block_size=64, double_quant=dq)
    table = dynamic_map() if dq else None
    absmax, offset = q.scale_absmax, q.scale_offset
    return Weight4(q.packed, q.scales, q.code.table(), n, k, 64, absmax, offset, table)


def make_lora(n: int, k: int, r: int, adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    down, up = torch.randn(adapters, r, k) / k**0.5, torch.randn(adapters, n, r) / r**0.5
    return down, up, torch.rand(adapters) + 0.5


def step(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, *rest: Any) -> list[Tensor]:
    """Output and gradients, after a second backward has given the same bits."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves, *rest)
    grads, again = (torch.autograd.grad(y, leaves, dy.to(y), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, grads, again))
    return [y.detach(), *grads]


@pytest.mark.parametrize("name", BACKENDS)
@given(
    m=st.sampled_from([0, 1, 3, 17, 130]),
    n=st.sampled_from([1, 33, 70]),
    k=st.sampled_from([64, 100, 192]),
    r=st.sampled_from([1, 3, 20]),
    adapters=st.sampled_from([1, 5]),
    dtype=st.sampled_from(FLOATS),
    dq=st.booleans(),
    strided=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
@example(  # where x Aᵀ of the fused product was too coarse for dB
    m=1,
    n=1,
    k=64,
    r=1,
    adapters=5,
    dtype=torch.float16,
    dq=False,
    strided=False,
    dropout=0.0,
    seed=1_069_547_520,
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
    dq: bool,
    strided: bool,
    dropout: float,
    seed: int,
) -> None:
    """Output, dx, dbias, dA, dB; against the definition in float64 by ordinary autograd."""
    skip_without(name)
    torch.manual_seed(seed)
    weight, (down, up, s) = make_weight(n, k, dq), make_lora(n, k, r, adapters)
    rows = torch.randint(-1, adapters, (m,)) if adapters > 1 else None
    x = (torch.randn(m, k, 2)[..., 0] if strided else torch.randn(m, k)).to(dtype)
    bias, dy = torch.randn(n), torch.randn(m, n).to(dtype)
    inputs = [x, bias, down, up]
    drops = (dropout, torch.tensor([seed]) if dropout else None)

    def ours(x: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_linear4(x, weight, bias, down, up, s, rows, *drops)

    def theirs(x: Tensor, bias: Tensor, down: Tensor, up: Tensor, w: Weight4 = weight) -> Tensor:
        return lora_linear4_reference(x, w, bias, down, up, s.to(up.dtype), rows, *drops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KERNELS", name)
        got = step(ours, inputs, dy)
    peer = step(theirs, inputs, dy)
    truth = step(theirs, [t.double() for t in inputs], dy.double())
    absolute = weight._replace(  # |W|, |x| and so on: what a sum that cancels is relative to
        table=weight.table.abs(), scales=weight.scales
    )
    size = step(theirs, [t.double().abs() for t in inputs], dy.double().abs(), absolute)
    for a, b, t, most in zip(got, peer, truth, size, strict=True):
        as_accurate_as(a, b, t, most)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_property_test_for_operators(backend: str, mixed: bool) -> None:
    weight, (_, _, s) = make_weight(), make_lora(24, 128, 3, 4 if mixed else 1)

    def run(x: Tensor, bias: Tensor, down: Tensor, up: Tensor, *rows: Tensor) -> Tensor:
        return lora_linear4(x, weight, bias, down, up, s, *rows)

    def reference(x: Tensor, bias: Tensor, down: Tensor, up: Tensor, *rows: Tensor) -> Tensor:
        return lora_linear4_reference(x, weight, bias, down, up, s, *rows)

    def arguments(m: int, seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        down, up, _ = make_lora(24, 128, 3, len(s))
        rows = torch.randint(-1, len(s), (m,))
        return torch.randn(m, 128), torch.randn(24), down, up, *([rows] if mixed else [])

    cases = st.builds(arguments, st.sampled_from([0, 1, 5, 19]), st.integers(0, 99))
    check_operator(run, reference, inputs=cases, examples=5)


def check_zero_update(dtype: torch.dtype) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 2)
    x, bias = torch.randn(5, 128).to(dtype), torch.randn(24)
    x[0] = 0.0
    x[0, 0] = 6e-8  # in float16 its products with small weights round to zeros of both signs
    rows, zero = torch.randint(-1, 2, (5,)), torch.zeros_like(up)
    for b in (bias, None):
        y = matmul4(x, weight, b)
        if dtype == torch.float16 and b is None:
            assert (y[y == 0].signbit()).any()
        for sign in (1, -1):
            mixed = lora_linear4(x, weight, b, down, zero, sign * s, rows)
            alone = lora_linear4(x, weight, b, down[0], zero[0], sign * 2.0)
            for z in (mixed, alone):
                assert torch.equal(z, y)
                assert torch.equal(z.signbit(), y.signbit())


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_update_leaves_every_bit(dtype: torch.dtype) -> None:
    check_zero_update(dtype)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_zero_update_leaves_every_bit_on_every_route(dtype: torch.dtype) -> None:
    check_zero_update(dtype)


@pytest.mark.usefixtures("way")
def test_transposed_adapters_are_read_as_they_mean() -> None:
    weight, x, dy = make_weight(), torch.randn(3, 128).bfloat16(), torch.randn(3, 24)
    down, up, scaling = make_lora(24, 128, 4, 1)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (down, up)]
    assert not any(t.is_contiguous() for t in apart)

    def run(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_linear4(x, weight, None, down, up, scaling)

    for a, b in zip(step(run, [x, down, up], dy), step(run, [x, *apart], dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("way")
def test_each_row_gets_its_own_adapter() -> None:
    """A mixed batch gives what every adapter gives its rows alone."""
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 4, 3)
    x = torch.randn(6, 128, dtype=torch.bfloat16)
    rows = torch.tensor([2, -1, 0, 2, 1, 0])
    y = lora_linear4(x, weight, None, down, up, s, rows)
    for i in range(-1, 3):
        alone = matmul4(x, weight) if i < 0 else lora_linear4(x, weight, None, down[i], up[i], s[i])
        assert torch.equal(y[rows == i], alone[rows == i])


def test_rows_of_a_sequence_and_leading_shapes(backend: str) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 3)
    x = torch.randn(2, 5, 128, dtype=torch.float16)
    each = torch.tensor([2, -1])
    y = lora_linear4(x, weight, None, down, up, s, each)
    assert y.shape == (2, 5, 24)
    full = each[:, None].expand(2, 5)
    for rows in (full, full.contiguous(), full.to(torch.int8)):
        assert torch.equal(lora_linear4(x, weight, None, down, up, s, rows), y)
    flat = lora_linear4(x.view(10, 128), weight, None, down, up, s, full.reshape(-1))
    assert torch.equal(flat.view_as(y), y)
    flat = full.to(torch.int32).repeat_interleave(2).view(10, 2)[:, 0]  # with gaps, not to be cast
    again = lora_linear4(x.view(10, 128), weight, None, down, up, s, flat)
    assert torch.equal(again.view_as(y), y)
    one = lora_linear4(x[0, 0], weight, None, down, up, s, torch.tensor(2))
    assert one.shape == (24,)
    assert lora_linear4(x[:0], weight, None, down, up, s, each[:0]).shape == (0, 5, 24)


@pytest.mark.usefixtures("poison", "way")
@pytest.mark.parametrize(("dtype", "m"), [(torch.bfloat16, 1), (torch.float16, 9)])
def test_every_element_is_written(dtype: torch.dtype, m: int) -> None:
    weight, (down, up, s) = make_weight(33, 128), make_lora(33, 128, 5, 4)
    inputs = [torch.randn(m, 128).to(dtype), torch.randn(33), down, up]
    rows = torch.randint(-1, 3, (m,))  # the last adapter has no row

    def run(x: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_linear4(x, weight, bias, down, up, s, rows)

    y, *grads = step(run, inputs, torch.randn(m, 33))
    assert all(t.isfinite().all() for t in (y, *grads))
    assert not grads[2][3].any()
    assert not grads[3][3].any()


def test_many_wide_adapters_leave_the_fused_product(backend: str) -> None:
    """Beyond 512 columns of A the update goes beside the product; the result is as good."""
    adapters = lora_linear.FUSED_COLUMNS // 64 + 1
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 64, adapters)
    x, rows = torch.randn(4, 128), torch.tensor([0, adapters - 1, -1, 3])
    truth = lora_linear4(x.double(), weight, None, down, up, s, rows)
    y = lora_linear4(x.bfloat16(), weight, None, down, up, s, rows)
    assert (y - truth).abs().max() <= 0.05 * truth.abs().max()


def test_parameters_keep_their_dtype(backend: str) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 1)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t[0].to(dtype).requires_grad_() for t in (down, up)]
        lora_linear4(x, weight, None, *leaves, s).sum().backward()
        assert [t.grad.dtype for t in leaves] == [dtype, dtype]
        assert [t.grad.shape for t in leaves] == [(3, 128), (24, 3)]


# --- derivatives, and torch's own checks ---------------------------------------------------------


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_operators_meet_torch_s_own_checks(
    full_run: bool, backend: str, adapters: int, dropout: float
) -> None:
    if not full_run and (adapters > 1) != (dropout > 0):
        pytest.skip("three seconds each: in the full run; one adapter without, three with dropout")
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, adapters)
    down, up = down.requires_grad_(), up.requires_grad_()
    x, bias = torch.randn(5, 128, requires_grad=True), torch.randn(24, requires_grad=True)
    rows = torch.randint(-1, adapters, (5,), dtype=torch.int32) if adapters > 1 else None
    lora = (rows, down, up, s, torch.tensor([5]) if dropout else None, dropout)
    torch.library.opcheck(OP, (x, *flat(weight), bias, *lora))
    dy = torch.randn(5, 24, requires_grad=True)
    for wants in ((True, True), (True, False), (False, True)):
        arguments = (dy, x, *flat(weight), *lora, *wants)
        torch.library.opcheck(OP_BACKWARD, arguments)


@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_first_and_second_derivatives_in_float64(
    backend: str, adapters: int, seed: int | None
) -> None:
    weight, (down, up, s) = make_weight(5, 64), make_lora(5, 64, 2, adapters)
    rows = torch.tensor([0, -1, adapters - 1]) if adapters > 1 else None
    inputs = [t.double().requires_grad_() for t in (torch.randn(3, 64), torch.randn(5), down, up)]
    drops = (0.0, None) if seed is None else (0.3, torch.tensor([seed]))

    def run(x: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return lora_linear4(x, weight, bias, down, up, s.double(), rows, *drops)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_second_derivatives_of_a_part(backend: str) -> None:
    """Only some inputs need a gradient; a third derivative exists."""
    weight, (down, up, s) = make_weight(5, 64), make_lora(5, 64, 2, 1)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    down, up = down[0].double(), up[0].double().requires_grad_()

    def dx_of(run: Callable[..., Tensor]) -> list[Tensor]:
        y = run().pow(3).sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        (ddx, ddup) = torch.autograd.grad(dx.pow(2).sum(), (x, up), create_graph=True)
        return [ddx, ddup, *torch.autograd.grad(ddx.pow(2).sum(), (x, up))]

    ours = dx_of(lambda: lora_linear4(x, weight, None, down, up, s.double()))
    theirs = dx_of(
        lambda: matmul4(x, weight) + s.double() * torch.linalg.multi_dot((x, down.t(), up.t()))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


def test_only_what_is_asked_gets_a_gradient(backend: str) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 1)
    x, bias = torch.randn(257, 128, dtype=torch.bfloat16), torch.zeros(24, requires_grad=True)
    assert not lora_linear4(x, weight, None, down, up, s).requires_grad
    lora_linear4(x, weight, bias, down, up, s).sum().backward()
    assert (bias.grad == 257).all()  # summed in float32: the dtype of x has no 257
    leaf = up.clone().requires_grad_()
    lora_linear4(x, weight, None, down, leaf, s).sum().backward()
    assert leaf.grad.any()
    leaf = x.clone().requires_grad_()
    lora_linear4(leaf, weight, None, down, up, s).sum().backward()  # an expanded gradient
    assert leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_casts_as_linear_does(backend: str, dtype: torch.dtype) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 1)
    x = torch.randn(7, 128).to(dtype).requires_grad_()
    expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear4(x, weight, None, down, up, s)
    assert y.dtype == expected
    assert torch.equal(y, lora_linear4(x.to(expected), weight, None, down, up, s))
    y.sum().backward()
    assert x.grad.dtype == dtype


# --- what is saved, and the compiler -------------------------------------------------------------


class Block(nn.Module):
    """A trained scale before the product and a nonlinearity behind it."""

    def __init__(self, n: int, k: int, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.run = make_weight(n, k), run
        down, up, _ = make_lora(n, k, 4, 1)
        self.down, self.up = nn.Parameter(down[0]), nn.Parameter(up[0])
        self.scale = nn.Parameter(torch.ones(k))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x * self.scale, self.weight, None, self.down, self.up, 2.0).sin().sum()


def saved_by_eager(run: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


def saved_by_compiled(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The values that the compiled forward hands to backward, whatever the compiler calls them."""
    torch._dynamo.reset()
    outputs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        def run(*args: Tensor) -> Any:
            result = graph(*args)
            outputs.extend(result)
            return result

        return make_boxed_func(run)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, _: make_boxed_func(graph))
    run = torch.compile(module, backend=backend, fullgraph=True)
    saved = saved_by_eager(lambda: run(x).backward())
    return [t for t in (*outputs, *saved) if isinstance(t, Tensor)]


def of_weight_size(tensors: list[Tensor], numel: int) -> list[Tensor]:
    return [t for t in tensors if t.numel() >= numel or t.untyped_storage().nbytes() >= numel]


def test_no_dense_weight_is_saved(backend: str) -> None:
    n, k = 256, 512
    block, x = Block(n, k, lora_linear4), torch.randn(3, k).bfloat16()
    for saved in (saved_by_eager(lambda: block(x)), saved_by_compiled(block, x)):
        assert any(t.data_ptr() == block.weight.codes.data_ptr() for t in saved)  # not empty
        assert of_weight_size(saved, n * k) == []
        halves = [t for t in saved if t.dtype == torch.bfloat16 and t.shape[-1:] == (4,)]
        assert halves == []  # neither is a 16-bit copy of B, or h twice


def test_the_list_would_show_a_dense_weight() -> None:
    n, k = 256, 512

    def run(x: Tensor, weight: Weight4, _: None, down: Tensor, up: Tensor, s: float) -> Tensor:
        w = torch.randn(n, k) * x.sum()  # a dense matrix that backward needs
        return x @ w.t() + s * (x @ down.t()) @ up.t()

    block = Block(n, k, run)
    assert of_weight_size(saved_by_eager(lambda: block(torch.randn(3, k))), n * k)


def test_compiles_whole_forward_and_backward(backend: str) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 3)

    def run(x: Tensor, bias: Tensor, down: Tensor, up: Tensor, rows: Tensor) -> Tensor:
        return lora_linear4(x, weight, bias, down, up, s, rows)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for m in (3, 8):
        rows = torch.randint(-1, 3, (m,))
        inputs = [torch.randn(m, 128).half(), torch.randn(24), down, up]
        dy, results = torch.randn(m, 24).half(), []
        for each in (compiled, run):
            leaves = [t.detach().requires_grad_() for t in inputs]
            y = each(*leaves, rows)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# --- errors --------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit() -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 2)
    x, rows = torch.ones(4, 128), torch.zeros(4).long()
    with pytest.raises(TypeError, match=r"x must be floating-point; got torch\.int64"):
        lora_linear4(x.long(), weight, None, down, up, s, rows)
    with pytest.raises(ValueError, match=r"end in in_features = 128; got shape \(4, 64\)"):
        lora_linear4(x[:, :64], weight, None, down, up, s, rows)
    fits = r"down and up must be \(L, r, 128\) and \(L, 24, r\), or \(r, 128\) and \(24, r\); got "
    for a, b in ((down, up[:1]), (down[:, :2], up), (up, down), (down[:0], up[:0]), (down[0], up)):
        with pytest.raises(ValueError, match=fits):
            lora_linear4(x, weight, None, a, b, s, rows)
    with pytest.raises(ValueError, match=r"scaling must be \(2,\); got \(1,\)"):
        lora_linear4(x, weight, None, down, up, s[:1], rows)
    with pytest.raises(ValueError, match="scaling takes no gradient; multiply up by it"):
        lora_linear4(x, weight, None, down, up, s.clone().requires_grad_(), rows)


def test_a_bias_that_does_not_fit(backend: str) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 1)
    with pytest.raises(ValueError, match=r"bias must be \(24,\); got \(1,\)"):
        lora_linear4(torch.ones(2, 128), weight, torch.ones(1), down, up, s)


def test_rows_that_do_not_fit(backend: str) -> None:
    weight, (down, up, s) = make_weight(), make_lora(24, 128, 3, 2)
    x = torch.ones(4, 5, 128)

    def run(rows: Tensor | None) -> Tensor:
        return lora_linear4(x, weight, None, down, up, s, rows)

    with pytest.raises(ValueError, match="rows must say which of the 2 adapters each row takes"):
        run(None)
    with pytest.raises(TypeError, match=r"rows must be integers; got torch\.float32"):
        run(torch.zeros(4))
    with pytest.raises(TypeError, match=r"rows must be integers; got torch\.bool"):
        run(torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"rows must be \(4, 5\), or \(4,\); got \(5,\)"):
        run(torch.zeros(5).long())
    with pytest.raises(ValueError, match="rows must be on the device of x, cpu; got meta"):
        run(torch.zeros(4, device="meta").long())
    for wrong in (2, -2):
        with pytest.raises(ValueError, match=rf"-1 \.\.\. 1 for 2 adapters; got {wrong}"):
            run(torch.tensor([0, 1, wrong, 0]))


@pytest.mark.parametrize("choice", ["auto", "reference", "native"])
def test_asking_for_rows_compiles_whole(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer needs no C, and looking for a compiler is nothing that could be traced."""
    monkeypatch.setenv("LORA_KERNELS", choice)
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        return x + len(row_dtypes(x.device))

    assert torch.compile(run, backend="eager", fullgraph=True)(torch.ones(3)).eq(1).all()
