"""x Wᵀ and dy W on 4-bit weights: values, gradients, what is saved, and the compiler."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from lora_core.quant.double_quant import dynamic_map
from lora_core.quant.nf4 import NF4Tensor, quantize_4bit
from lora_kernels import Weight4, matmul4
from lora_kernels.cpu import library
from lora_kernels.operands import flat

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OP, OP_DX = torch.ops.lora_kernels.matmul4, torch.ops.lora_kernels.matmul4_dx


@pytest.fixture(params=["reference", "native", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything below holds for every backend; Triton's kernels run in the interpreter."""
    if request.param == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORA_KERNELS", request.param)
    return request.param


def packed(q: NF4Tensor) -> Weight4:
    table = dynamic_map() if q.double_quant else None
    n, k = q.shape
    absmax, offset = q.scale_absmax, q.scale_offset
    return Weight4(q.packed, q.scales, q.code.table(), n, k, q.block_size, absmax, offset, table)


def make(n: int = 24, k: int = 128, *, block: int = 64, dq: bool = True) -> tuple[Weight4, Tensor]:
    """A weight for the operator and the float32 matrix it stands for."""
    q = quantize_4bit(torch.randn(n, k), block_size=block, double_quant=dq)
    return packed(q), q.dequantize()


def dense(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, w.to(x.dtype), bias)


def step(
    multiply: Callable[..., Tensor], x: Tensor, w: Any, bias: Tensor | None, dy: Tensor
) -> Iterator[Tensor]:
    """Output, dx and dbias of one multiplication."""
    x = x.detach().requires_grad_()
    inputs = [x] if bias is None else [x, bias.detach().requires_grad_()]
    y = multiply(x, w, *(inputs[1:] or [None]))
    yield y.detach()
    yield from torch.autograd.grad(y, inputs, dy.to(y.dtype))


