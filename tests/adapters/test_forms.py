"""LoRA on every kind of layer, held to its dense formula in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRA,
    LoRAConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
)
from lora_core.adapters.forms import ConvForm, EmbeddingForm, Form, TransposedForm, form_of
from lora_core.quant import NF4Linear

Hold = Callable[..., None]
Same = Callable[[Tensor, Tensor], bool]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Conv1D(nn.Module):
    """The layout of transformers' Conv1D: weight (K, N)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Box(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, fill: bool = True, **options: Any) -> Adapted:
    """The layer under a LoRA whose numbers matter beside the layer's."""
    model = Box(layer)
    add_adapter(model, LoRAConfig(targets=["layer"], **options))
    host = model.layer
    assert isinstance(host, Adapted)
    if fill:
        filled(host)
    return host


def filled(host: Adapted, seed: int = 3) -> Adapted:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in host.adapters.parameters():
            fan = p.shape[-1] if p.dim() > 1 else 1
            p.add_(torch.randn(p.shape, generator=generator) / fan**0.5)
    return host


@st.composite
def convolutions(draw: Any, dims: Any = (1, 2, 3)) -> tuple[nn.Module, Tensor, int]:
    """(layer, input, groups): every stride, dilation and padding, batched or not."""
    d = draw(st.sampled_from(dims))
    g = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * d))
    stride = draw(st.tuples(*[st.integers(1, 2)] * d))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * d))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.tuples(*[st.integers(0, 2)] * d))
    if draw(st.booleans()):
        padding, stride = draw(st.sampled_from(["same", "valid"])), (1,) * d
    if padding == "valid":
        mode = "zeros"
    channels = (g * draw(st.integers(1, 3)), g * draw(st.integers(1, 3)))
    bias = draw(st.booleans())
    layer = CONVOLUTIONS[d](
        *channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=g,
        bias=bias,
        padding_mode=mode,
    )
    size = draw(st.tuples(*[st.integers(5, 7)] * d))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return layer, torch.randn(*batch, channels[0], *size), g


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(
    case=convolutions(),
    dtype=st.sampled_from(DTYPES),
    rank=st.integers(1, 2),
    rslora=st.booleans(),
)
def test_convolutions(
    case: tuple[nn.Module, Tensor, int],
    dtype: torch.dtype,
    rank: int,
    rslora: bool,
    hold_to_dense: Hold,
) -> None:
    layer, x, g = case
    f = form_of(layer)
    assert f is not None
    pair = LoRA(f.in_features, f.out_features, rank * g, 3, form=f, use_rslora=rslora)
    host = Adapted(layer.to(dtype).requires_grad_(False))
    host.attach("default", pair)
    host.active = ["default"]
    x = x.to(dtype)
    assert torch.equal(host(x), layer(x))
    hold_to_dense(filled(host), x)
    assert pair.B.shape == (f.out_features, rank)


@given(
    k=st.integers(1, 20),
    n=st.integers(1, 20),
    lead=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["linear", "no bias", "transposed", "4-bit"]),
    rslora=st.booleans(),
)
def test_linear_layers(
    k: int,
    n: int,
    lead: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    rslora: bool,
    hold_to_dense: Hold,
) -> None:
    layer: nn.Module = Conv1D(n, k) if kind == "transposed" else nn.Linear(k, n, kind != "no bias")
    layer = NF4Linear.from_linear(layer) if kind == "4-bit" else layer
    host = adapted(layer.to(dtype), r=1, alpha=3, use_rslora=rslora)
    if lead == () and kind == "transposed":
        lead = (1,)
    hold_to_dense(host, torch.randn(*lead, k).to(dtype))


