"""Conversion to LoRA: against the dense update and the dense SVD, in every kind of layer."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import (
    Adapter,
    BottleneckConfig,
    LoRA,
    LoRAConfig,
    LoRALinear,
    adapted_modules,
    add_adapter,
    convert_to_lora,
    disable_adapters,
    extract_lora,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.adapters.forms import form_of
from lora_core.quant import NF4Linear, quantize_model

F32 = 2.0**-24  # unit roundoff of float32


def delta(model: nn.Module, site: str, name: str) -> Tensor:
    """ΔW of an adapter as the merge makes it, (N, K) float64."""
    host = dict(adapted_modules(model))[site]
    base = host.base
    weight = base.weight if hasattr(base, "weight") else base.dense_weight()
    weight = weight.detach().double()
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().double()
    with torch.no_grad():
        merged, _ = host.adapters[name].merged(weight, bias)
    return form_of(base).matrix(merged - weight)


def best(matrix: Tensor, rank: int, groups: int = 1) -> float:
    """Error of the best approximation, by Eckart and Young, block by block."""
    tails = [torch.linalg.svdvals(block)[rank // groups :] for block in matrix.chunk(groups)]
    return float(torch.cat(tails).norm())


class Net(nn.Module):
    """A layer of every kind that LoRA knows, and a norm that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fused = nn.Linear(6, 15)
        self.mix = nn.Linear(15, 8, bias=False)
        self.conv = nn.Conv1d(1, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 12, 3, groups=3)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.fused(self.norm(self.embed(ids))))  # (B, T, 8)
        return self.grouped(self.conv(x.flatten(0, 1)[:, None]))


IDS = torch.tensor([[1, 2, 3], [7, 8, 0]])


@pytest.fixture
def net() -> Net:
    return Net().eval()


KINDS = {
    "higher rank": {"r": 6, "use_rslora": True, "targets": ["fused", "mix"]},
    "parts": {"r": 3, "parts": {"fused": [3, 5, 7]}, "targets": ["fused"]},
    "conv": {"r": 3, "targets": ["conv", "grouped"], "rank_pattern": {"grouped": 6}},
    "embedding": {"r": 5, "targets": ["embed"]},
    "pissa": {"r": 3, "init": "pissa", "targets": ["fused", "mix", "conv"]},
    "dora": {"r": 3, "use_dora": True, "targets": ["fused", "mix", "conv"]},
    "copy": {"r": 3, "targets": ["fused"], "modules_to_save": ["mix"]},
    "rows": {"r": 3, "targets": ["mix"], "trainable_token_indices": {"embed": [2, 9, 10]}},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_becomes_a_lora(net, shake, kind) -> None:
    """A rank that is enough: the same outputs. One that is not: the best there is, as reported."""
    add_adapter(net, LoRAConfig(**KINDS[kind]), "old")
    shake(net)
    if kind == "copy":
        net.mix.adapters["old"].copy.weight.data.add_(0.1)
    before = net(IDS)
    full = convert_to_lora(net, "old", 12, "full")
    assert full.error < 16 * F32
    small = convert_to_lora(net, "old", 3, "small")
    assert small.error > 16 * F32 or kind == "rows"
    for report, name in ((full, "full"), (small, "small")):
        hosts = dict(adapted_modules(net))
        assert {layer.name for layer in report.layers} == {
            site for site, host in hosts.items() if name in host.adapters
        }
        for layer in report.layers:
            pair = hosts[layer.name].adapters[name]
            assert type(pair) is LoRA
            assert pair.scaling == 1
            assert pair.r == layer.rank <= (12 if name == "full" else 3)
            wanted, got = delta_of_kind(net, layer.name), delta(net, layer.name, name)
            error = float((got - wanted).norm() / wanted.norm())
            assert math.isclose(error, layer.error, rel_tol=1e-6, abs_tol=4 * F32)
            least = best(wanted, layer.rank, pair.form.groups) / float(wanted.norm())
            assert least - 1e-12 <= layer.error <= least + 16 * F32
            assert layer.kept == pytest.approx(1 - least**2, abs=1e-9)
    set_adapters(net, "old")
    truth = copy.deepcopy(net).double()(IDS)
    set_adapters(net, "full")
    # the old adapter's own rounding, and that of the new factors, which is relative to the update
    baseline = max(float((before - truth).abs().max()), F32 * float(truth.abs().max()))
    assert float((net(IDS) - truth).abs().max()) <= 8 * baseline
    with disable_adapters(net):
        assert not torch.equal(net(IDS), before)


def delta_of_kind(model: nn.Module, site: str) -> Tensor:
    host = dict(adapted_modules(model))[site]
    adapter = host.adapters["old"]
    if hasattr(adapter, "copy"):
        return form_of(host.base).matrix(
            (adapter.copy.weight.double() - host.base.weight.double()).detach()
        )
    return delta(model, site, "old")


@torch.no_grad()
def assert_same(base: nn.Module, tuned: nn.Module, x: Tensor) -> None:
    """Equal outputs to the rounding of float32: the tuned model's own, and that of the factors."""
    truth = copy.deepcopy(tuned).double()(x.double())
    bound = 4 * float((tuned(x) - truth).abs().max()) + 64 * F32 * float(truth.abs().max())
    assert float((base(x) - truth).abs().max()) <= bound


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.floats(0, 0.999),
    st.integers(1, 9),
)
def test_the_smallest_rank_for_an_error(rows, columns, seed, error, rank) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = nn.Sequential(nn.Linear(columns, rows, bias=False))
    tuned = copy.deepcopy(base)
    change = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -3, columns)
    tuned[0].weight.data.add_(change)
    matrix = tuned[0].weight.detach().double() - base[0].weight.detach().double()
    report = extract_lora(base, tuned, error=error, targets=["0"])
    layer = report.layers[0]
    size = float(matrix.norm())
    assert layer.error <= error + 16 * F32
    if layer.rank > 1:  # one rank less would miss it
        assert best(matrix, layer.rank - 1) / size > error - 1e-12
    assert report.error == pytest.approx(layer.error, rel=1e-12)
    other = nn.Sequential(nn.Linear(columns, rows, bias=False))
    other[0].weight.data.copy_(tuned[0].weight.data - change)
    fixed = extract_lora(other, tuned, r=rank, targets=["0"]).layers[0]
    assert fixed.rank == min(rank, rows, columns)


