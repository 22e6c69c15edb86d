"""Bottleneck adapters by hand and in models: placement, identity, gradients, files, errors."""

import copy
import json
import math
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.adapters import (
    BottleneckAdapter,
    BottleneckConfig,
    LoRAConfig,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.checkpoint.peft import load_adapter, read_adapter, save_adapter
from lora_core.models import CausalLM, ModelConfig
from lora_core.quant import quantize_model
from lora_core.testing import check_adapter

PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]


class Block(nn.Module):
    """A feed-forward sub-layer with names of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.rise, self.fall = nn.LayerNorm(dim), nn.Linear(dim, 24), nn.Linear(24, dim)

    def forward(self, h):
        return h + self.fall(torch.relu(self.rise(self.norm(h))))


class Plain(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim) for _ in range(2)])

    def forward(self, h):
        for block in self.blocks:
            h = block(h)
        return h


def decoder() -> CausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig(vocab_size=97, bos_token_id=None, eos_token_id=None, **sizes, **heads)
    )
    model.init_weights(0.1)
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids()).logits


def fill(model: nn.Module, seed: int = 1) -> None:
    """Give what is trainable numbers that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator) / 4
            parameter.data.copy_(drawn)


def change(adapter: BottleneckAdapter, x: torch.Tensor) -> torch.Tensor:
    """The definition, written out."""
    down, up = adapter.down, adapter.up
    act = {"gelu": F.gelu, "relu": torch.relu, "silu": F.silu, "tanh": torch.tanh}
    h = act[adapter.activation](x @ down.weight.to(x.dtype).T + down.bias.to(x.dtype))
    return adapter.scaling * (h @ up.weight.to(x.dtype).T + up.bias.to(x.dtype))


def assert_accurate(ours, theirs, truth):
    error, baseline = ((t.double() - truth).abs().max() for t in (ours, theirs))
    assert error <= 2 * baseline + 2 * torch.finfo(ours.dtype).eps * truth.abs().max()


# --- by hand ---


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_its_formula(activation, dtype):
    adapter = BottleneckAdapter(12, reduction=3, activation=activation, scaling=2.0)
    fill(adapter)
    x = torch.randn(5, 12).to(dtype)
    with torch.no_grad():
        theirs = x + change(adapter, x)
        assert_accurate(adapter(x), theirs, x.double() + change(adapter, x.double()))


def test_a_new_adapter_is_the_identity_to_the_bit():
    x = torch.randn(4, 32)
    x[0, :3] = torch.tensor([0.0, -0.0, 1e-40])
    for dtype in (torch.float32, torch.bfloat16):
        y = BottleneckAdapter(32)(x.to(dtype))
        assert y.dtype == dtype
        width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
        assert torch.equal(y.view(width), x.to(dtype).view(width))


def test_sizes_and_parameter_count():
    adapter = BottleneckAdapter(64, reduction=16)
    assert adapter.down.weight.shape == (4, 64)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 4 * 64 + 64 + 4
    assert BottleneckAdapter(10, reduction=0.5).down.out_features == 20


