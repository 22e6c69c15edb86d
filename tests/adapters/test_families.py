"""Adapters on parts that only some families have: where they sit, what they see and keep."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    adapted_modules,
    adapter_rows,
    add_adapter,
    disable_adapters,
    grow_vocabulary,
    merge_adapters,
    set_adapters,
    unload_adapters,
)
from lora_core.models import CausalLM, KVCache, ModelConfig
from lora_core.models.layers import ScaledEmbedding

SIZES: dict[str, Any] = {
    "vocab_size": 43,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LAYERS = ("sliding_attention", "full_attention")
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 5,
        "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": 5,
        "layer_types": LAYERS,
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": 5},
    "smollm3": {"no_rope_layers": (1, 0)},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 4.0, "logits_scaling": 2.0},
}
SLIDING = ("mistral", "gemma2", "gemma3_text", "phi3")
PREFIX = PrefixTuningConfig(3, projection=False, std=1.0)
PROMPT = PromptTuningConfig(3)
Shake = Callable[..., None]


def made(kind: str, **more: Any) -> CausalLM:
    torch.manual_seed(1)
    model = CausalLM(ModelConfig(**SIZES | CHANGES[kind] | more, model_type=kind))
    model.init_weights(0.2)
    return model.eval()


def draw(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, 43, (batch, tokens), generator=torch.Generator().manual_seed(3))


def tell(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, **options).logits
    return logits


def near(a: Tensor, b: Tensor, times: float = 64) -> bool:
    eps = torch.finfo(a.dtype).eps
    return bool((a - b).abs().max() <= times * eps * b.abs().max())


# --- scaled embeddings ---


def test_token_rows_of_a_scaled_embedding_start_as_they_are_in_16_bits() -> None:
    """The scale is rounded to bfloat16 there: 45.25 for sqrt(2048)."""
    model = made("gemma").bfloat16()
    ids = torch.arange(43)[None]
    embedding: nn.Module = model.model.embed_tokens
    rows = embedding(ids)
    assert not torch.equal(rows, embedding.weight[None] * embedding.embed_scale)
    tokens = LoRAConfig(r=2, targets=["o_proj"], trainable_token_indices=list(range(43)))
    add_adapter(model, tokens)
    assert torch.equal(model.model.embed_tokens(ids), rows)


def test_a_pair_of_a_scaled_embedding_is_scaled_as_its_rows(shake: Shake) -> None:
    model = made("gemma")
    ids = torch.arange(43)[None]
    add_adapter(model, LoRAConfig(r=2, targets=["embed_tokens"], untie=True))
    shake(model)
    host = dict(adapted_modules(model))["model.embed_tokens"]
    found = host(ids)
    weight = host.base.weight + host.adapter("default").delta_weight()
    assert near(found, weight[None] * 32**0.5, 8)
    merge_adapters(model)
    assert isinstance(host.merged.module, ScaledEmbedding)
    assert near(host(ids), found, 8)
    with pytest.raises(ValueError, match="tied"):
        add_adapter(made("gemma"), LoRAConfig(r=2, targets=["embed_tokens"]))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_growing_keeps_class_scale_and_tie(kind: str) -> None:
    model = made(kind)
    ids = draw(2, 9)
    plain = tell(model, ids)
    embedding = model.model.embed_tokens
    grow_vocabulary(model, 47)
    assert model.model.embed_tokens is embedding
    assert type(embedding) is ScaledEmbedding
    assert model.lm_head.weight is embedding.weight
    assert near(tell(model, ids)[..., :43], plain)
    row = embedding(torch.tensor([45]))
    assert torch.equal(row, embedding.scaled(embedding.weight[45:46]))
    add_adapter(model, LoRAConfig(r=2, trainable_token_indices=[43, 46]))
    assert near(tell(model, ids)[..., :43], plain)


# --- bottlenecks ---


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "granite", "phi3"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_bottlenecks_sit_before_the_norm_behind_a_sub_layer(
    kind: str, placement: str, shake: Shake
) -> None:
    """At the output of the last linear layer: y = x + m norm(h + f(h))."""
    model = made(kind)
    ids = draw(2, 9)
    plain = tell(model, ids)
    report = add_adapter(model, BottleneckConfig(reduction=4, placement=placement))
    ends = {"mlp.down_proj"} | ({"self_attn.o_proj"} if placement == "houlsby" else set())
    fused = kind == "phi3"
    first = f"mlp.{'gate_up_proj' if fused else 'gate_proj'}"
    starts = {first} if placement == "parallel" else set()
    assert {site.split(".", 3)[3] for site in report.sites} == ends | starts
    assert torch.equal(tell(model, ids), plain)
    shake(model)
    layer: Any = model.model.layers[0]
    end = layer.mlp.down_proj.adapter("default")
    seen: dict[str, Any] = {}
    with torch.no_grad():
        layer.mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
        layer.register_forward_hook(lambda _, args, out: seen.update(y=out))
        tell(model, ids)
        x, out = seen["x"], seen["out"]
        with disable_adapters(model):
            h = copy.deepcopy(layer.mlp)(x)
        added = end.change(x if placement == "parallel" else h)
        assert added.abs().max() > 0.01
        assert near(out, h + added)
        behind = getattr(layer, "post_feedforward_layernorm", nn.Identity())(out)
        assert near(layer._add(torch.zeros_like(out), 3, out), behind * layer.multiplier)


def test_a_bottleneck_behind_the_norm_is_asked_for_by_name(shake: Shake) -> None:
    model = made("gemma2")
    ids = draw(2, 9)
    plain = tell(model, ids)
    behind = BottleneckConfig(reduction=4, feed_forward=["post_feedforward_layernorm"])
    report = add_adapter(model, behind)
    assert report.sites == tuple(f"model.layers.{i}.post_feedforward_layernorm" for i in (0, 1))
    assert torch.equal(tell(model, ids), plain)
    shake(model)
    assert not near(tell(model, ids), plain)


# --- soft prompts ---


@pytest.mark.parametrize("kind", [*SLIDING, "smollm3", "olmo2"])
@pytest.mark.parametrize("config", [PREFIX, PROMPT])
def test_a_cache_gives_what_the_whole_text_gives(kind: str, config: Any) -> None:
    model = made(kind)
    ids = draw(2, 14)
    plain = tell(model, ids)
    add_adapter(model, config)
    whole = tell(model, ids)
    assert not near(whole, plain)
    cache = KVCache()
    parts = [tell(model, part, cache=cache) for part in ids.split([6, 4, 1, 1, 1, 1], 1)]
    assert near(torch.cat(parts, 1), whole, 256)


@pytest.mark.parametrize("kind", SLIDING)
def test_a_prefix_does_not_slide_out_of_sight(kind: str) -> None:
    """Of a layer with a window of 5, the twelfth token still sees the prefix, and a prompt not."""
    model = made(kind)
    ids = draw(1, 12)
    found: dict[str, Tensor] = {}
    first: Any = model.model.layers[0]
    first.self_attn.o_proj.register_forward_hook(lambda _, args, out: found.update(now=out))
    seen = {}
    for name, config in {"prefix": PREFIX, "prompt": PROMPT}.items():
        tell(model, ids)
        plain = found["now"][:, -1]
        add_adapter(model, config, name)
        tell(model, ids)
        seen[name] = not near(found["now"][:, -1], plain, 256)
        unload_adapters(model)
    assert seen == {"prefix": True, "prompt": False}


# --- rows ---


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "qwen2"])
def test_rows_that_name_their_adapters(kind: str, shake: Shake) -> None:
    model = made(kind)
    add_adapter(model, LoRAConfig(r=4), "a")
    add_adapter(model, LoRAConfig(r=2, targets=["o_proj", "down_proj"]), "b")
    shake(model, 0.1)
    ids = draw(4, 9)
    names = ["a", None, "b", "a"]
    with adapter_rows(model, names):
        together = tell(model, ids)
    for row, name in enumerate(names):
        set_adapters(model, [] if name is None else name)
        assert near(together[row], tell(model, ids[row : row + 1])[0], 256)
    assert not near(together[1], tell(model, ids[1:2])[0])  # with "a"
