"""Trained biases: "lora_only", "all", and B's own."""

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
    LoRAConfig,
    adapted_modules,
    add_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.adapters.biases import TrainedBias, bias_site
from lora_core.quant import NF4Linear
from lora_core.testing.bounds import allowance, exceeds

Hold = Callable[..., None]
State = Callable[[nn.Module], dict[str, object]]
Same = Callable[[Tensor, Tensor], bool]

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear, one row": (lambda: nn.Linear(6, 4), (6,)),
    "4-bit": (lambda: NF4Linear.from_linear(nn.Linear(64, 4)), (3, 64)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (3, 2, 5)),
    "conv1d, unbatched": (lambda: nn.Conv1d(2, 4, 2), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3), (1, 2, 5, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 6)),
    "conv3d, unbatched": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 4, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 4, 3), (1, 2, 3, 4)),
    "transposed, unbatched": (lambda: nn.ConvTranspose1d(2, 4, 3), (2, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm over two": (lambda: nn.LayerNorm((4, 6)), (3, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 4)),
    "batch norm": (lambda: nn.BatchNorm1d(6), (3, 6)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(6), (3, 6, 4)),
    "batch norm of images": (lambda: nn.BatchNorm2d(6), (3, 6, 4, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(6, affine=True), (3, 6, 4)),
    "instance norm, unbatched": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 4)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bias_stands_in_the_place_of_the_module_s(
    kind: str, dtype: torch.dtype, same_bits: Same
) -> None:
    make, shape = KINDS[kind]
    base = make().to(dtype).eval()
    base.bias.data.normal_()
    host = Adapted(base.requires_grad_(False))
    host.attach("default", TrainedBias(base))
    host.active = ["default"]
    x = torch.randn(shape).to(dtype)
    y = base(x)
    assert same_bits(host(x), y)
    own = host.adapter("default").bias
    assert own.dtype == torch.float32
    with torch.no_grad():
        own.normal_()
    other = copy.deepcopy(base).double()
    other.bias.data = own.detach().double().requires_grad_()
    wide = x.double()
    truth = other(wide)
    y = host(x)
    # the base's own error: its output in the same dtype; ours: the difference and the sum
    spread = (base(x).double() - copy.deepcopy(base).double()(wide)).abs()
    terms = truth.abs() + 2 * base(x).double().abs() + host.adapter("default").bias0.abs().max() * 3
    bound = spread + allowance(4, torch.float32 if dtype == torch.float64 else dtype, 4) * terms
    fault = exceeds(y, truth, bound)
    assert fault is None, fault
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    (wanted,) = torch.autograd.grad(
        _with(other, wide, leaf := own.detach().double().requires_grad_()), leaf, dy.double()
    )
    count = dy.numel() // own.numel()
    size = count * dy.abs().max().double()
    fault = exceeds(own.grad, wanted, size * allowance(count + 1, _at_most32(dtype), 2))
    assert fault is None, fault
    assert base.bias.grad is None
    host.merge()
    merged = host(x)
    # (one rounding of the bias to the base's dtype more)
    fault = exceeds(merged, truth, 2 * bound + allowance(1, _at_most32(dtype), 2) * terms)
    assert fault is None, fault


def _with(module: nn.Module, x: Tensor, bias: Tensor) -> Tensor:
    return torch.func.functional_call(module, {"bias": bias}, (x,))


def _at_most32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else dtype


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).mean(2)
        return self.out(self.mix(h))


def added(model: nn.Module, **options: Any) -> nn.Module:
    add_adapter(model, LoRAConfig(**{"targets": ["mix", "out"], "r": 2, **options}))
    return model.eval()


def biases(model: nn.Module) -> list[str]:
    return [
        name.replace(".adapters.default", "")
        for name, p in model.named_parameters()
        if p.requires_grad and "bias" in name
    ]


def test_which_biases_are_trained() -> None:
    assert biases(added(Net())) == []
    assert biases(added(Net(), bias="lora_only")) == ["out.bias"]
    assert biases(added(Net(), bias="all")) == ["conv.bias", "norm.bias", "out.bias"]
    assert biases(added(Net(), lora_bias=True)) == ["mix.up_bias", "out.up_bias"]
    assert biases(added(Net(), bias="all", modules_to_save=["norm"])) == [
        "conv.bias",
        "norm.copy.bias",
        "out.bias",
    ]
    kinds = {
        site: type(host.adapter("default"))
        for site, host in adapted_modules(added(Net(), bias="all"))
    }
    assert kinds["conv"] is kinds["norm"] is TrainedBias
    with pytest.raises(ValueError, match="bias must be one of 'none', 'all', 'lora_only', got 'al"):
        LoRAConfig(bias="al")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_until_it_is_trained(
    bias: str, dtype: torch.dtype, same_bits: Same
) -> None:
    model = Net().to(dtype).eval()
    x = torch.randn(2, 3, 5).to(dtype)
    y = model(x)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    added(model, bias=bias, lora_bias=True)
    assert same_bits(model(x), y)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
    changed = model(x)
    assert not torch.equal(changed, y)
    with disable_adapters(model):  # PEFT's cannot: it trains the base's own vector
        assert same_bits(model(x), y)
    merge_adapters(model)
    assert (model(x) - changed).abs().max() <= 64 * torch.finfo(dtype).eps * changed.abs().max()
    unload_adapters(model)
    assert same_bits(model(x), y)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


def test_a_base_without_bias_gets_one_when_it_is_merged() -> None:
    model = added(Net(), lora_bias=True, alpha=8)
    pair = model.mix.adapter("default")
    with torch.no_grad():
        pair.up_bias.fill_(1.0)
    x = torch.randn(3, 6)
    assert torch.equal(model.mix(x) - model.mix.base(x) != 0, torch.ones(3, 6, dtype=torch.bool))
    y = model.mix(x)
    model.mix.merge()
    assert torch.equal(model.mix.merged.module.bias, torch.full((6,), 4.0))  # scaled with B
    assert (model.mix(x) - y).abs().max() <= 1e-5
    assert model.mix.base.bias is None


@given(
    kind=st.sampled_from(["linear", "4-bit", "conv"]),
    own=st.booleans(),
    up=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rslora=st.booleans(),
)
def test_beside_a_pair(
    kind: str, own: bool, up: bool, dtype: torch.dtype, rslora: bool, hold_to_dense: Hold
) -> None:
    base: nn.Module = nn.Conv1d(4, 4, 3, groups=2) if kind == "conv" else nn.Linear(64, 4)
    base = (NF4Linear.from_linear(base) if kind == "4-bit" else base).to(dtype)
    model = nn.Sequential(base)
    options = {"bias": "lora_only" if own else "none", "lora_bias": up, "use_rslora": rslora}
    add_adapter(model, LoRAConfig(targets=["0"], r=2, **options))
    with torch.no_grad():
        for p in model[0].adapters.parameters():
            p.add_(torch.randn(p.shape))
    x = torch.randn(2, 4, 5) if kind == "conv" else torch.randn(3, 64)
    hold_to_dense(model[0], x.to(dtype))


def test_two_adapters_add_their_changes() -> None:
    model = Net().eval()
    add_adapter(model, LoRAConfig(targets=["out"], r=2, bias="all"), "a")
    add_adapter(model, LoRAConfig(targets=["out"], r=2, bias="lora_only"), "b")
    set_adapters(model, ["a", "b"])
    x = torch.randn(3, 6)
    y = model.out(x)
    with torch.no_grad():
        model.out.adapter("a").bias.add_(1.0)
        model.out.adapter("b").bias.add_(2.0)
    assert torch.allclose(model.out(x), y + 3.0, atol=1e-6)
    merge_adapters(model)
    assert torch.allclose(model.out(x), y + 3.0, atol=1e-6)


def test_float32_beside_16_bits_through_moves() -> None:
    model = added(Net(), bias="all")
    model.to(torch.bfloat16)
    pair = model.out.adapter("default")
    for tensor in (pair.bias, pair.bias0, model.norm.adapter("default").bias0):
        assert tensor.dtype == torch.float32
    with torch.no_grad():
        pair.bias.fill_(1.0)
        for _ in range(100):
            pair.bias.add_(1e-4)
    assert torch.allclose(pair.bias, torch.tensor(1.01), atol=1e-5)


def test_state_dict_round_trip() -> None:
    model, other = added(Net(), bias="all"), added(Net(), bias="all")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    x = torch.randn(2, 3, 5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_bias_of_an_unknown_kind_is_refused(state_of: State) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + self.bias)

    assert bias_site(Odd()) is None
    assert bias_site(nn.ReLU()) is False
    assert bias_site(nn.Linear(2, 2, bias=False)) is False
    model = nn.Sequential(nn.Linear(6, 6), Odd())
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"'1' is a Odd, and where its bias enters .* modules_to_sav"
    ):
        add_adapter(model, LoRAConfig(targets=["0"], r=2, bias="all"))
    assert state_of(model) == before
    add_adapter(model, LoRAConfig(targets=["0"], r=2, bias="all", modules_to_save=["1"]))


def test_an_embedding_has_no_bias(state_of: State) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    before = state_of(model)
    with pytest.raises(
        ValueError, match="an embedding has no bias: lora_bias cannot be used there"
    ):
        add_adapter(model, LoRAConfig(targets=["0"], r=2, lora_bias=True))
    assert state_of(model) == before
    add_adapter(model, LoRAConfig(targets=["0"], r=2, bias="all"))
    assert model[0].adapter("default").bias is None


def test_a_shared_module_has_one_bias() -> None:
    lin = nn.Linear(6, 6)
    model = nn.Sequential(lin, nn.Linear(6, 6), lin)
    add_adapter(model, LoRAConfig(targets=["1"], r=2, bias="all"))
    assert model[0] is model[2]
    assert isinstance(model[0].adapter("default"), TrainedBias)
