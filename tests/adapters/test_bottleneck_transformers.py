"""Bottleneck adapters in transformers' models, against the layers written out by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_core.adapters import BottleneckConfig, add_adapter, disable_adapters, unload_adapters

pytestmark = pytest.mark.oracle
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "Bert": {"intermediate_size": 40},
    "Llama": {"intermediate_size": 40, "num_key_value_heads": 2},
    "GPT2": {"n_inner": 40},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 32, "pad_token_id": 1},
}
HEADS = {"Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel"}
# (ends, beginning of the feed-forward) under the name of a layer
NAMES = {
    "Bert": ("attention.output.dense", "output.dense", "intermediate.dense"),
    "Llama": ("self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"),
    "GPT2": ("attn.c_proj", "mlp.c_proj", "mlp.c_fc"),
    "OPT": ("self_attn.out_proj", "fc2", "fc1"),
}


@pytest.fixture
def build(oracle):
    def make(family: str) -> nn.Module:
        transformers = oracle("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
        model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
        for parameter in model.parameters():  # transformers' own start leaves attention flat
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids).logits


def fill(model: nn.Module) -> None:
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(i)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def change(adapter, x):
    w = {name: p.detach().to(x.dtype) for name, p in adapter.named_parameters()}
    h = F.gelu(x @ w["down.weight"].T + w["down.bias"])
    return adapter.scaling * (h @ w["up.weight"].T + w["up.bias"])


def assert_accurate(ours, theirs, truth):
    error, baseline = ((t.double() - truth).abs().max() for t in (ours, theirs))
    assert error <= 2 * baseline + 2 * torch.finfo(ours.dtype).eps * truth.abs().max()


def plain(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model without its hosts, and its adapters by the name of their site."""
    adapters = {
        name: host.adapters["default"]
        for name, host in model.named_modules()
        if hasattr(host, "adapters") and "default" in host.adapters
    }
    model = copy.deepcopy(model)
    unload_adapters(model)
    return model.to(dtype), adapters


def bert_by_hand(model: nn.Module, placement: str, dtype: torch.dtype) -> nn.Module:
    """Each BERT layer's own forward written out, dropout being off in evaluation."""
    bare, adapters = plain(model, dtype)
    for i, layer in enumerate(bare.bert.encoder.layer):
        name = f"bert.encoder.layer.{i}"
        after = adapters[f"{name}.output.dense"]

        def forward(h, mask=None, *_, layer=layer, name=name, after=after, **kwargs):
            attended = layer.attention.self(h, mask)[0]
            y = layer.attention.output.dense(attended)
            if placement == "houlsby":
                y = y + change(adapters[f"{name}.attention.output.dense"], y)
            x = layer.attention.output.LayerNorm(y + h)
            y = layer.output.dense(layer.intermediate(x))
            y = y + change(after, x if placement == "parallel" else y)
            return layer.output.LayerNorm(y + x)

        layer.forward = forward
    return bare


def llama_by_hand(model: nn.Module, placement: str, dtype: torch.dtype) -> nn.Module:
    bare, adapters = plain(model, dtype)
    for i, layer in enumerate(bare.model.layers):
        name = f"model.layers.{i}"
        after = adapters[f"{name}.mlp.down_proj"]

        def forward(h, *_, layer=layer, name=name, after=after, **kwargs):
            y = layer.self_attn(hidden_states=layer.input_layernorm(h), **kwargs)[0]
            if placement == "houlsby":
                y = y + change(adapters[f"{name}.self_attn.o_proj"], y)
            h = h + y
            x = layer.post_attention_layernorm(h)
            y = layer.mlp(x)
            return h + y + change(after, x if placement == "parallel" else y)

        layer.forward = forward
    return bare


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(build, family, placement):
    model = build(family)
    before = logits(model)
    report = add_adapter(model, BottleneckConfig(8, placement=placement))
    attention, end, start = NAMES[family]
    wanted = {"houlsby": [attention, end], "pfeiffer": [end], "parallel": [start, end]}[placement]
    assert len(report.sites) == 2 * len(wanted)
    for site in report.sites:
        assert any(site.endswith(f".{i}.{name}") for i in range(2) for name in wanted), site
    assert torch.equal(logits(model), before)
    fill(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), before)
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("adapters" in name), name
    unload_adapters(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kin", ["Mistral", "Qwen3", "Phi3", "Roberta"])
def test_kin_of_the_families(oracle, kin, placement):
    """Models that share the names, or nearly; Phi-3 has one matrix for gate and up."""
    transformers = oracle("transformers")
    sizes = SIZES | {"intermediate_size": 40, "pad_token_id": 1}
    if kin != "Roberta":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    model = getattr(transformers, f"{kin}ForCausalLM")(
        getattr(transformers, f"{kin}Config")(**sizes)
    ).eval()
    before = logits(model)
    report = add_adapter(model, BottleneckConfig(8, placement=placement))
    assert len(report.sites) == (2 if placement == "pfeiffer" else 4)
    assert torch.equal(logits(model), before)
    fill(model)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("family", "by_hand"), [("Bert", bert_by_hand), ("Llama", llama_by_hand)])
def test_against_the_layer_written_out(build, family, by_hand, placement):
    model = build(family)
    before = logits(model)
    add_adapter(model, BottleneckConfig(8, placement=placement, scaling=2.0))
    fill(model)
    with torch.no_grad():
        ours, truth = logits(model), logits(by_hand(model, placement, torch.float64))
        assert_accurate(ours, logits(by_hand(model, placement, torch.float32)), truth)
        assert (ours - before).abs().max() > 0.1


def test_a_feed_forward_run_in_chunks(build):
    """BERT may run its feed-forward in chunks: the tap and the sum then meet once a chunk."""
    model = build("Bert")
    add_adapter(model, BottleneckConfig(8, placement="parallel"))
    fill(model)
    whole = logits(model)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    double = copy.deepcopy(model).double()
    assert_accurate(logits(model), whole, logits(double))
