"""Full copies of modules: trained whole in float32, called in the base's place."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    Adapted,
    LoRAConfig,
    adapted_modules,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.full import FullCopy
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter
from lora_core.quant import quantize_model

State = Callable[[nn.Module], dict[str, object]]
Same = Callable[[Tensor, Tensor], bool]


class Net(nn.Module):
    """A convolution net with norms, a block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(h + self.block(h))


def config(*modules: str, **options: Any) -> LoRAConfig:
    given = {"targets": ["conv"], "r": 2, "modules_to_save": list(modules), **options}
    return LoRAConfig(**given)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: nn.Module, x: Tensor, lr: float = 0.1) -> None:
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=lr)
                p.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_copy_trains_as_the_module_would(dtype: torch.dtype) -> None:
    model = Net().to(dtype).eval()
    plain = copy.deepcopy(model)
    x = images(dtype)
    report = add_adapter(model, config("block", "head"))
    assert report.sites == ("conv", "block", "head")
    assert torch.equal(model(x), plain(x))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"conv", "block", "head"}
    for host in (model.block, model.head):
        assert all(p.dtype == torch.float32 for p in host.adapters.parameters())
    plain.requires_grad_(False)
    for part in (plain.block, plain.head):
        part.requires_grad_(True)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for part in ("block", "head"):
        own = dict(getattr(model, part).adapter("default").copy.named_parameters())
        for key, p in getattr(plain, part).named_parameters():
            assert own[key].grad.dtype == torch.float32
            assert torch.equal(own[key].grad, p.grad.float()), key
    for host in (model.block, model.head):
        assert all(p.grad is None for p in host.base.parameters())


def test_small_steps_are_kept_beside_a_16_bit_base() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    model[1].weight.data.fill_(1.0)
    add_adapter(model, LoRAConfig(targets=["0"], r=2, modules_to_save=["1"]))
    own = model[1].adapter("default").copy.weight
    with torch.no_grad():
        for _ in range(1000):
            own += 1e-5  # a thousandth of what bfloat16 can add to 1
    assert torch.allclose(own, torch.tensor(1.01), atol=1e-4)
    x = torch.eye(4).bfloat16()
    assert torch.equal(model[1](x), x @ own.bfloat16().T + model[1].base.bias)
    assert model[1](x).dtype == torch.bfloat16


def test_disabling_switching_and_deleting_give_the_base_back(same_bits: Same) -> None:
    model = Net().eval()
    x = images()
    y = model(x)
    original = {k: v.clone() for k, v in model.state_dict().items()}
    head = model.head
    add_adapter(model, config("head"), "a")
    step(model, x)
    first = model(x)
    add_adapter(model, config("head"), "b")
    assert same_bits(model(x), y)  # the copy is the base's, not a's
    step(model, x, 0.2)
    second = model(x)
    assert not torch.equal(first, second)
    set_adapters(model, "a")
    assert same_bits(model(x), first)
    set_adapters(model, "b")
    with disable_adapters(model):
        assert same_bits(model(x), y)
    delete_adapter(model, "a")
    assert same_bits(model(x), second)
    delete_adapter(model, "b")
    assert model.head is head
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_puts_the_copy_in_place(dtype: torch.dtype) -> None:
    model = Net().to(dtype).eval()
    x = images(dtype)
    add_adapter(model, config("block", "head", "norm"))
    step(model, x)
    y = model(x)
    with disable_adapters(model):
        plain = model(x)
    merge_adapters(model)
    merged = model(x)
    tolerance = 64 * torch.finfo(dtype).eps * y.abs().max()  # the convolution's update alone
    assert (merged - y).abs().max() <= tolerance
    assert (y - plain).abs().max() > tolerance
    unmerge_adapters(model)
    assert torch.equal(model(x), y)
    copied = {k: v.clone() for k, v in model.head.adapter("default").copy.state_dict().items()}
    unload_adapters(model, merge=True)
    assert torch.equal(model(x), merged)
    assert type(model.head) is nn.Linear
    assert torch.equal(model.head.weight, copied["weight"].to(dtype))
    assert not any(p.requires_grad for p in model.parameters())