def test_a_model_from_its_tuned_one(make_mlp) -> None:
    base, tuned = make_mlp(), make_mlp()
    tuned.load_state_dict(base.state_dict())
    x = torch.randn(4, 12)
    for linear in (tuned.inp, tuned.mid[0]):
        linear.weight.data.add_(torch.randn_like(linear.weight) * 0.1)
    report = extract_lora(base, tuned, 24, "tuned")
    assert [layer.name for layer in report.layers] == ["inp", "mid.0"]
    assert report.unchanged == ()
    assert report.others == ()
    assert [layer.rank for layer in report.layers] == [12, 24]
    assert_same(base, tuned, x)
    assert all(p.requires_grad == (".tuned." in key) for key, p in base.named_parameters())
    text = str(report)
    assert "'tuned': LoRA of rank 12 to 24 in 2 layers, relative error 0.000%" in text
    assert "  inp: rank 12 of 12, error 0.000%, 100.000% of the energy" in text
    assert json.loads(json.dumps(report.as_dict()))["layers"][1]["rank"] == 24


def test_what_is_not_in_it_is_told(make_mlp) -> None:
    base, tuned = make_mlp(), make_mlp()
    tuned.load_state_dict(base.state_dict())
    tuned.inp.weight.data.mul_(2)
    tuned.head.weight.data.mul_(2)
    tuned.mid[2].bias.data.add_(1)
    tuned.extra = nn.Linear(2, 2)
    tuned.inp.bias.data.add_(1)
    report = extract_lora(base, tuned, 2, bias="drop", trainable=False)
    assert report.unchanged == ("mid.0",)
    assert report.others == ("extra.*", "mid.2.bias", "head.weight", "inp.bias")
    assert "unchanged: 1 layers" in str(report)
    assert "not in it, though different: extra.*, mid.2.bias, head.weight, inp.bias" in str(report)
    assert not any(p.requires_grad for p in base.parameters())


def test_biases(make_mlp, state_of) -> None:
    base, tuned = make_mlp(), make_mlp()
    tuned.load_state_dict(base.state_dict())
    for linear in (tuned.inp, tuned.head):
        linear.bias.data.add_(torch.randn_like(linear.bias))
    tuned.inp.weight.data.mul_(1.5)
    before = state_of(base)
    told = r"the bias of 'inp' changes.*bias='keep'.*bias='drop'"
    with pytest.raises(ValueError, match=told):
        extract_lora(base, tuned, 12, targets=["inp", "mid.0", "head"])
    assert state_of(base) == before
    report = extract_lora(base, tuned, 12, targets=["inp", "mid.0", "head"], bias="keep")
    assert [layer.name for layer in report.layers] == ["inp", "head"]
    assert [layer.full_rank for layer in report.layers] == [12, 0]
    x = torch.randn(4, 12)
    assert_same(base, tuned, x)
    lora = base.head.adapters["default"]
    assert lora.A.abs().max() > 0  # a start that can be trained, not two zeros
    assert not lora.B.any()


