"""Expanding as operators: the compiler, what it keeps, gradients, writing into given memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from lora_core.quant.codebook import CODEBOOKS
from lora_core.quant.double_quant import dynamic_map
from lora_core.testing import check_operator
from lora_kernels import Weight4, decode_scales, dequantize4, expand4, expand4_slice
from lora_kernels import blockwise4_reference as definition
from lora_kernels.cpu import library

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

NF4 = CODEBOOKS["nf4"].table()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = torch.ops.lora_kernels


NATIVE = pytest.mark.parametrize("backend", ["native"], indirect=True)


@pytest.fixture(params=["reference", "native", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and library.why_not() is not None:
        pytest.skip(library.why_not())
    monkeypatch.setenv("LORA_KERNELS", request.param)
    torch._dynamo.reset()
    return request.param


def make_weight(n: int = 6, k: int = 128, *, nested: bool = False) -> Weight4:
    codes, blocks = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8), n * k // 64
    if not nested:
        return Weight4(codes, torch.rand(blocks), NF4, n, k, 64)
    scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    decoders = torch.rand(-(-blocks // 256)), torch.rand(()), dynamic_map()
    return Weight4(codes, scales, NF4, n, k, 64, *decoders)


def define(weight: Weight4, dtype: torch.dtype) -> Tensor:
    """The definition, called by its name."""
    n, k = weight.out_features, weight.in_features
    scales = decode_scales(weight.scales, *(weight.nested or ()))
    out = torch.empty(n * k, dtype=dtype)
    definition.dequantize(weight.codes, scales, weight.table, weight.block_size, None, out)
    return out.view(n, k)


def tensors(weight: Weight4) -> tuple[Any, ...]:
    """The weight as the operators' schemas have it."""
    nested = weight.nested or (None, None, None)
    return weight.codes, weight.scales, weight.table, *nested, weight.block_size


# --- the compiler --------------------------------------------------------------------------------


def whole(x: Tensor, weight: Weight4, out: Tensor) -> Tensor:
    return x @ expand4(weight, x.dtype).t()


def into(x: Tensor, weight: Weight4, out: Tensor) -> Tensor:
    w = weight
    dequantize4(*w[:3], w.block_size, out.numel(), x.dtype, nested=w.nested, out=out)
    return x @ out.t()


def a_slice(x: Tensor, weight: Weight4, out: Tensor) -> Tensor:
    return x[:, 64:] @ expand4_slice(weight, 1, 5, 64, 128, x.dtype).t()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("run", [whole, into, a_slice])
def test_code_that_expands_compiles_whole(run: Callable[..., Tensor], nested: bool) -> None:
    weight, x = make_weight(nested=nested), torch.randn(3, 128)
    dense = define(weight, torch.float32)
    wanted = x[:, 64:] @ dense[1:5, 64:].t() if run is a_slice else x @ dense.t()
    for compiled in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        out = torch.full((6, 128), torch.nan)
        assert torch.equal(compiled(x, weight, out), wanted)
        assert torch.equal(out, dense) or run is not into


@NATIVE
def test_no_operation_of_the_definition_is_in_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []
    run = torch.compile(
        lambda weight: expand4(weight, torch.bfloat16),
        backend=aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph),
        fullgraph=True,
    )
    weight = make_weight()
    assert torch.equal(run(weight), define(weight, torch.bfloat16))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == ["lora_kernels.dequantize4.default", "aten.view.default"]


