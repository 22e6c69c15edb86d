"""Scores of completions that share a prompt, in the dtypes and models that training has."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.checkpoint import load_adapter, save_adapter
from lora_core.data.branches import Branched, branch_batch
from lora_core.losses import dpo_loss
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.reference import Reference
from lora_core.objectives.scoring import can_share, completion_log_probs
from lora_core.quant import quantize_model

ROWS = [
    Branched((5, 6, 7, 8, 9), ((1, 2, 3), (4, 3))),
    Branched((11,), ((3, 4), (5, 6, 7, 8))),
]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "olmo2": {"model_type": "olmo2"},
    "qwen2": {"model_type": "qwen2"},
}


def decoder(family: str = "llama", dtype: torch.dtype = torch.float64) -> CausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 13,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = CausalLM(ModelConfig.from_dict(sizes | FAMILIES[family]))
    model.init_weights(std=0.2)
    return model.to(dtype)


def scored(model: nn.Module, shared: bool) -> list[Tensor]:
    """Log-probabilities of all completions, then the gradients of a weighted sum."""
    found, mask = completion_log_probs(model, branch_batch(ROWS, shared=shared))
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = (found * weights)[mask].sum()
    return [found.detach(), *torch.autograd.grad(total, trained, materialize_grads=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_apart(family: str) -> None:
    model = decoder(family)
    for ours, theirs in zip(scored(model, True), scored(model, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_accurate_as_apart(autocast: bool) -> None:
    weights = decoder(dtype=torch.bfloat16)  # all start from the same rounded weights
    exact = scored(weights.double(), False)
    model = weights.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = scored(model, True), scored(model, False)
    assert ours[0].dtype == torch.float32
    for a, b, t in zip(ours, theirs, exact, strict=True):
        rounding = 2 * 2**-8 * t.abs().max()
        assert (a - t).abs().max() <= 2 * (b - t).abs().max() + rounding


@pytest.mark.parametrize("shared", [False, True])
def test_a_continued_adapter_on_a_4_bit_base_begins_at_ln_2(shared: bool, tmp_path: Path) -> None:
    first = decoder(dtype=torch.float32)
    quantize_model(first)
    add_adapter(first, LoRAConfig(r=2))
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_adapter(first, tmp_path)
    model = decoder(dtype=torch.float32)
    quantize_model(model)
    load_adapter(model, tmp_path, trainable=True)
    setup: Any = SimpleNamespace(method="lora", continued=tmp_path)
    reference = Reference.of(setup, model)
    assert can_share(model)
    batch = branch_batch(ROWS, shared=shared)
    policy, _ = completion_log_probs(model, batch)
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        x.sum(1).view(-1, 2).unbind(1) for x in (policy, reference.log_probs(model, batch))
    )
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    assert loss.item() == pytest.approx(math.log(2), abs=2**-23)
