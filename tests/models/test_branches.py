"""Completions that share their prompt's computation give what rows of their own give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, add_adapter
from lora_core.data.branches import Branched, branch_batch
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.scoring import completion_log_probs, why_not_shared

ROWS = [
    Branched((5, 6, 7, 8, 9), ((1, 2, 3), (4, 3), (2,))),
    Branched((11,), ((3, 4), (5, 6, 7, 8)), ((True, True), (False, True, True, True))),
]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 3,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 3,
        "rope_local_base_freq": 100.0,
        "query_pre_attn_scalar": 16,
    },
}


CONFIGS = FAMILIES | {"experts": {"model_type": "qwen3_moe", **EXPERTS}}


def decoder(family: str = "llama", dtype: torch.dtype = torch.float64) -> CausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 13,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    model = CausalLM(ModelConfig.from_dict(sizes | {"model_type": "llama"} | CONFIGS[family]))
    model.init_weights(std=0.3)
    return model.to(dtype)


def scored(model: nn.Module, shared: bool, temperature: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    batch = branch_batch(ROWS, shared=shared, pad_id=12)
    found, mask = completion_log_probs(model, batch, temperature)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((found * weights)[mask].sum(), trained)
    return found, list(gradients)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_shared_is_apart(family: str, recompute: bool) -> None:
    model = decoder(family)
    model.gradient_checkpointing = recompute
    together, apart = scored(model, True, 0.7), scored(model, False, 0.7)
    torch.testing.assert_close(together[0], apart[0], rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(together[1], apart[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert bool((together[0] != 0).any(1).all())


def as_accurate_as(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """An error of at most twice the other's, and two roundings of the largest value."""
    limit = 2 * (theirs - truth).abs().max() + 2 * 2**-23 * truth.abs().max()
    assert (ours - truth).abs().max() <= limit


def test_shared_is_as_accurate_as_apart() -> None:
    truth, model = decoder(), decoder(dtype=torch.float32)
    exact = scored(truth, False)
    ours, theirs = scored(model, True), scored(model, False)
    as_accurate_as(ours[0], theirs[0], exact[0])
    for a, b, t in zip(ours[1], theirs[1], exact[1], strict=True):
        as_accurate_as(a, b, t)


def test_experts_are_as_accurate_shared_as_apart() -> None:
    # their router computes in float32 whatever the model is in, so that float64 is no more exact
    exact = scored(decoder("experts"), False)
    model = decoder("experts", torch.float32)
    ours, theirs = scored(model, True), scored(model, False)
    as_accurate_as(ours[0], theirs[0], exact[0])
    for a, b, t in zip(ours[1], theirs[1], exact[1], strict=True):
        as_accurate_as(a, b, t)


def test_a_branch_does_not_see_another() -> None:
    model = decoder()
    batch = branch_batch(ROWS)
    before, _ = completion_log_probs(model, batch)
    batch["input_ids"][0, 6] = 0  # in the first completion of the first row
    after, _ = completion_log_probs(model, batch)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1:], before[1:])


def test_the_padding_is_not_seen() -> None:
    model = decoder()
    found = [completion_log_probs(model, branch_batch(ROWS, pad_id=p))[0] for p in (0, 12)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (LoRAConfig(r=2, use_dora=True), True),
        (PrefixTuningConfig(num_virtual_tokens=3), True),
        (PromptTuningConfig(num_virtual_tokens=3), False),
    ],
)
def test_adapters(config: Any, shares: bool, shake: Callable[..., nn.Module]) -> None:
    model = decoder(dtype=torch.float32)
    add_adapter(model, config)
    shake(model)
    model.double()
    assert (why_not_shared(model) is None) is shares
    apart, _ = completion_log_probs(model, branch_batch(ROWS, shared=False))
    if shares:
        together, _ = completion_log_probs(model, branch_batch(ROWS))
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    else:
        assert "virtual tokens" in str(why_not_shared(model))
    alone = completion_log_probs(model, branch_batch(ROWS[1:], shared=False))[0]
    torch.testing.assert_close(apart[3:, :4][:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_another_module_is_taken_whole() -> None:
    inner = decoder()

    class Other(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return inner(input_ids, attention_mask)

    batch = branch_batch(ROWS, shared=False)
    theirs, _ = completion_log_probs(Other(), batch, 0.5)
    ours, _ = completion_log_probs(inner, batch, 0.5)
    torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    assert why_not_shared(Other()) == "Other has no branch_ids"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"branch_ids": torch.zeros(1, 3)}, r"branch_ids must have shape \(1, 4\); got \(1, 3\)"),
        (
            {"branch_ids": torch.zeros(1, 4), "document_ids": torch.zeros(1, 4)},
            "either document_ids or branch_ids",
        ),
    ],
)
def test_what_does_not_go_together(more: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoder()(torch.ones(1, 4, dtype=torch.int64), **more)


def test_a_temperature_is_above_zero() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0; got 0"):
        completion_log_probs(decoder(), branch_batch(ROWS), 0.0)