@given(
    lead=st.lists(st.integers(0, 9), max_size=2),
    n=st.integers(1, 40),
    k=st.sampled_from([1, 31, 64, 65, 128, 192]),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    dq=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(  # a sum that cancels, where PyTorch's own order happens to be lucky
    lead=[], n=16, k=1, dtype=torch.float32, has_bias=False, dq=False, strided=False, seed=664074242
)
def test_as_accurate_as_pytorch_on_the_dense_weight(
    as_accurate_as: Callable[..., None],
    lead: list[int],
    n: int,
    k: int,
    dtype: torch.dtype,
    has_bias: bool,
    dq: bool,
    strided: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight, w = make(n, k, dq=dq)
    x = torch.randn(*lead, k, 2)[..., 0] if strided else torch.randn(*lead, k)
    x, dy = x.to(dtype), torch.randn(*lead, n)
    bias = torch.randn(n) if has_bias else None
    ours = step(matmul4, x, weight, bias, dy)
    theirs = step(dense, x, w, bias, dy)
    dy = dy.to(dtype).double()
    truth = step(dense, x.double(), w.double(), bias if bias is None else bias.double(), dy)
    size = None if bias is None else bias.double().abs()
    magnitude = step(dense, x.double().abs(), w.double().abs(), size, dy.abs())
    for a, b, t, m in zip(ours, theirs, truth, magnitude, strict=True):
        as_accurate_as(a, b, t, m)


@pytest.mark.parametrize(("dq", "has_bias"), [(False, True), (True, False)])
def test_operators_meet_torch_s_own_checks(dq: bool, has_bias: bool) -> None:
    weight, _ = make(dq=dq)
    x = torch.randn(3, 5, 128, requires_grad=True)
    bias = torch.randn(24, requires_grad=True) if has_bias else None
    torch.library.opcheck(OP.default, (x, *flat(weight), bias))
    dy = torch.randn(3, 5, 24, requires_grad=True)
    torch.library.opcheck(OP_DX.default, (dy, *flat(weight)))


def derivatives(multiply: Callable[..., Tensor], x: Tensor, w: Any) -> Iterator[Tensor]:
    """First and second, after a second backward has given the same bits."""
    x = x.clone().requires_grad_()
    y = multiply(x, w, None).sin().sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    yield dx.detach()
    yield torch.autograd.grad(dx.square().sum(), x)[0]


def test_backward_twice_and_the_second_derivative(as_accurate_as: Callable[..., None]) -> None:
    weight, w = make()
    x = torch.randn(7, 128)
    runs = (matmul4, x, weight), (dense, x, w), (dense, x.double(), w.double())
    for ours, theirs, truth in zip(*(derivatives(*run) for run in runs), strict=True):
        as_accurate_as(ours, theirs, truth)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_written(dtype: torch.dtype) -> None:
    weight, _ = make(33, 65)
    x, dy, bias = torch.randn(5, 65).to(dtype), torch.randn(5, 33), torch.randn(33)
    for t in step(matmul4, x, weight, bias, dy):
        assert t.isfinite().all()


def test_a_gradient_that_is_expanded() -> None:
    weight, w = make()
    x = torch.randn(7, 128, requires_grad=True)
    matmul4(x, weight).sum().backward()
    assert torch.allclose(x.grad, w.sum(0).expand(7, -1), rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_gets_a_gradient() -> None:
    weight, _ = make()
    x, bias = torch.randn(257, 128).bfloat16(), torch.randn(24, requires_grad=True)
    matmul4(x, weight, bias).sum().backward()
    # summed in float32: the dtype of x has no 257
    assert torch.equal(bias.grad, torch.full((24,), 257.0))
    assert not matmul4(x, weight).requires_grad


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    weight, w = make()
    bias = torch.randn(24)
    x = torch.randn(33, 128).to(dtype)  # so many that PyTorch multiplies on every backend
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    linear_bias = bias.to(dtype) if dtype is torch.float64 else bias
    with torch.autocast("cpu", torch.bfloat16):
        ours = matmul4(a, weight, bias)
        theirs = torch.nn.functional.linear(b, w.to(dtype), linear_bias)
        raw = OP(x, *flat(weight), bias)  # the bare operator computes in its input's dtype
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    assert raw.dtype == dtype
    ours.sum().backward()
    theirs.sum().backward()
    assert a.grad.dtype == dtype
    assert torch.equal(a.grad, b.grad)


# --- what is saved for backward ------------------------------------------------------------------


def saved_by_eager(run: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


class Block(nn.Module):
    """A trained scale, a 4-bit product, a nonlinearity: the product's x needs a gradient."""

    def __init__(self, multiply: Callable[[Tensor, Any], Tensor], weight: Any) -> None:
        super().__init__()
        self.multiply, self.weight = multiply, weight
        self.scale = nn.Parameter(torch.ones(512))

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x * self.scale, self.weight).sin().sum()


def saved_by_compiled(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The values that the compiled forward hands to backward, whatever the compiler calls them."""
    torch._dynamo.reset()
    outputs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
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


@pytest.mark.parametrize("dq", [False, True])
def test_no_dense_weight_is_saved(dq: bool) -> None:
    """Codes take half a byte an element; a byte an element or more would be an expansion."""
    n, k = 256, 512
    weight, _ = make(n, k, dq=dq)
    block, x = Block(matmul4, weight), torch.randn(3, k)
    for saved in (saved_by_eager(lambda: block(x)), saved_by_compiled(block, x)):
        assert any(t.data_ptr() == weight.codes.data_ptr() for t in saved)  # the list is not empty
        assert of_weight_size(saved, n * k) == []
        assert not any(t.shape == (n, k) for t in saved)
        decoded = [t for t in saved if t.numel() == n * k // 64 and t.dtype == torch.float32]
        assert bool(decoded) is not dq  # nor are the scales kept decoded


def test_the_list_would_show_a_dense_weight() -> None:
    """The same two lists on the product written out: expand, then multiply."""
    n, k = 256, 512
    q = quantize_4bit(torch.randn(n, k), double_quant=False)

    def written_out(x: Tensor, q: NF4Tensor) -> Tensor:
        index = torch.stack((q.packed >> 4, q.packed & 15), 1).view(-1, 64).long()
        w = (table[index] * q.scales[:, None]).view(n, k)
        return x @ w.t()

    table = q.code.table()
    block, x = Block(written_out, q), torch.randn(4, k)
    for saved in (saved_by_eager(lambda: block(x)), saved_by_compiled(block, x)):
        assert of_weight_size(saved, n * k)


# --- torch.compile -------------------------------------------------------------------------------


class Mixed(nn.Module):
    """What QLoRA does: 4-bit product plus low-rank update."""

    def __init__(self, weight: Weight4) -> None:
        super().__init__()
        self.weight = weight
        self.a = nn.Parameter(torch.randn(4, 128) / 10)
        self.b = nn.Parameter(torch.randn(24, 4) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return matmul4(x, self.weight) + x @ self.a.to(x.dtype).t() @ self.b.to(x.dtype).t()


def compare_compiled(backend: str, autocast: bool) -> None:
    torch._dynamo.reset()
    weight, _ = make()
    module = Mixed(weight)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for rows in (3, 8):
        results = []
        for run in (module, compiled):
            x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1))
            x.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = run(x)
            y.float().square().sum().backward()
            results.append((y.detach(), x.grad, module.a.grad.clone(), module.b.grad.clone()))
            module.zero_grad()
        bound = 4 * torch.finfo(results[0][0].dtype).eps
        for ours, eager in zip(results[1], results[0], strict=True):
            assert ours.dtype == eager.dtype
            assert (ours - eager).abs().max() <= bound * eager.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_forward_and_backward(autocast: bool) -> None:
    compare_compiled("aot_eager", autocast)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor() -> None:
    compare_compiled("inductor", False)


# --- errors --------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit() -> None:
    weight, _ = make()
    with pytest.raises(ValueError, match=r"end in in_features = 128; got shape \(3, 64\)"):
        matmul4(torch.ones(3, 64), weight)
    for size in (1, 23, 25):  # kernels would read past its end
        with pytest.raises(ValueError, match=rf"bias must be \(24,\); got \({size},\)"):
            matmul4(torch.ones(3, 128), weight, torch.ones(size))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        matmul4(torch.tensor(1.0), weight)
    away = Weight4(*(t.to("meta") if isinstance(t, Tensor) else t for t in weight))
    for x, w, here, there in (
        (torch.ones(3, 128), away, "meta", "cpu"),
        (torch.ones(3, 128, device="meta"), weight, "cpu", "meta"),
    ):
        wrong = f"x must be on the weight's device, {here}; got {there}: move one"
        with pytest.raises(ValueError, match=wrong):
            matmul4(x, w)
    with pytest.raises(TypeError, match=r"x must be floating-point; got torch\.int64"):
        matmul4(torch.ones(3, 128, dtype=torch.int64), weight)