def test_weights_stay_float32():
    adapter = BottleneckAdapter(16).half()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter(torch.randn(2, 16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 17}, "reduction = 17 leaves no unit of dim = 16; lower it"),
        ({"reduction": 0}, "reduction must be a number above 0, got 0"),
        ({"activation": "swish"}, "activation must be one of 'gelu', .* got 'swish'"),
        ({"scaling": 0.0}, "scaling must be a finite number other than 0, got 0.0"),
        ({"reduction": "16"}, "reduction must be a number above 0, got '16'"),
        ({"scaling": "1"}, "scaling must be a finite number other than 0, got '1'"),
        ({"scaling": math.inf}, "scaling must be a finite number other than 0, got inf"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(16, **options)


def test_the_host_of_one_layer_passes_check_adapter(full_run):
    def make(base):
        model = nn.Sequential(base)
        add_adapter(model, BottleneckConfig(reduction=4, feed_forward=["0"]))
        return model[0]

    check_adapter(make, nn.Linear(24, 16), mergeable=False, examples=200 if full_run else 15)


# --- in this library's decoder ---


def reference(model: CausalLM, placement: str, dtype: torch.dtype) -> nn.Module:
    """The adapted decoder without hosts: plain modules, the adapters put in by hand."""
    adapters = {
        name: host.adapters["default"]
        for name, host in model.named_modules()
        if hasattr(host, "adapters") and "default" in host.adapters
    }
    plain = copy.deepcopy(model)
    unload_adapters(plain)
    plain = plain.to(dtype)
    for i, layer in enumerate(plain.model.layers):
        f = adapters[f"model.layers.{i}.mlp.down_proj"]
        mlp = layer.mlp

        def feed_forward(x, f=f, inner=mlp.forward):
            h = inner(x)
            return h + change(f, x if placement == "parallel" else h)

        mlp.forward = feed_forward
        if placement == "houlsby":
            f = adapters[f"model.layers.{i}.self_attn.o_proj"]
            project = layer.self_attn.o_proj
            project.forward = lambda x, f=f, inner=project.forward: (y := inner(x)) + change(f, y)
    return plain


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_decoder(placement):
    model = decoder()
    before = logits(model)
    report = add_adapter(model, BottleneckConfig(4, placement=placement, scaling=0.5))
    ends = {"houlsby": ["self_attn.o_proj", "mlp.down_proj"], "pfeiffer": ["mlp.down_proj"]}
    wanted = ends.get(placement, ["mlp.gate_proj", "mlp.down_proj"])
    assert report.sites == tuple(f"model.layers.{i}.{end}" for i in range(2) for end in wanted)
    per_adapter = 2 * 8 * 32 + 8 + 32
    assert (
        report.trainable == report.parameters == per_adapter * (4 if placement == "houlsby" else 2)
    )
    assert torch.equal(logits(model), before)

    fill(model)
    with torch.no_grad():
        truth = logits(reference(model, placement, torch.float64))
        assert_accurate(logits(model), logits(reference(model, placement, torch.float32)), truth)
        assert not torch.equal(logits(model), before)
        with disable_adapters(model):
            assert torch.equal(logits(model), before)

    model(input_ids=ids(), labels=ids()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("adapters" in name), name
        assert parameter.grad is None or parameter.grad.any(), name
    unload_adapters(model)
    assert torch.equal(logits(model), before)
    assert all("adapters" not in name for name, _ in model.named_modules())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_are_those_of_the_definition(placement):
    model = decoder()
    add_adapter(model, BottleneckConfig(4, placement=placement))
    fill(model)
    plain = [reference(model, placement, dtype) for dtype in (torch.float32, torch.float64)]
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = [logits(m).square().mean() for m in (model, *plain)]
    grads = [torch.autograd.grad(loss, trained) for loss in losses]
    for ours, theirs, truth in zip(*grads, strict=True):
        assert_accurate(ours, theirs, truth.double())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_merging_is_refused(placement):
    model = decoder()
    add_adapter(model, BottleneckConfig(4, placement=placement))
    fill(model)
    before = logits(model)
    with pytest.raises(ValueError, match="a bottleneck adapter has a non-linearity between"):
        merge_adapters(model)
    with pytest.raises(ValueError, match="non-linearity"):
        unload_adapters(model, merge=True)
    assert torch.equal(logits(model), before)


def test_several_adapters():
    model = decoder()
    add_adapter(model, BottleneckConfig(4, placement="parallel"), "a")
    fill(model, 1)
    a = logits(model)
    add_adapter(model, BottleneckConfig(8, placement="parallel", activation="relu"), "b")
    fill(model, 2)
    b = logits(model)
    set_adapters(model, ["a"])
    assert torch.equal(logits(model), a)
    set_adapters(model, ["a", "b"])
    both = logits(model)
    assert not torch.equal(both, a)
    assert not torch.equal(both, b)
    delete_adapter(model, "a")
    set_adapters(model, "b")
    assert torch.equal(logits(model), b)


def test_beside_lora_on_a_4_bit_base():
    model = decoder()
    quantize_model(model)
    before = logits(model)
    add_adapter(model, LoRAConfig(r=2), "lora")
    add_adapter(model, BottleneckConfig(4, placement="parallel"), "bottleneck")
    set_adapters(model, ["lora", "bottleneck"], trainable=True)
    assert torch.equal(logits(model), before)
    fill(model)
    unmerged, truth = logits(model), logits(copy.deepcopy(model).double())
    merge_adapters(model, ["lora"])
    assert_accurate(logits(model), unmerged, truth)
    assert not torch.equal(logits(model), before)
    with disable_adapters(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_activation_checkpointing_gives_the_same_gradients(placement):
    model = decoder().train()
    add_adapter(model, BottleneckConfig(4, placement=placement))
    fill(model)
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_copy_stands_on_its_own():
    model = decoder()
    add_adapter(model, BottleneckConfig(4, placement="parallel"))
    fill(model)
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    fill(other, 2)
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


def test_the_compiler_takes_a_parallel_adapter_whole():
    model = Plain()
    add_adapter(model, parallel_config())
    fill(model)
    h = torch.randn(3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h), model(h))


# --- models with names of their own ---


def parallel_config(**options):
    patterns = {"feed_forward": ["fall"], "feed_forward_input": ["rise"]}
    return BottleneckConfig(2, placement="parallel", **patterns, **options)


def test_explicit_patterns():
    model = Plain()
    h = torch.randn(3, 8)
    before = model(h)
    report = add_adapter(model, parallel_config(scaling=4.0))
    assert report.sites == ("blocks.0.rise", "blocks.0.fall", "blocks.1.rise", "blocks.1.fall")
    assert torch.equal(model(h), before)
    fill(model)

    def by_hand(h, dtype):
        h = h.to(dtype)
        for block in copy.deepcopy(model).to(dtype).blocks:
            x = block.norm(h)
            y = block.fall.base(torch.relu(block.rise.base(x)))
            h = h + y + change(block.fall.adapters["default"], x)
        return h

    with torch.no_grad():
        assert_accurate(model(h), by_hand(h, torch.float32), by_hand(h, torch.float64))


def test_a_whole_sub_layer_is_one_site():
    """Its own input and output serve the parallel placement; its size is its last layer's."""
    inner = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), second=inner))
    x = torch.randn(3, 4)
    config = BottleneckConfig(2, placement="parallel", feed_forward=["second"])
    assert add_adapter(model, config).sites == ("second",)
    fill(model)

    def by_hand(dtype):
        plain = copy.deepcopy(model).to(dtype)
        h = plain.first(x.to(dtype))
        return plain.second.base(h) + change(plain.second.adapters["default"], h)

    with torch.no_grad():
        assert_accurate(model(x), by_hand(torch.float32), by_hand(torch.float64))


