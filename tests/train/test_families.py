"""Training and its plan on every family: packed, recomputed and compiled it is the same run."""

import functools
from typing import Any

import pytest
import torch

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.families import FAMILIES
from lora_core.plan import plan
from lora_core.plan.memory import Settings, _count, _counted
from lora_core.train import TrainConfig, loop, train
from lora_core.train.compile import compiled_layers

SIZES: dict[str, Any] = {
    "vocab_size": 43,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16},
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 12},
    "gemma3_text": {"head_dim": 12, "sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 5, "original_max_position_embeddings": 64},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 4.0, "logits_scaling": 2.0},
}


def config_of(kind: str, **more: Any) -> ModelConfig:
    return ModelConfig.from_dict(SIZES | CHANGES.get(kind, {}) | more | {"model_type": kind})


def losses(kind: str, **options: Any) -> list[float]:
    """Of three steps on the same eight samples."""
    torch.manual_seed(1)
    model = CausalLM(config_of(kind))
    model.init_weights(0.2)
    add_adapter(model, LoRAConfig(r=4, alpha=16))
    rows = [torch.randint(1, 43, (length,)).tolist() for length in (5, 9, 7, 11, 6, 10, 8, 4)]
    samples = [{"input_ids": row, "labels": row} for row in rows]
    settings = TrainConfig(
        steps=3,
        batch_size=8,
        accumulate=1,
        lr=1e-2,
        warmup=0,
        schedule="constant",
        clip=None,
        progress=False,
        **options,
    )
    result = train(model, samples, settings)
    return [record["loss"] for record in result.history if "loss" in record]


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_and_recomputed(kind: str) -> None:
    plain = losses(kind)
    assert plain[0] > plain[1] > plain[2]
    packed = losses(kind, packing=24, activation_checkpointing=True)
    assert packed[0] == pytest.approx(plain[0], rel=1e-6)
    assert packed == pytest.approx(plain, rel=1e-3)  # Adam divides by what is small at first


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled(monkeypatch: pytest.MonkeyPatch, full_run: bool) -> None:
    """Traced whole (a break in a graph is an error), and run as it was traced."""
    replaced = functools.partial(compiled_layers, backend="eager")
    monkeypatch.setattr(loop, "compiled_layers", replaced)
    for kind in FAMILIES if full_run else ["gemma3_text"]:
        plain = losses(kind)
        torch._dynamo.reset()
        compiled = losses(kind, compile=True)
        torch._dynamo.reset()
        assert compiled[0] == pytest.approx(plain[0], rel=1e-6)
        assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_plans(kind: str, full_run: bool) -> None:
    methods = ("lora", "qlora", "full")
    if not full_run:
        methods = (methods[list(FAMILIES).index(kind) % 3],)
    config, settings = config_of(kind), TrainConfig(batch_size=2)
    for method in methods:
        found = plan(config, method, LoRAConfig(r=2), settings, tokens=16, device="cpu")
        parts = found.parts
        assert found.peak > parts["weights"] + parts["4-bit weights"] + parts["adapter"]
        assert (parts["4-bit weights"] > 0) == (method == "qlora")
        assert (found.trainable == found.parameters) == (method == "full")


@pytest.mark.parametrize(
    ("kind", "more", "exact"),
    [
        ("gemma3_text", {"sliding_window_pattern": 3, "num_hidden_layers": 6}, False),
        ("smollm3", {"num_hidden_layers": 8, "no_rope_layer_interval": 4}, False),
        ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 3]}, True),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}, True),
    ],
)
def test_layers_of_two_kinds_are_planned_as_they_are(
    kind: str, more: dict[str, Any], exact: bool
) -> None:
    """What is extended from two and three layers is what the whole model needs."""
    window = {"use_sliding_window": True, "sliding_window": 5} if kind == "smollm3" else {}
    config = config_of(kind, **more, **window)
    settings = Settings(
        config=config,
        method="lora",
        adapter=LoRAConfig(r=2),
        train=TrainConfig(batch_size=2, activation_checkpointing=True),
        tokens=32,
        device="cpu",
        weights=torch.float32,
        code="nf4",
    )
    found, whole = _counted(settings), _count(settings, config.num_hidden_layers)
    for part in ("frozen", "packed", "trained", "gradients", "optimizer"):
        assert getattr(found, part) == getattr(whole, part), part
    near = 0 if exact else 0.02
    assert found.kept == pytest.approx(whole.kept, rel=near)
    for phase, peak in whole.peaks.items():
        assert found.peaks[phase] == pytest.approx(peak, rel=near), phase