def test_running_means_are_the_copy_s_own() -> None:
    model = Net().train()
    before = {k: v.clone() for k, v in model.norm.state_dict().items()}
    add_adapter(model, config("norm"))
    for _ in range(3):
        model(images() + 1)
    own = model.norm.adapter("default").copy
    assert own.num_batches_tracked == 3
    assert (own.running_mean != before["running_mean"]).all()
    assert all(torch.equal(v, before[k]) for k, v in model.norm.base.state_dict().items())
    saved = model.norm.adapter("default").tensors()
    assert set(saved) == set(before)
    # on another base's copy they are loaded whole
    other = Net().train()
    add_adapter(other, config("norm"))
    other.norm.adapter("default").load({k: v.detach().clone() for k, v in saved.items()})
    assert torch.equal(other.norm.adapter("default").copy.running_mean, own.running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_follow_the_base_and_parameters_do_not(dtype: torch.dtype) -> None:
    """A norm in a model that changes its dtype, either way, trains on."""
    for first, then in ((torch.float32, dtype), (dtype, torch.float32)):
        model = Net().to(first).train()
        add_adapter(model, config("norm", "block"))
        model.to(then)
        copied = model.norm.adapter("default").copy
        assert copied.running_mean.dtype == model.norm.base.running_mean.dtype == then
        assert copied.weight.dtype == torch.float32
        assert copied.num_batches_tracked.dtype == torch.int64
        y = model(images(then))
        assert y.dtype == then
        y.sum().backward()
        assert copied.weight.grad is not None


def test_autocast() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Net().to(dtype).eval()
        x = images(dtype)
        plain = copy.deepcopy(model)
        add_adapter(model, config("block", "head"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            assert torch.equal(y, plain(x))
            assert y.dtype == torch.bfloat16
            y.float().sum().backward()
        assert model.head.adapter("default").copy.weight.grad.dtype == torch.float32


def test_functional_call_copies_pickles_and_state() -> None:
    model = Net().eval()
    add_adapter(model, config("block", "norm"))
    x = images()
    step(model, x)
    y = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    other = Net().eval()
    add_adapter(other, config("block", "norm"))
    assert torch.equal(torch.func.functional_call(other, state, (x,)), y)
    assert not torch.equal(other(x), y)
    other.load_state_dict(state)
    assert torch.equal(other(x), y)


def test_keywords_and_several_inputs_reach_the_copy() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, a: Tensor, *, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.weight * a, b

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.sum = nn.Linear(3, 3), Sum()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.sum(self.lin(x), b=x)
            return a + b

    model = Around()
    x = torch.randn(2, 3)
    y = model(x)
    add_adapter(model, LoRAConfig(targets=["lin"], r=1, modules_to_save=["sum"]))
    assert torch.equal(model(x), y)
    model.sum.adapter("default").copy.weight.data.zero_()
    assert torch.equal(model(x), x)


@pytest.mark.parametrize("mode", [True, False])
def test_the_parts_of_a_copied_block_keep_their_modes(mode: bool) -> None:
    model = Net().train(mode)
    model.block[3].train(not mode)
    modes = [m.training for m in model.block.modules()]
    add_adapter(model, config("block"))
    assert [m.training for m in model.block.base.modules()] == modes
    assert [m.training for m in model.block.adapter("default").copy.modules()] == modes
    model.train(not mode)
    assert all(m.training is not mode for m in model.block.modules())


# --- beside other adapters ----------------------------------------------------------------------


def test_it_stands_alone(state_of: State) -> None:
    model = Net()
    add_adapter(model, config("head"), "a")
    add_adapter(model, LoRAConfig(targets=["head"], r=2), "b")  # it alone is active
    assert model.head.active == ["b"]
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'a' \(FullCopy\) is defined on the base alone"):
        set_adapters(model, ["a", "b"])
    assert state_of(model) == before
    set_adapters(model, "a")


def test_an_adapter_inside_what_is_replaced(state_of: State) -> None:
    model = Net()
    add_adapter(model, config("block"), "whole")
    add_adapter(model, LoRAConfig(targets=["block.0"], r=2), "inner")
    assert [site for site, _ in adapted_modules(model)] == ["conv", "block", "block.0"]
    before = state_of(model)
    for names in (["whole", "inner"], ["inner", "whole"]):
        with pytest.raises(ValueError, match="'whole' replaces 'block' as a whole, and 'inner' is"):
            set_adapters(model, names)
        assert state_of(model) == before
    set_adapters(model, "inner")
    set_adapters(model, "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["heed"]}, "modules_to_save: 'heed' matches no module; nearest name"),
        ({"modules_to_save": ["conv"]}, "'conv' is both a target and in modules_to_save"),
        ({"modules_to_save": ["block"], "targets": ["block.0"]}, "'block.0' is both a target and"),
        ({"modules_to_save": ["block", "block.0"]}, "'block.0' is inside another module named th"),
        ({"modules_to_save": ["block.1"]}, "ReLU cannot be copied for training: it holds no par"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, state_of: State) -> None:
    model = Net()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, config(**options))
    assert state_of(model) == before


def test_a_copy_inside_a_target_is_refused(state_of: State) -> None:
    class Doubled(nn.Module):  # linear-like, of two layers
        in_features = out_features = 4

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

        def dense_weight(self) -> Tensor:
            return 2 * self.inner.weight.detach()

    model = nn.Sequential(Doubled())
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'0.inner' in modules_to_save is inside a target"):
        add_adapter(model, LoRAConfig(targets=["0"], r=2, modules_to_save=["inner"]))
    assert state_of(model) == before


def test_quantized_and_adapted_modules_are_refused(state_of: State) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    add_adapter(model, LoRAConfig(targets=["1.0"], r=2), "inner")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"Sequential cannot be .* adapters are inside it"):
        add_adapter(model, LoRAConfig(targets=["0"], r=2, modules_to_save=["1"]), "outer")
    assert state_of(model) == before
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_model(model)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"NF4Linear cannot be copied .* it holds .*torch.uint8"):
        add_adapter(model, LoRAConfig(targets=["0"], r=2, modules_to_save=["1"]))
    assert state_of(model) == before


@pytest.mark.parametrize("wrapped", [False, True])
def test_tied_weights(
    wrapped: bool, make_token_model: Callable[[bool], nn.Module], state_of: State
) -> None:
    model = make_token_model(True)
    name = "head"
    if wrapped:  # the tied weight is a module's inside of what is copied
        model.head, name = nn.Sequential(model.head), "head"
        model.get_output_embeddings = lambda: model.head[0]
    ids = torch.arange(5)
    y = model(ids)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"the weight of 'head' is tied to that of 'embed'"):
        add_adapter(model, LoRAConfig(targets=["mix"], r=2, modules_to_save=[name]))
    assert state_of(model) == before
    add_adapter(model, LoRAConfig(targets=["mix"], r=2, modules_to_save=[name], untie=True))
    assert torch.equal(model(ids), y)
    base = model.head.base[0] if wrapped else model.head.base
    assert base.weight is not model.embed.weight
    assert torch.equal(base.weight, model.embed.weight)
    assert model.config.tie_word_embeddings is False


def test_the_class_says_what_it_is() -> None:
    host = Adapted(nn.Linear(3, 2))
    host.attach("default", FullCopy(host.base))
    adapter = host.adapter("default")
    assert adapter.replaces
    assert adapter.alone
    assert adapter.mixes is None
    y = torch.randn(2)
    assert adapter(None, y, host.base) is y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_a_16_bit_model_comes_back_in_32_bits(
    dtype: torch.dtype, same_bits: Same, tmp_path: Path
) -> None:
    """What was trained below the base's precision is still there after loading."""
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).to(dtype)
    model = copy.deepcopy(base)
    add_adapter(model, config("1", "2", targets=["0"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.rand_like(p), alpha=1e-5)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path, trainable=True)
    first, again = adapter_state_dict(model), adapter_state_dict(base)
    assert first.keys() == again.keys()
    assert all(same_bits(first[key], again[key]) for key in first)
