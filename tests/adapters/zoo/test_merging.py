"""Merges that PEFT's suite does not look at: biases, ties, 4 bits, weighted sums; exceptions."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    adapted_modules,
    add_adapter,
    dense_weight,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
    unmerge_adapters,
)
from lora_core.adapters.combine import combine_adapters
from lora_core.adapters.rows import adapter_rows
from lora_core.quant import NF4Linear, quantize_4bit, quantize_model
from lora_core.targets import sites

Same = Callable[[Tensor, Tensor], bool]
Close = Callable[[Tensor, Tensor, Tensor], bool]
U = torch.finfo(torch.float32).eps / 2


# --- biases ---


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_bias_of_b_is_scaled_once(has_bias: bool, four_bit: bool, dora: bool) -> None:
    """b' = b + s b_B: PEFT forgets s on 4 bits, and refuses a layer without a bias."""
    model = nn.Sequential(nn.Linear(64, 32, bias=has_bias), nn.Tanh())
    if four_bit:
        quantize_model(model)
    add_adapter(model, LoRAConfig(r=4, alpha=16, lora_bias=True, targets=["0"], use_dora=dora))
    pair = model[0].adapters["default"]
    nn.init.normal_(pair.up_bias)
    x = torch.randn(3, 64)
    adapted, wanted = model(x), 4.0 * pair.up_bias.detach().double()
    if has_bias:
        wanted = wanted + model[0].base.bias.detach().double()
    merge_adapters(model)
    merged = model[0].merged.module
    assert merged.bias.dtype == torch.float32
    room = 3 * U * (wanted.abs() + 8 * pair.up_bias.detach().double().abs())
    assert bool(((merged.bias.double() - wanted).abs() <= room).all())
    unload_adapters(model, merge=True)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert (model(x).double() - exact).abs().max() <= 1e-6  # |z| < 8, 64 terms: gamma(64) |z|
        assert (adapted.double() - exact).abs().max() <= 64 * 2 * U * 8


def test_a_trained_bias_takes_the_bases_place(unet: nn.Module, same_bits: Same) -> None:
    """bias="all": the whole vector is trained, and is what the merged layer has."""
    nn.init.normal_(unet.norm.bias)
    add_adapter(unet, LoRAConfig(r=2, targets=["to_q"], bias="all"))
    hosts = dict(adapted_modules(unet))
    assert {"conv_in", "norm", "down", "step", "conv_out"} <= set(hosts)
    for host in hosts.values():
        adapter = host.adapters["default"]
        if hasattr(adapter, "bias") and isinstance(adapter.bias, nn.Parameter):
            nn.init.zeros_(adapter.bias)
    merge_adapters(unet)
    for site in ("conv_in", "norm", "down", "step", "conv_out"):
        merged = hosts[site].merged.module
        assert same_bits(merged.bias, torch.zeros_like(merged.bias)), site
        assert same_bits(merged.weight, hosts[site].base.weight), site
        assert bool(hosts[site].base.bias.any())  # the base keeps its own


# --- ties ---

TIED = [
    pytest.param("llama", "model.embed_tokens", "lm_head", marks=pytest.mark.oracle),
    pytest.param("gpt2", "transformer.wte", "lm_head", marks=pytest.mark.oracle),
    pytest.param("t5", "encoder.embed_tokens", "lm_head", marks=pytest.mark.oracle),
]


@pytest.fixture
def tied(bases: Callable) -> Callable[[str], nn.Module]:
    return lambda name: copy.deepcopy(bases(name))


def outputs(name: str, model: nn.Module) -> Tensor:
    ids = torch.tensor([[3, 9, 1, 30, 9], [5, 3, 3, 2, 7]])
    dtype = next(p.dtype for k, p in model.named_parameters() if "adapters" not in k)
    more = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    with torch.no_grad():
        out = model(input_ids=ids, **more).logits
    assert out.dtype == dtype
    return out


def weight(model: nn.Module, site: str) -> Tensor:
    return dict(sites(model))[site].weight


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)