def test_a_module_that_returns_a_tuple():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 6)

        def forward(self, x):
            return self.out(x), "weights"

    model = nn.ModuleDict({"attn": Attention(), "mlp": nn.Linear(6, 6)})
    add_adapter(
        model, BottleneckConfig(2, placement="houlsby", attention=["attn"], feed_forward=["mlp"])
    )
    fill(model)
    x = torch.randn(2, 6)
    y, rest = model["attn"](x)
    inner = model["attn"].base(x)[0]
    assert rest == "weights"
    assert torch.equal(y, model["attn"].adapters["default"](inner))


def test_exclude_leaves_out_both_ends():
    model = Plain()
    report = add_adapter(model, parallel_config(exclude=["blocks.0.fall"]))
    assert report.sites == ("blocks.1.rise", "blocks.1.fall")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no known family \(Llama, BERT, GPT-2, OPT\): name the modules .* names here: "),
        ({"feed_forward": ["fal"]}, "feed_forward: 'fal' matches no module; nearest names: 'fall'"),
        (
            {"feed_forward": ["0.fall"], "feed_forward_input": ["rise"], "placement": "parallel"},
            "feed_forward_input matches 2 modules and feed_forward 1: every sub-layer needs both",
        ),
        ({"feed_forward": ["fall"], "exclude": ["fell"]}, "exclude: 'fell' matches no module"),
        ({"feed_forward": ["blocks"], "reduction": 64}, "reduction = 64 leaves no unit of dim = 8"),
    ],
)
def test_patterns_are_strict(options, message):
    model = Plain()
    with pytest.raises(ValueError, match=message):
        add_adapter(model, BottleneckConfig(**options))
    assert type(model.blocks[0].fall) is nn.Linear


def test_a_module_without_a_size():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"'1' \(ReLU\) does not say how large its output is"):
        add_adapter(model, BottleneckConfig(feed_forward=["1"]))


def test_the_input_has_to_come_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    patterns = {"feed_forward": ["0"], "feed_forward_input": ["1"]}
    add_adapter(model, BottleneckConfig(2, placement="parallel", **patterns))
    with pytest.raises(ValueError, match="output module ran without its input module"):
        model(torch.randn(1, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "serial"}, "placement must be one of 'houlsby', .* got 'serial'"),
        ({"attention": ["o"]}, "attention belongs to placement='houlsby'; this is 'pfeiffer'"),
        (
            {"feed_forward_input": ["o"], "placement": "houlsby"},
            "feed_forward_input belongs to placement='parallel'; this is 'houlsby'",
        ),
        (
            {"feed_forward_input": ["o"], "placement": "parallel"},
            "feed_forward_input needs feed_forward beside it",
        ),
        ({"reduction": -1}, "reduction must be a number above 0, got -1"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


# --- files ---


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_save_and_load(placement, tmp_path):
    model = decoder()
    add_adapter(model, BottleneckConfig(4, "relu", placement, scaling=0.5))
    fill(model)
    save_adapter(model, tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["peft_type"] == "LORA_CORE_BOTTLENECK"
    assert (record["placement"], record["reduction"], record["scaling"]) == (placement, 4, 0.5)
    _, tensors = read_adapter(tmp_path)
    ends = ["mlp.down_proj"] + ["self_attn.o_proj"] * (placement == "houlsby")
    parts = {"down.weight": (8, 32), "down.bias": (8,), "up.weight": (32, 8), "up.bias": (32,)}
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        f"model.layers.{i}.{end}.{part}": shape
        for i in range(2)
        for end in ends
        for part, shape in parts.items()
    }
    other = decoder()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert not any(p.requires_grad for p in other.parameters())


def test_files_of_another_size_are_refused(tmp_path):
    model = decoder()
    add_adapter(model, BottleneckConfig(4))
    save_adapter(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(re.sub(r'"reduction": 4', '"reduction": 8', config.read_text()))
    other = decoder()
    with pytest.raises(ValueError, match=r"has shape \(8,\), the model needs \(4,\)"):
        load_adapter(other, tmp_path)
    assert all("adapters" not in name for name, _ in other.named_modules())