@given(
    v=st.integers(1, 12),
    d=st.integers(1, 9),
    lead=st.sampled_from([(), (1,), (7,), (2, 5)]),
    dtype=st.sampled_from(DTYPES),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_embeddings(
    v: int,
    d: int,
    lead: tuple[int, ...],
    dtype: torch.dtype,
    padded: bool,
    seed: int,
    hold_to_dense: Hold,
) -> None:
    layer = nn.Embedding(v, d, padding_idx=v - 1 if padded else None).to(dtype)
    ids = torch.randint(v, lead, generator=torch.Generator().manual_seed(seed))
    host = adapted(layer, fill=False, r=1, alpha=2)
    assert torch.equal(host(ids), layer(ids))
    hold_to_dense(filled(host), ids)


def test_the_padding_token_is_not_trained() -> None:
    host = adapted(nn.Embedding(5, 3, padding_idx=2), r=2)
    host(torch.tensor([2, 1, 2])).sum().backward()
    gradient = host.adapter("default").A.grad
    assert not gradient[:, 2].any()
    assert gradient[:, 1].all()


def test_gradients_of_a_token_add_up_in_float32(hold_to_dense: Hold) -> None:
    """4096 times the same token: summed in bfloat16 its gradient would stop growing at 256."""
    host = adapted(nn.Embedding(3, 1).bfloat16(), fill=False, r=1, alpha=1)
    pair = host.adapter("default")
    pair.B.data.fill_(1.0)
    host(torch.zeros(4096, dtype=torch.int64)).sum().backward()
    assert pair.A.grad[0].tolist() == [4096.0, 0.0, 0.0]


def test_scaled_embeddings_scale_their_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(1)
    host = adapted(Scaled(7, 4), r=2)
    ids = torch.arange(7)
    y = host(ids)
    weight = host.base.weight + host.adapter("default").delta_weight()
    u = torch.finfo(torch.float32).eps
    size = 3 * (host.base.weight.abs() + host.adapter("default").delta_weight().abs() + 1)
    assert ((y - 3 * weight).abs() <= 8 * u * size).all()
    host.merge()
    assert ((host(ids) - 3 * weight).abs() <= 8 * u * size).all()


def test_which_modules_have_a_form() -> None:
    kinds = {
        nn.Linear(2, 3): Form(2, 3),
        NF4Linear.from_linear(nn.Linear(64, 3)): Form(64, 3),
        Conv1D(3, 2): TransposedForm(2, 3),
        nn.Embedding(5, 3): EmbeddingForm(5, 3),
        nn.Conv1d(4, 6, 3): ConvForm(12, 6, 1, (3,)),
        nn.Conv2d(4, 6, (3, 2), groups=2): ConvForm(12, 6, 2, (3, 2)),
        nn.Conv3d(1, 2, 2): ConvForm(8, 2, 1, (2, 2, 2)),
        nn.Embedding(5, 3, max_norm=1.0): None,  # changes its weight when it is called
        nn.ConvTranspose2d(4, 6, 3): None,
        nn.LayerNorm(3): None,
        nn.EmbeddingBag(5, 3): None,
    }
    for module, form in kinds.items():
        assert form_of(module) == form, module
        if form is not None and hasattr(module, "weight"):
            weight = module.weight.detach()
            assert form.matrix(weight).shape == (form.out_features, form.in_features)
            assert torch.equal(form.weight(form.matrix(weight)), weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 4), torch.randn(3, 6)),
    "4-bit": (lambda: NF4Linear.from_linear(nn.Linear(64, 4)), torch.randn(3, 64)),
    "transposed": (lambda: Conv1D(4, 6), torch.randn(3, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), torch.tensor([[0, 8, 3], [3, 3, 1]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), torch.randn(2, 4, 5)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        torch.randn(4, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), torch.randn(1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [-1.0, 2.0])
def test_a_new_adapter_leaves_every_bit(
    kind: str, dtype: torch.dtype, alpha: float, same_bits: Same
) -> None:
    make, x = LAYERS[kind]
    layer = make().to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    for scale in (1.0, 0.0, -0.0):  # outputs that are zeros of either sign too
        if isinstance(layer, nn.Embedding):
            layer.weight.data.mul_(scale)
        x = x * scale if x.is_floating_point() else x
        if getattr(layer, "bias", None) is not None and scale != 1:
            layer.bias.data.mul_(scale)
        host = adapted(copy.deepcopy(layer), fill=False, r=2, alpha=alpha)
        assert same_bits(host(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_computes_in_its_dtype(kind: str) -> None:
    make, x = LAYERS[kind]
    host = adapted(make(), r=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, plain = host(x), host.base(x)
        y.float().sum().backward()
    assert y.dtype == plain.dtype
    assert not torch.equal(y, plain)
    # in 16 bits, nothing worse: both lie within its rounding of the float32 output
    exact = host(x)
    assert (y.float() - exact).abs().max() <= 2**-4 * exact.abs().max()
    assert all(p.grad.dtype == torch.float32 for p in host.adapters.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_functional_call(kind: str) -> None:
    make, x = LAYERS[kind]
    host = adapted(make(), r=2).eval()
    model = Box(host)
    state = {k: v + 0.1 if v.is_floating_point() else v for k, v in model.named_parameters()}
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for key, p in moved.named_parameters():
            p.copy_(state[key])
    assert torch.equal(torch.func.functional_call(model, state, (x,)), moved(x))


@pytest.mark.parametrize("kind", ["embedding", "conv1d"])
def test_one_graph(kind: str) -> None:
    make, x = LAYERS[kind]
    host = adapted(make(), r=2).eval()
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), host(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_state_and_disabling(kind: str, same_bits: Same) -> None:
    make, x = LAYERS[kind]
    torch.manual_seed(4)
    host = adapted(make(), r=2)
    torch.manual_seed(4)
    other = adapted(make(), r=2, fill=False)
    assert not torch.equal(other(x), host(x))
    other.load_state_dict(host.state_dict())
    assert same_bits(other(x), host(x))
    with disable_adapters(host):
        assert same_bits(host(x), host.base(x))
    for p in host.to(torch.float16).adapters.parameters():
        assert p.dtype == torch.float32


def test_group_ranks(state_of: Callable[[nn.Module], dict[str, object]]) -> None:
    model = Box(nn.Conv1d(4, 6, 3, groups=2))
    before = state_of(model)
    with pytest.raises(ValueError, match="r must be a multiple of the 2 groups, got 3"):
        add_adapter(model, LoRAConfig(r=3, targets=["layer"]))
    assert state_of(model) == before


def test_a_whole_model_of_convolutions() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    y = net(x)
    report = add_adapter(net, LoRAConfig(r=4, targets=lambda name, module: True))
    assert [site for site, _ in adapted_modules(net)] == ["0", "2", "4"]
    assert report.parameters == (4 * 27 + 8 * 4) + (4 * 18 + 8) + 4 * (8 * 36 + 5)
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_shapes_on_the_meta_device(kind: str) -> None:
    """It has no autocast, and may not be asked for it."""
    layer = nn.Linear(4, 6) if kind == "linear" else nn.Conv1d(4, 6, 3)
    x = torch.randn(2, 4, 8).transpose(1, 2) if kind == "linear" else torch.randn(2, 4, 8)
    host = adapted(layer, r=2)
    shape = host(x).shape
    assert host.to("meta")(x.to("meta")).shape == shape