@pytest.mark.parametrize(("name", "embedding", "head"), TIED)
@pytest.mark.parametrize("which", ["embedding", "head", "both"])
@pytest.mark.parametrize("full", [False, True])
def test_a_tie_is_refused_or_undone(
    which: str, full: bool, name: str, embedding: str, head: str, tied: Callable,
    same_bits: Same, whole_state: Callable,
) -> None:  # fmt: skip
    """PEFT merges into the shared weight: the other holder is off by hundreds of times."""
    model = tied(name)
    assert weight(model, embedding) is weight(model, head)
    before, plain = whole_state(model), outputs(name, model)
    some = {"embedding": [embedding], "head": [head], "both": [embedding, head]}[which]
    options: dict[str, Any] = {"targets": some}
    if full:
        options = {"modules_to_save": some}
    with pytest.raises(ValueError, match=r"is tied to that of .*untie=True"):
        add_adapter(model, LoRAConfig(r=4, **options))
    assert whole_state(model) == before

    add_adapter(model, LoRAConfig(r=4, untie=True, **options))
    assert same_bits(outputs(name, model), plain)
    fill(model)
    adapted = outputs(name, model)
    assert not torch.allclose(adapted, plain, rtol=0.1)
    held = {site: weight(model, site).detach().clone() for site in (embedding, head)}
    exact = outputs(name, copy.deepcopy(model).double())
    merge_adapters(model)
    check_near(outputs(name, model), adapted, exact)
    for site in some:  # the bases are what they were
        assert same_bits(dict(adapted_modules(model))[site].base.weight, held[site])
    model.tie_weights()  # transformers calls it when it saves, resizes, loads
    check_near(outputs(name, model), adapted, exact)
    unmerge_adapters(model)
    assert same_bits(outputs(name, model), adapted)
    unload_adapters(model, merge=True)
    check_near(outputs(name, model), adapted, exact)
    other = {"embedding": head, "head": embedding}.get(which)
    if other is not None:
        assert same_bits(weight(model, other), held[other])
    model.tie_weights()
    check_near(outputs(name, model), adapted, exact)


def check_near(ours: Tensor, adapted: Tensor, exact: Tensor) -> None:
    error, baseline = ((t.double() - exact).abs().max() for t in (ours, adapted))
    assert error <= 4 * baseline + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize(("name", "embedding", "head"), TIED)
def test_rows_keep_a_tie(
    name: str, embedding: str, head: str, tied: Callable, same_bits: Same
) -> None:
    model = tied(name)
    plain = outputs(name, model)
    start = weight(model, embedding).detach().clone()
    feed_forward = r".*(mlp|Dense).*"
    mine = LoRAConfig(r=2, targets=feed_forward, trainable_token_indices=[3, 9])
    add_adapter(model, mine)
    fill(model)
    adapted = outputs(name, model)
    exact = outputs(name, copy.deepcopy(model).double())
    with disable_adapters(model):
        assert same_bits(outputs(name, model), plain)
    merge_adapters(model)
    check_near(outputs(name, model), adapted, exact)
    unload_adapters(model, merge=True)
    check_near(outputs(name, model), adapted, exact)
    assert weight(model, embedding) is weight(model, head)
    changed = (weight(model, embedding) != start).any(1).nonzero().flatten().tolist()
    assert changed == [3, 9]


@pytest.mark.parametrize(("name", "embedding", "head"), TIED)
def test_unloading_gives_the_old_model_back(
    name: str, embedding: str, head: str, tied: Callable, same_bits: Same
) -> None:
    model = tied(name)
    plain = outputs(name, model)
    add_adapter(model, LoRAConfig(r=4, targets=[embedding], untie=True))
    fill(model)
    unload_adapters(model)
    assert same_bits(outputs(name, model), plain)


# --- 4 bits ---


@pytest.fixture
def four_bit_layer() -> nn.Module:
    model = nn.Sequential(nn.Linear(256, 192), nn.Tanh())
    quantize_model(model)
    return model


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_what_four_bits_keep(share: float, four_bit_layer: nn.Module, same_bits: Same) -> None:
    """The reported retention is the one measured here; the dense default keeps everything."""
    model = four_bit_layer
    add_adapter(model, LoRAConfig(r=8, alpha=8, targets=["0"]))
    base, pair = model[0].base, model[0].adapters["default"]
    old = dense_weight(base).double()
    nn.init.normal_(pair.B)
    with torch.no_grad():
        pair.B.mul_(share * old.norm() / pair.delta_weight().norm())
    delta = pair.B.detach().double() @ pair.A.detach().double()
    codes = base.state_dict()

    dense = merge_adapters(model).layers[0]
    stored = dense_weight(model[0].merged.module).double() - old
    assert not dense.requantized
    assert dense.kept == pytest.approx(
        float((stored * delta).sum() / delta.square().sum()), abs=1e-5
    )
    assert (stored - delta).abs().max() <= 4 * U * (old.abs().max() + delta.abs().max())
    unmerge_adapters(model)

    report = merge_adapters(model, requantize=True).layers[0]
    merged = model[0].merged.module
    assert isinstance(merged, NF4Linear)
    wanted = quantize_4bit((old + delta).float(), block_size=64, double_quant=True)
    agree = (merged.codes.view(-1) == wanted.packed.view(-1)).double().mean()
    assert agree > 0.999  # (ties of float32 and float64 sums aside)
    stored = dense_weight(merged).double() - old
    kept = float((stored * delta).sum() / delta.square().sum())
    error = float((stored - delta).norm() / delta.norm())
    assert report.requantized
    assert report.kept == pytest.approx(kept, rel=1e-3, abs=1e-5)
    assert report.error == pytest.approx(error, rel=1e-3)
    if share <= 0.02:
        assert kept < 0.1  # nearly nothing survives, which is why it is not the default
    unmerge_adapters(model)
    assert all(same_bits_of_any(v, codes[k]) for k, v in base.state_dict().items())


