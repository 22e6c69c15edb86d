"""Plans of mixtures of experts: every expert's weights count, no value is read."""

from typing import Any

import pytest
import torch

from lora_core import quantize_model
from lora_core.adapters import LoRAConfig
from lora_core.models import CausalLM, ModelConfig
from lora_core.models.experts import NF4Experts
from lora_core.plan.empty import empty_model
from lora_core.plan.inside import Inside
from lora_core.plan.step import Tally, tally
from lora_core.quant import NF4Linear, NF4Stack
from lora_core.train.config import TrainConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "model_type": "qwen3_moe",
}


def plan(method: str, experts: int, tokens: int = 16) -> Tally:
    config = ModelConfig(**SIZES, num_experts=experts)
    model = empty_model(config, method, LoRAConfig(r=2), torch.bfloat16)
    return tally(model, TrainConfig(), 2, tokens, Inside(torch.bfloat16))


def test_4_bit_experts_are_those_that_quantizing_makes() -> None:
    config = ModelConfig(**SIZES, num_experts=4)
    planned = empty_model(config, "qlora", LoRAConfig(r=2, targets=["q_proj"]), torch.bfloat16)
    made = CausalLM(config)
    quantize_model(made)
    wanted = {n: m for n, m in made.named_modules() if isinstance(m, NF4Stack)}
    assert len(wanted) == 6
    for name, stack in wanted.items():
        ours = planned.get_submodule(name).state_dict()
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
            k: (t.shape, t.dtype) for k, t in stack.state_dict().items()
        }
    assert isinstance(planned.get_submodule("model.layers.0.mlp.experts"), NF4Experts)
    assert not isinstance(planned.get_submodule("model.layers.0.mlp.gate"), NF4Linear)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_grow_with_the_experts_and_what_is_kept_does_not(method: str) -> None:
    few, many = plan(method, 4), plan(method, 8)
    matrices = 2 * 4 * 3 * 24 * 64  # of four experts in two layers
    if method == "lora":
        assert many.frozen - few.frozen == 2 * (matrices + 2 * 4 * 64)  # and the routers' rows
        assert many.packed == few.packed == 0
    else:
        assert many.packed - few.packed == matrices // 2 + matrices // 64 + 2 * 4 * 3 * 8
    pairs = 2 * 4 * 2 * (64 + 48 + 24 + 64) + 2 * 4 * 2
    assert many.trained_numel - few.trained_numel == pairs
    # tokens go to as many experts as before; what is kept grows by casts of pairs and by scores
    assert many.kept - few.kept <= 2 * pairs * 2 + 64 * 32 * 4
