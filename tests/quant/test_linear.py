"""NF4Linear: frozen, strict state, bit-equal codes through whatever a layer goes through."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.quant import NF4Linear, quantize_4bit

FROZEN = ("codes", "scales", "scale_absmax", "scale_offset")


def make(k: int = 128, n: int = 24, *, bias: bool = True, dq: bool = True, **options) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias), double_quant=dq, **options)


def frozen(layer: NF4Linear) -> dict[str, Tensor]:
    return {name: t.clone() for name in FROZEN if (t := getattr(layer, name)) is not None}


def assert_same_weight(layer: NF4Linear, before: dict[str, Tensor]) -> None:
    after = frozen(layer)
    assert after.keys() == before.keys()
    for name, t in before.items():
        assert after[name].dtype == t.dtype
        assert torch.equal(after[name], t), name


@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [128, 96, 33])
def test_the_state_is_tensors_under_fixed_names(k: int, bias: bool, dq: bool) -> None:
    state = make(k, 5, bias=bias, dq=dq).state_dict()
    blocks = -(-5 * k // 64)
    shape = (5, k // 2) if k % 64 == 0 else ((5 * k + 1) // 2,)
    expected = {"codes": (torch.uint8, shape)}
    if bias:
        expected["bias"] = (torch.float32, (5,))
    if dq:
        expected["scales"] = (torch.uint8, (blocks,))
        expected |= {
            "scale_absmax": (torch.float32, (-(-blocks // 256),)),
            "scale_offset": (torch.float32, ()),
        }
    else:
        expected["scales"] = (torch.float32, (blocks,))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == expected


@given(
    k=st.sampled_from([64, 96, 33, 1]),
    n=st.integers(1, 9),
    block=st.sampled_from([32, 64, 4096]),
    code=st.sampled_from(["nf4", "fp4", "fp4_e3m0", "int4"]),
    dq=st.booleans(),
    bias=st.booleans(),
)
def test_a_strict_round_trip(k: int, n: int, block: int, code: str, dq: bool, bias: bool) -> None:
    layer = make(k, n, bias=bias, dq=dq, block_size=block, code=code)
    options = {"code": code, "block_size": block, "double_quant": dq}
    x = torch.randn(3, k)
    for device, assign in (("cpu", False), ("meta", True)):
        other = NF4Linear(k, n, bias, device=device, **options)
        other.load_state_dict(layer.state_dict(), strict=True, assign=assign)
        assert torch.equal(other(x), layer(x))
        assert not any(p.requires_grad for p in other.parameters())
    empty = NF4Linear(k, n, bias, device="meta", **options).to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_state_that_does_not_fit_is_refused() -> None:
    layer = make()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale_absmax"):
        NF4Linear(128, 24, double_quant=False).load_state_dict(
            {**layer.state_dict(), "scales": torch.zeros(48)}
        )
    with pytest.raises(RuntimeError, match=r"Missing key.*scale_absmax"):
        make().load_state_dict(make(dq=False).state_dict() | {"scales": layer.scales})
    with pytest.raises(RuntimeError, match=r"size mismatch for codes"):
        layer.load_state_dict(make(192).state_dict())
    wrong = {**layer.state_dict(), "codes": layer.codes.float()}
    before = frozen(layer)
    for assign in (False, True):
        with pytest.raises(
            RuntimeError, match=r"codes must be torch\.uint8; the state has torch\.float32"
        ):
            layer.load_state_dict(wrong, assign=assign)
    assert_same_weight(layer, before)


def _use(layer: NF4Linear) -> NF4Linear:
    layer.train()(torch.randn(3, 128, requires_grad=True)).sum().backward()
    with torch.no_grad():
        layer.eval()(torch.randn(3, 128))
    layer.state_dict()
    return layer.train()


PASSAGES: dict[str, Callable[[NF4Linear], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double and back": lambda m: m.double().float(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device)": lambda m: m.to("cpu"),
    "type": lambda m: m.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "inside a model": lambda m: nn.Sequential(m).half()[0],
    "training, evaluation, saving": _use,
}


@pytest.mark.parametrize("passage", list(PASSAGES))
@pytest.mark.parametrize("dq", [False, True])
def test_nothing_changes_codes_or_scales(passage: str, dq: bool) -> None:
    layer = make(dq=dq)
    before, dense = frozen(layer), layer.dense_weight()
    x = torch.randn(33, 128)  # few rows are summed in another order, of W unrounded
    after = PASSAGES[passage](layer)
    assert_same_weight(after, before)
    assert torch.equal(after.dense_weight(), dense)
    assert torch.equal(after(x), nn.functional.linear(x, dense, after.bias.to(x.dtype)))


def test_the_bias_follows_and_the_output_has_the_dtype_of_x() -> None:
    layer = make().half()
    assert layer.bias.dtype == torch.float16
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(33, 128, dtype=dtype)
        expected = nn.functional.linear(x, layer.dense_weight(dtype), layer.bias.to(dtype))
        y = layer(x)
        assert y.dtype == dtype
        if dtype != torch.float16:
            assert torch.equal(y, expected)
            continue
        # C takes float16 through float32, which no two ways of summing round to the same bits
        dense, bias = layer.dense_weight(torch.float64), layer.bias.double()
        truth = nn.functional.linear(x.double(), dense, bias)
        error, baseline = ((t.double() - truth).abs().max() for t in (y, expected))
        assert error <= 2 * baseline + 2 * torch.finfo(dtype).eps * truth.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 128)).dtype == torch.bfloat16


def test_frozen_and_differentiable_in_x() -> None:
    layer = make()
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(3, -1), atol=1e-5)
    assert layer.bias.grad is None
    layer.bias.requires_grad_()  # what training biases asks for
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))


def test_a_new_layer_is_zeros_and_its_tables_are_real() -> None:
    layer = NF4Linear(64, 3)
    assert torch.equal(layer.dense_weight(), torch.zeros(3, 64))
    with torch.device("meta"):
        layer = NF4Linear(64, 3)
    assert layer.codes.is_meta
    assert layer(torch.zeros(2, 64, device="meta")).shape == (2, 3)  # shapes alone, as nn.Linear
    layer.load_state_dict(make(64, 3).state_dict(), assign=True)
    assert layer(torch.randn(2, 64)).isfinite().all()


def test_made_of_a_slice_of_rows() -> None:
    """What a tensor-parallel rank holds: some rows with their decoded scales."""
    layer = make(bias=False)
    part = NF4Linear.from_tensor(layer.quantized.rows(8, 16))
    x = torch.randn(3, 128)
    assert (part.out_features, part.double_quant) == (8, False)
    assert torch.allclose(part(x), layer(x)[:, 8:16], atol=1e-6)


def test_from_linear_leaves_the_linear_and_takes_its_mode() -> None:
    linear = nn.Linear(64, 3).eval()
    weight, bias = linear.weight.clone(), linear.bias.clone()
    layer = NF4Linear.from_linear(linear, code=torch.linspace(-1, 1, 16), block_size=32)
    assert not layer.training
    assert (layer.code, layer.block_size, layer.double_quant) == ("custom", 32, True)
    layer.bias.add_(1)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)
    wanted = quantize_4bit(weight, torch.linspace(-1, 1, 16), 32).dequantize()
    assert torch.equal(layer.dense_weight(), wanted)


@pytest.mark.parametrize("dq", [False, True])
def test_compiles_in_one_graph(dq: bool) -> None:
    torch._dynamo.reset()
    layer = make(dq=dq)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 128)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, eager = compiled(a), layer(b)
    ours.sum().backward()
    eager.sum().backward()
    assert torch.equal(ours, eager)
    assert torch.equal(a.grad, b.grad)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"q_proj must be a matrix \(N, K\); got \(2, 3, 4\)"):
        NF4Linear.from_tensor(torch.ones(2, 3, 4), name="q_proj")
    with pytest.raises(ValueError, match=r"bias must be \(4,\) for weight \(4, 64\); got \(5,\)"):
        NF4Linear.from_tensor(torch.ones(4, 64), torch.ones(5))
    with pytest.raises(ValueError, match="power of two from 32 to 4096; got 65"):
        NF4Linear(64, 4, block_size=65)
    with pytest.raises(ValueError, match="code must be one of nf4"):
        NF4Linear(64, 4, code="nf5")
    with pytest.raises(ValueError, match=r"in_features = 128; got shape \(3, 64\)"):
        make()(torch.ones(3, 64))


def test_printing_shows_what_it_is() -> None:
    assert "in_features=128, out_features=24, bias=True, code=nf4, block_size=64" in repr(make())


@pytest.mark.parametrize("dq", [False, True])
def test_shardable_scales_change_nothing_else(dq: bool) -> None:
    layer, x = make(128, dq=dq), torch.randn(3, 128)
    y, state = layer(x), layer.state_dict()
    for _ in range(2):
        layer.shardable()
        assert torch.equal(layer(x), y)
    assert isinstance(layer.scales, nn.Parameter)
    assert isinstance(layer.scale_absmax, nn.Parameter) == dq
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in layer.to("cpu").state_dict().items())


def test_tables_follow_codes_that_were_moved_by_hand() -> None:
    """FSDP moves parameters and buffers by `.data = …`, past every hook of a module."""
    layer, x = make(128), torch.randn(3, 128)
    y = layer(x)
    layer._table = layer._table.to("meta")  # as good as codes that have gone elsewhere
    assert layer.weight4.table.device == layer.codes.device
    assert torch.equal(layer(x), y)


# --- the kernels' backend ------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [128, 96])
def test_the_kernels_compute_the_same_layer(
    k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(k), torch.randn(2, 3, k).to(dtype).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("LORA_KERNELS", backend)
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        # three roundings in one dtype: of W, of the output, of the gradient's input
        bound = 3 * torch.finfo(dtype).eps * plain.abs().max() * k**0.5
        assert (ours - plain).abs().max() <= bound


@pytest.mark.usefixtures("kernels")
def test_a_rearranged_copy_changes_no_state_and_no_result() -> None:
    layer, x = make(256, 32), torch.randn(3, 256).bfloat16()
    before, plain, names = frozen(layer), layer(x), list(layer.state_dict())
    assert layer.arrange()
    assert layer.weight4.arranged is not None
    assert torch.equal(layer(x), plain)
    assert list(layer.state_dict()) == names
    assert_same_weight(layer, before)
    assert not layer.arrange(False)
    assert layer.weight4.arranged is None


@pytest.mark.usefixtures("kernels")
def test_a_rearranged_copy_never_outlives_its_codes() -> None:
    layer, other = make(256, 32), make(256, 32)
    layer.arrange()
    layer.load_state_dict(other.state_dict())
    assert layer.weight4.arranged is None
    layer.arrange()
    assert copy.deepcopy(layer).weight4.arranged is not layer.weight4.arranged
    layer.to(torch.float64)
    assert layer.weight4.arranged is None


def test_no_kernel_no_rearranged_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not make(256, 32).arrange()  # the reference reads codes as they are stored
    monkeypatch.setenv("LORA_KERNELS", "triton")
    assert not make(96, 5).arrange()  # rows that do not divide into what tensor cores read