def same_bits_of_any(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# --- weighted sums ---


def test_weighted_sums_are_exact(additive: Any) -> None:
    """Every additive method, with rsLoRA, patterns and negative alphas: Σ wᵢ sᵢ Bᵢ Aᵢ."""
    model = additive.model
    additive.fill(model)
    additive.add("other", seed=5)
    combine_adapters(model, ["default", "other"], [0.7, -2.0])
    set_adapters(model, "combined")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".combined." in n)
    base, one, two = (
        dict(sites(m))
        for m in (
            additive.fresh().double(),
            additive.dense(model, ("default",)),
            additive.dense(model, ("other",)),
        )
    )
    merge_adapters(model)
    for site, host in adapted_modules(model):
        for key in ("weight", "bias"):
            got = getattr(host.merged.module, key, None)
            if got is None:
                continue
            old = getattr(base[site], key)
            old = torch.zeros_like(got, dtype=torch.float64) if old is None else old.double()
            first, second = (
                old if getattr(m[site], key) is None else getattr(m[site], key).double()
                for m in (one, two)
            )
            exact = old + 0.7 * (first - old) - 2.0 * (second - old)
            # the factors' size is not above the update's by more than their rank in these
            size = old.abs() + 0.7 * (first - old).abs() + 2 * (second - old).abs()
            room = 64 * U * (size + size.mean())
            assert bool(((got.double() - exact).abs() <= room).all()), (site, key)


def test_rslora_is_counted_once_in_a_weighted_sum(perceptron: nn.Module) -> None:
    """PEFT scales by √r too much: 2.83 at r = 8."""
    add_adapter(perceptron, LoRAConfig(r=8, alpha=8, use_rslora=True, targets=["inp"]), "a")
    add_adapter(perceptron, LoRAConfig(r=2, alpha=3, targets=["inp"]), "b")
    fill_all(perceptron)
    a, b = (perceptron.inp.adapters[name].delta_weight(torch.float64) for name in "ab")
    for method, options in (("exact", {}), ("svd", {"rank": 10})):
        combine_adapters(perceptron, ["a", "b"], [1.0, 1.0], method, method, **options)
        got = perceptron.inp.adapters[method].delta_weight(torch.float64)
        assert (got - a - b).norm() <= 64 * U * (a.norm() + b.norm()), method


def fill_all(model: nn.Module) -> None:
    for _, host in adapted_modules(model):
        for p in host.adapters.parameters():
            nn.init.normal_(p, std=0.3)


# --- exceptions ---


class Broken(RuntimeError):
    pass


def breaking(model: nn.Module, at: str) -> Any:
    """Let a module in the middle of the model fail; returns the hook's handle."""

    def fail(*_: object) -> None:
        raise Broken

    return dict(sites(model))[at].register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("perceptron", "norm"),
        ("unet", "up"),
        pytest.param("llama", "model.layers.1.mlp", marks=pytest.mark.oracle),
        pytest.param("t5", "decoder", marks=pytest.mark.oracle),
    ],
)
def test_exceptions_leave_nothing_behind(
    name: str, at: str, adopt: Callable, same_bits: Same, whole_state: Callable
) -> None:
    subject = adopt(name, "lora")
    model = subject.model
    subject.fill(model)
    subject.add("other", seed=5)
    set_adapters(model, ["default", "other"], trainable=True)
    both, before = subject.call(model), whole_state(model)
    size = len(both)
    rows: list[str | None] = ["other", None, "default"][:size]
    with adapter_rows(model, rows):
        mixed = subject.call(model)
    for context in (disable_adapters(model), adapter_rows(model, rows)):
        handle = breaking(model, at)
        with pytest.raises(Broken), context:
            subject.call(model)
        handle.remove()
        assert same_bits(subject.call(model), both)
        assert whole_state(model) == before
    base = subject.call(subject.base)
    with adapter_rows(model, rows):
        for inner in (disable_adapters(model), adapter_rows(model, [None] * size)):
            with suppress(Broken), inner:
                assert same_bits(subject.call(model), base)
                raise Broken
            assert same_bits(subject.call(model), mixed)
    assert same_bits(subject.call(model), both)
    assert whole_state(model) == before
