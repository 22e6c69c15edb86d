"""PEFT as the judge of every kind of LoRA: the same weights in, the same outputs and gradients.

Both libraries run the same float32 or bfloat16 layer; the truth is this library's formula computed
in float64 by a copy of the whole model with merged weights, and either may err by twice what the
other does, and by two roundings of the largest value (as for kernels). PiSSA and OLoRA change
PEFT's base, so there the outputs are compared, not the weights.
"""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, adapted_modules, add_adapter, merge_adapters
from lora_core.adapters.dora import DoRA
from lora_core.adapters.lora import LoRA

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.up(x))) + x))


class Gpt(nn.Module):
    """transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_fc, self.c_proj = Conv1D(20, 12), Conv1D(12, 20)
        for part in (self.c_fc, self.c_proj):
            nn.init.normal_(part.weight, std=0.3)
            nn.init.normal_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.tanh(self.c_fc(x)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.embed(ids)))


class Padded(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=4)


class Convolutions(nn.Module):
    def __init__(self, dims: int, groups: int, **options: Any) -> None:
        super().__init__()
        make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first = make(4, 8, 3, groups=groups, **{"padding": 1, **options})
        self.second = make(8, 6, 2, groups=groups, bias=False)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


IDS = torch.tensor([[0, 4, 4, 10], [3, 9, 4, 1]])


def vectors() -> Tensor:
    return torch.randn(3, 12)


def images(dims: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 4, *(5, 6, 4)[:dims])


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any], dict[str, Any]]
MLP = (Mlp, vectors)
FC = {"targets": ["c_fc", "c_proj"]}
CASES: dict[str, Case] = {
    "linear": (*MLP, {}, {}),
    "rslora": (*MLP, {"use_rslora": True}, {"use_rslora": True}),
    "patterns": (
        *MLP,
        {"rank_pattern": {"up": 2, "hea.": 4}, "alpha_pattern": {"down": 7}},
        {"rank_pattern": {"up": 2, "hea.": 4}, "alpha_pattern": {"down": 7}},
    ),
    "dora": (*MLP, {"use_dora": True}, {"use_dora": True}),
    "dora, rslora": (*MLP, *[{"use_dora": True, "use_rslora": True}] * 2),
    "bias of the targets": (*MLP, {"bias": "lora_only"}, {"bias": "lora_only"}),
    "all biases": (*MLP, {"bias": "all", "targets": ["up"]}, {"bias": "all"}),
    "lora_bias": (
        *MLP,
        {"lora_bias": True, "targets": ["up", "head"]},
        {"lora_bias": True},
    ),
    "full copies": (
        *MLP,
        {"modules_to_save": ["norm", "head"], "targets": ["up", "down"]},
        {"modules_to_save": ["norm", "head"]},
    ),
    "Conv1D": (Gpt, vectors, FC, {"fan_in_fan_out": True}),
    "Conv1D, dora": (
        Gpt,
        vectors,
        {**FC, "use_dora": True},
        {"fan_in_fan_out": True, "use_dora": True},
    ),
    "embedding": (Tokens, lambda: IDS, {"targets": ["embed", "mix"]}, {}),
    "embedding, padded": (Padded, lambda: IDS, {"targets": ["embed"]}, {}),
    "embedding, dora": (
        Tokens,
        lambda: IDS,
        {"targets": ["embed"], "use_dora": True},
        {"use_dora": True},
    ),
    **{
        f"conv{d}d{', groups' if g > 1 else ''}{', ' + name if name else ''}": (
            lambda d=d, g=g, options=options: Convolutions(d, g, **options),
            images(d),
            {"targets": ["first", "second"]},
            {},
        )
        for d, g, name, options in [
            (1, 1, "", {}),
            (2, 1, "", {}),
            (3, 1, "", {}),
            (1, 2, "", {}),
            (2, 2, "", {}),
            (2, 2, "strided", {"stride": 2, "padding": (0, 2)}),
            (3, 2, "strided", {"stride": (1, 2, 1)}),
            (1, 1, "same", {"padding": "same"}),
        ]
    },
    **{
        f"conv{d}d, dora": (
            lambda d=d: Convolutions(d, 1),
            images(d),
            {"targets": ["first", "second"], "use_dora": True},
            {"use_dora": True},
        )
        for d in (1, 2, 3)
    },
}


def built(
    make: Callable[[], nn.Module], options: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, nn.Module, list[str]]:
    """A model under our adapter, its plain twin, and the targets."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    plain = copy.deepcopy(model)
    config = LoRAConfig(**{"r": 4, "alpha": 6, "targets": ["up", "down", "head"], **options})
    add_adapter(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)
    return model, plain, list(config.targets)


Shared = list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]