def test_a_four_bit_base(make_mlp) -> None:
    """The update is taken from the dequantized weight, so it repairs what quantizing did."""
    tuned = make_mlp()
    base = copy.deepcopy(tuned)
    quantize_model(base, skip=["head"])
    assert isinstance(base.inp, NF4Linear)
    x = torch.randn(4, 12)
    report = extract_lora(base, tuned, error=0.0)
    assert {layer.full_rank for layer in report.layers} == {12, 24}
    assert_same(base, tuned, x)


@torch.no_grad()
def test_it_can_be_merged_and_taken_out(net, shake) -> None:
    add_adapter(net, LoRAConfig(r=3, use_dora=True, targets=["fused", "mix"]), "old")
    shake(net)
    convert_to_lora(net, "old", error=0.0)
    unmerged = net(IDS)
    merge_adapters(net)
    assert float((net(IDS) - unmerged).abs().max()) <= 64 * F32 * float(unmerged.abs().max())
    unload_adapters(net, merge=True)
    assert not list(adapted_modules(net))


class Gain(Adapter):
    """IA3's: y * v, here also on the bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x, y, base):
        return y * self.v

    def merged(self, weight, bias):
        v = self.v.detach().to(weight.dtype)
        return weight * v[:, None], None if bias is None else bias * v


class Gains:
    def build(self, name, module):
        return Gain(module.out_features) if isinstance(module, nn.Linear) else None


@torch.no_grad()
def test_a_kind_of_ones_own(make_mlp, shake) -> None:
    model = make_mlp()
    add_adapter(model, Gains(), "gain")
    x = torch.randn(4, 12)
    wanted, truth = model(x), copy.deepcopy(model).double()(x.double())
    report = convert_to_lora(model, "gain", error=0.0, bias="keep")
    assert report.error < 16 * F32
    bound = 4 * float((wanted - truth).abs().max()) + 64 * F32 * float(truth.abs().max())
    assert float((model(x) - truth).abs().max()) <= bound


def test_one_layer_by_itself() -> None:
    layer = LoRALinear(nn.Linear(6, 5), r=3)
    layer.B.data.normal_()
    report = convert_to_lora(layer, r=2, new_name="two")
    assert [entry.rank for entry in report.layers] == [2]
    wanted = layer.adapters["default"].delta_weight().detach().double()
    got = layer.adapters["two"].delta_weight().detach().double()
    assert float((got - wanted).norm()) == pytest.approx(best(wanted, 2), rel=1e-5)


@torch.no_grad()
def test_memory_is_that_of_one_layer(make_mlp, monkeypatch) -> None:
    """Dense updates come and go one by one: a model's would not fit."""
    import weakref

    from lora_core.adapters import convert

    base, tuned = make_mlp(), make_mlp()
    alive: list[weakref.ref] = []
    real = convert.truncated

    def watched(site, update, r, error):
        alive.append(weakref.ref(update.matrix))
        assert sum(reference() is not None for reference in alive) <= 2
        return real(site, update, r, error)

    monkeypatch.setattr(convert, "truncated", watched)
    extract_lora(base, tuned, 2, bias="drop", targets=["inp", "mid.0", "head"])
    assert len(alive) == 3


# --- refusals ---