def kept(run: Callable[[Tensor], Tensor], x: Tensor) -> list[torch.Size]:
    """Shapes of what a compiled forward hands to its backward, inputs aside."""
    shapes: list[torch.Size] = []

    def forward(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        made = [node for node in graph.graph.output_node().args[0][1:] if node.op != "placeholder"]
        shapes.extend(node.meta["val"].shape for node in made)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(run, backend=backend, fullgraph=True)(x).sum().backward()
    return shapes


@NATIVE
def test_a_compiled_graph_keeps_the_dense_weight_only_for_a_gradient_that_needs_it() -> None:
    weight = make_weight()
    scale = torch.ones((), requires_grad=True)
    dense = [torch.Size((6, 128)), torch.Size((128, 6))]

    def after(x: Tensor) -> Tensor:  # a gradient of what comes behind the product
        return (x.detach() @ expand4(weight, x.dtype).t()) * scale

    def through(x: Tensor) -> Tensor:
        return x @ expand4(weight, x.dtype).t()

    def again(x: Tensor) -> Tensor:
        return checkpoint(through, x, use_reentrant=False)

    x = torch.randn(3, 128, requires_grad=True)
    assert [shape for shape in kept(after, x) if shape in dense] == []
    assert [shape for shape in kept(again, x) if shape in dense] == []
    assert [shape for shape in kept(through, x) if shape in dense]  # the list would show it


def test_operators_meet_torch_s_own_checks() -> None:
    arguments = tensors(make_weight(nested=True))
    torch.library.opcheck(OPS.dequantize4.default, (*arguments, 768, torch.bfloat16))
    torch.library.opcheck(OPS.dequantize4_into.default, (*arguments, torch.empty(768)))
    out = torch.empty(4, 64, dtype=torch.float16)
    box = [1, 5, 64, 128]
    torch.library.opcheck(OPS.expand4_slice_into.default, (*arguments, 6, 128, box, out))


@pytest.mark.parametrize("nested", [False, True])
def test_a_product_with_what_is_expanded_is_as_accurate_as_the_definition_s(nested: bool) -> None:
    weight = make_weight(nested=nested)
    rows = st.integers(0, 5).flatmap(
        lambda m: st.sampled_from(DTYPES[1:3]).map(lambda dtype: (torch.randn(m, 128).to(dtype),))
    )

    def ours(x: Tensor) -> Tensor:
        return x @ expand4(weight, x.dtype).t()

    def reference(x: Tensor) -> Tensor:
        return x @ define(weight, x.dtype).t()

    check_operator(ours, reference, inputs=rows, examples=5)


# --- without gradient, and memory of the caller's ------------------------------------------------


def test_nothing_expanded_asks_for_a_gradient() -> None:
    weight = make_weight()
    weight = weight._replace(scales=weight.scales.requires_grad_())
    assert not expand4(weight, torch.float32).requires_grad
    assert not expand4_slice(weight, 0, 2, 0, 64, torch.float32).requires_grad
    out = torch.empty(768)
    w = weight
    assert not dequantize4(*w[:3], 64, 768, out=out).requires_grad


def test_what_saved_the_caller_s_memory_notices_that_it_was_written() -> None:
    """Else a gradient would be computed from the new values in silence."""
    weight = make_weight()
    out = torch.ones(6, 128)
    leaf = torch.ones(6, 128, requires_grad=True)
    for write in (
        lambda: dequantize4(*weight[:3], 64, 768, out=out),
        lambda: expand4_slice(weight, 0, 6, 0, 128, torch.float32, out=out),
    ):
        product = (leaf * out).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@NATIVE
def test_expanding_in_inference_mode() -> None:
    weight = make_weight()
    with torch.inference_mode():
        out = torch.empty(6, 128)
        expand4_slice(weight, 0, 6, 0, 128, torch.float32, out=out)
        assert torch.equal(out, expand4(weight, torch.float32))
    assert torch.equal(out, define(weight, torch.float32))


@NATIVE
def test_on_meta_there_is_a_shape_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "auto")
    weight = Weight4(*(t.to("meta") for t in make_weight()[:3]), 6, 128, 64)
    assert expand4(weight, torch.float16).shape == (6, 128)
    part = expand4_slice(weight, 0, 2, 0, 64, torch.float16)
    assert (part.shape, part.dtype, part.device.type) == ((2, 64), torch.float16, "meta")


@NATIVE
@pytest.mark.parametrize("block", [3, 33, 48, 80])
def test_blocks_that_nothing_quantizes_to(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` never fails: the definition takes any size."""
    monkeypatch.setenv("LORA_KERNELS", "auto")
    codes, scales = torch.randint(0, 256, (100,), dtype=torch.uint8), torch.rand(-(-199 // block))
    index = torch.stack((codes >> 4, codes & 15), 1).view(-1)[:199].long()
    wanted = NF4[index] * scales.repeat_interleave(block)[:199]
    assert torch.equal(dequantize4(codes, scales, NF4, block, 199), wanted)