def theirs(
    peft: ModuleType, ours: nn.Module, plain: nn.Module, targets: list[str], options: dict[str, Any]
) -> tuple[nn.Module, Shared]:
    """PEFT's model with our weights, and the parameters both have: (ours, theirs, to our shape)."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets, **options}
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(**given)).eval()
    known = dict(wrapped.base_model.model.named_parameters())
    shared: Shared = []  # ours, theirs, and how to compare
    for site, host in adapted_modules(ours):
        adapter = host.adapter("default")
        if isinstance(adapter, LoRA):
            for key, tensor in adapter.tensors().items():
                own = _own(adapter, key)
                assert tensor.numel() == own.numel()
                shared.append((own, known[_their_name(site, key)], _shape_of(own)))
        else:
            inner = "modules_to_save.default." if adapter.replaces else ""
            for key, p in adapter.tensors().items():
                shared.append((p, known[f"{site}.{inner}{key}"], _shape_of(p)))
    with torch.no_grad():
        for own, other, _ in shared:
            other.copy_(_layout(own, other))
    trained = {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert {id(other) for _, other, _ in shared} == trained  # nothing is left out
    return wrapped, shared


def _own(adapter: LoRA, key: str) -> Tensor:
    """The parameter behind a saved tensor."""
    names = dict(zip(adapter.form.names(), (adapter.A, adapter.B), strict=True))
    names |= {"lora_B.bias": adapter.up_bias, "base_layer.bias": adapter.bias}
    if key == "lora_magnitude_vector":
        return adapter.magnitude
    return names[key]


def _their_name(site: str, key: str) -> str:
    if key == "base_layer.bias":
        return f"{site}.{key}"
    kind, _, end = key.partition(".")
    end = "weight" if kind == "lora_magnitude_vector" else end
    return f"{site}.{kind}.default" + (f".{end}" if end else "")


def _shape_of(own: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes PEFT's tensor to our shape; of a grouped convolution's A the groups' blocks.

    PEFT's A sees all channels there, ours those of its own group: it is the same function where the
    rest of PEFT's A is zero.
    """

    def take(other: Tensor) -> Tensor:
        if other.numel() == own.numel():
            return other.reshape(own.shape)
        g = other.numel() // own.numel()
        rows = other.view(g, len(other) // g, g, -1)  # (g, r/g, g, C/g · |kernel|)
        return torch.stack([rows[j, :, j] for j in range(g)]).reshape(own.shape)

    return take


def _layout(own: Tensor, other: Tensor) -> Tensor:
    if other.numel() == own.numel():
        return own.detach().reshape(other.shape)
    g = other.numel() // own.numel()
    wide = other.new_zeros(g, len(other) // g, g, own.numel() // len(other))
    for j, rows in enumerate(own.detach().view(g, len(other) // g, -1)):
        wide[j, :, j] = rows
    return wide.view(other.shape)


def gradients(model: nn.Module, y: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return list(torch.autograd.grad(y, parameters, dy))


def precise(model: nn.Module) -> nn.Module:
    """The adapted model in float64, its adapter's numbers too."""
    wide = copy.deepcopy(model).double()
    for _, host in adapted_modules(wide):
        for p in host.adapters.parameters():
            p.data = p.data.double()
        for adapter in host.adapters.values():
            if isinstance(adapter, LoRA):
                adapter._scale = torch.full((1,), adapter.scaling, dtype=torch.float64)
            if isinstance(adapter, DoRA):
                adapter.measure(host.base)
    return wide


def as_accurate(ours: Tensor, other: Tensor, truth: Tensor, what: str) -> None:
    """Both within twice the other's error and two roundings of the largest value."""
    eps = torch.finfo(other.dtype).eps if other.dtype == torch.bfloat16 else 2**-23
    room = 2 * eps * truth.abs().max().item() + 1e-30
    errors = [(t.detach().double() - truth).abs().max().item() for t in (ours, other)]
    assert errors[0] <= 2 * errors[1] + room, f"{what}: ours {errors[0]}, PEFT's {errors[1]}"
    assert errors[1] <= 2 * errors[0] + room, f"{what}: ours {errors[0]}, PEFT's {errors[1]}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_weights_same_outputs_same_gradients(
    name: str, dtype: torch.dtype, peft: ModuleType
) -> None:
    make, inputs, here, there = CASES[name]
    ours, plain, targets = built(make, here, dtype)
    other, shared = theirs(peft, ours, plain, targets, there)
    x = inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    if dtype == torch.bfloat16 and (name == "full copies" or "bias" in name):
        # PEFT keeps these in the base's dtype; ours are float32 masters of the same numbers
        with torch.no_grad():
            for own, _, _ in shared:
                own.copy_(own.bfloat16())
    y, z = ours(x), other(x)
    wide = precise(ours)
    truth = wide(x.double() if x.is_floating_point() else x)
    assert y.dtype == z.dtype == dtype
    assert not torch.equal(y, plain_output(ours, x))
    as_accurate(y, z, truth.detach(), "output")
    own = [p for p, _, _ in shared]
    names = {id(p): key for key, p in ours.named_parameters()}
    known = dict(wide.named_parameters())
    got = gradients(ours, y, own)
    told = gradients(other, z, [p for _, p, _ in shared])
    exact = gradients(wide, truth, [known[names[id(p)]] for p in own])
    for (p, _, take), a, b, c in zip(shared, got, told, exact, strict=True):
        as_accurate(a, take(b).to(dtype), c, f"gradient of {names[id(p)]}")


def plain_output(model: nn.Module, x: Tensor) -> Tensor:
    from lora_core.adapters import disable_adapters

    with disable_adapters(model), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_subtracted_starts_are_pefts_changed_bases(
    init: str, use_rslora: bool, peft: ModuleType
) -> None:
    """The same decomposition: PEFT writes W - s B0 A0, here it stays beside W."""
    torch.manual_seed(0)
    model = Mlp().eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    plain = copy.deepcopy(model)
    x = vectors()
    options = {"use_rslora": use_rslora, "r": 4}
    add_adapter(model, LoRAConfig(targets=["up", "down"], init=init, alpha=6, **options))
    config = peft.LoraConfig(
        target_modules=["up", "down"], init_lora_weights=init, lora_alpha=6, **options
    )
    other = peft.get_peft_model(plain, config).eval()
    at_start = model(x)
    for site, host in adapted_modules(model):
        layer, pair = other.base_model.model.get_submodule(site), host.adapter("default")
        A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
        # singular vectors have a sign each; the pair of them is the same
        size = 64 * torch.finfo(torch.float32).eps * host.base.weight.norm()
        assert ((B @ A - pair.B @ pair.A).abs() <= size).all()
        residual = host.base.weight - pair.scaling * pair.B0 @ pair.A0
        assert ((layer.base_layer.weight - residual).abs() <= size).all()
        assert torch.equal(host.base.weight, weights[f"{site}.weight"])
        with torch.no_grad():
            for own, theirs_ in ((pair.A, A), (pair.B, B)):  # take PEFT's, and train from there
                (pair.A0 if own is pair.A else pair.B0).copy_(theirs_)
                own.copy_(theirs_ + 0.1 * torch.randn(own.shape))
                theirs_.copy_(own)
    y, z = model(x), other(x)
    eps = torch.finfo(torch.float32).eps
    assert (at_start - z).abs().max() > 1e-3
    assert (y - z).abs().max() <= 256 * eps * y.abs().max()
    pairs = [h.adapter("default") for _, h in adapted_modules(model)]
    own = [p for pair in pairs for p in (pair.A, pair.B)]
    told = [p for p in other.parameters() if p.requires_grad]
    for a, b in zip(gradients(model, y, own), gradients(other, z, told), strict=True):
        assert (a - b).abs().max() <= 1024 * eps * b.abs().max()


@pytest.mark.parametrize("name", ["dora", "rslora", "all biases", "conv2d", "embedding", "Conv1D"])
def test_merged_weights_agree(name: str, peft: ModuleType) -> None:
    make, _, here, there = CASES[name]
    ours, plain, targets = built(make, here, torch.float32)
    other, _ = theirs(peft, ours, plain, targets, there)
    merged = other.merge_and_unload()
    merge_adapters(ours)
    for site, host in adapted_modules(ours):
        module = merged.get_submodule(site)
        for key in ("weight", "bias"):
            a, b = (getattr(m, key, None) for m in (host.merged.module, module))
            assert (a is None) == (b is None), (site, key)
            if a is not None:
                assert ((a - b).abs() <= 16 * torch.finfo(a.dtype).eps * b.abs().max()).all(), site


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect"}, {"padding": "same", "dilation": 2}], ids=str
)
def test_convolutions_that_peft_runs_as_others(options: dict[str, Any], peft: ModuleType) -> None:
    """Its A has the base's stride and padding, not its dilation or padding mode.

    So its merged model is right (and ours), and its unmerged one is another function.
    """
    torch.manual_seed(0)
    ours, plain, targets = built(
        lambda: Convolutions(2, 1, **options), {"targets": ["first", "second"]}, torch.float32
    )
    other, _ = theirs(peft, ours, plain, targets, {})
    x = images(2)()
    y = ours(x)
    room = 64 * torch.finfo(y.dtype).eps * y.abs().max()
    assert (other(x) - y).abs().max() > 1e3 * room
    assert (other.merge_and_unload()(x) - y).abs().max() <= room


def test_what_peft_refuses_works_here() -> None:
    """PEFT cannot merge a grouped convolution, or train B's bias beside DoRA."""
    for options in ({}, {"use_dora": True, "lora_bias": True}):
        torch.manual_seed(0)
        model = Convolutions(2, 2).eval()
        add_adapter(model, LoRAConfig(r=4, targets=["first", "second"], **options))
        with torch.no_grad():
            for _, host in adapted_modules(model):
                for p in host.adapters.parameters():
                    p.add_(torch.randn(p.shape), alpha=0.2)
        x = images(2)()
        y = model(x)
        merge_adapters(model)
        assert (model(x) - y).abs().max() <= 64 * torch.finfo(y.dtype).eps * y.abs().max()