class Blank(Adapter):
    """Changes a norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(1))

    def forward(self, x, y, base):
        return y

    def merged(self, weight, bias):
        return weight + 1, bias


class Blanks:
    def build(self, name, module):
        return Blank() if isinstance(module, nn.LayerNorm) else None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give either r, a rank, or error"),
        ({"r": 2, "error": 0.1}, "give either r, a rank, or error"),
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": True}, "r must be a whole number of at least 1, got True"),
        ({"error": 1.0}, r"error must be in \[0, 1\), got 1.0"),
        ({"r": 2, "bias": "sum"}, "bias must be one of 'refuse', 'keep', 'drop', got 'sum'"),
        ({"r": 2, "name": "odl"}, "no adapter 'odl' in the model; nearest names: 'old'"),
        ({"r": 2, "name": "wide"}, "'wide' at 'mix' cannot be converted: it has no linear update"),
        ({"r": 2, "name": "blank"}, r"'norm' \(LayerNorm\) changes, and is no layer that a LoRA"),
        ({"r": 3, "new_name": "old"}, "the adapter name 'old' is taken"),
        ({"r": 4}, "r must be a multiple of the 3 groups of 'grouped', got 4"),
        ({"r": 3, "name": "fresh"}, "the update is zero in every layer"),
        ({"r": 3, "name": "broken"}, "the update of 'fused' holds NaN or infinity"),
        ({"r": 3, "name": "biased"}, "the bias of 'fused' changes"),
    ],
)
def test_what_cannot_be_converted(net, shake, state_of, options, told) -> None:
    add_adapter(net, LoRAConfig(r=3, targets=["fused", "grouped"]), "old")
    add_adapter(net, BottleneckConfig(2, feed_forward=["mix"]), "wide")
    add_adapter(net, Blanks(), "blank")
    add_adapter(net, LoRAConfig(r=2, targets=["fused"]), "broken")
    add_adapter(net, LoRAConfig(r=2, targets=["fused"], lora_bias=True), "biased")
    shake(net)
    net.fused.adapters["broken"].A.data[0, 0] = torch.inf
    add_adapter(net, LoRAConfig(r=2, targets=["fused"]), "fresh")
    before = state_of(net)
    with pytest.raises(ValueError, match=told) as error:
        convert_to_lora(net, **{"name": "old", **options})
    assert "\n" not in str(error.value)
    assert state_of(net) == before


def test_biases_that_no_lora_can_have(net, shake, state_of) -> None:
    config = LoRAConfig(r=2, targets=["fused"], bias="all", lora_bias=True)
    add_adapter(net, config, "biased")
    shake(net)
    before = state_of(net)
    told = r"'norm' \(LayerNorm\) changes, and is no layer that a LoRA can be on"
    with pytest.raises(ValueError, match=told):
        convert_to_lora(net, "biased", 2, bias="keep")
    assert state_of(net) == before
    report = convert_to_lora(net, "biased", 2, bias="drop")
    assert "norm.bias" in report.others
    assert "norm" in report.unchanged


def test_models_that_do_not_fit(make_mlp, state_of) -> None:
    base, tuned = make_mlp(), make_mlp()
    before = state_of(base)
    with pytest.raises(ValueError, match="targets: 'inq' matches no module; nearest names: 'inp'"):
        extract_lora(base, tuned, 2, targets=["inq"])
    wrong = copy.deepcopy(tuned)
    wrong.inp = nn.Linear(12, 23)
    with pytest.raises(ValueError, match=r"'inp' is Form\(.*24.*in the base model and Form\(.*23"):
        extract_lora(base, wrong, 2)
    wrong.inp = nn.ReLU()
    with pytest.raises(ValueError, match=r"'inp' is Form.* and None in the tuned one"):
        extract_lora(base, wrong, 2)
    del wrong.inp
    with pytest.raises(ValueError, match="the tuned model has no 'inp'; "):
        extract_lora(base, wrong, 2)
    add_adapter(tuned, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="the tuned model has adapters at 'inp': call unload_adap"):
        extract_lora(base, tuned, 2)
    with pytest.raises(ValueError, match="nothing to convert: the update is zero in every layer"):
        extract_lora(base, copy.deepcopy(base), 2)
    assert state_of(base) == before
    merge_adapters(tuned, keep_base=False)
    with pytest.raises(
        ValueError, match="adding an adapter while 'inp' is merged: the base was not"
    ):
        convert_to_lora(tuned, "default", 2)


def test_the_options_reach_the_files(net, shake, tmp_path) -> None:
    """Ranks that differ by layer are in the configuration, so that the file loads."""
    from lora_core import load_adapter, save_adapter

    add_adapter(net, LoRAConfig(r=3, use_dora=True, targets=["fused", "mix"]), "old")
    shake(net)
    convert_to_lora(net, "old", error=0.2, new_name="new")
    config = net.fused.adapters["new"].config
    ranks = {site: host.adapters["new"].r for site, host in adapted_modules(net)}
    assert len(set(ranks.values())) == 2
    assert config.r == config.alpha == max(ranks.values())
    with pytest.warns(UserWarning, match="rank_pattern"):
        save_adapter(net, tmp_path, "new")
    other = Net().eval()
    other.load_state_dict(net_state(net))
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), net(IDS))


def net_state(net: nn.Module) -> dict[str, Tensor]:
    plain = copy.deepcopy(net)
    unload_adapters(plain)
    return plain.state_dict()
