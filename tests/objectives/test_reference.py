"""The reference policy is the model as training found it, whatever is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    active_names,
    add_adapter,
)
from lora_core.checkpoint import adapter_state_dict, load_adapter, save_adapter
from lora_core.data.branches import Branched, branch_batch
from lora_core.losses import dpo_loss
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.reference import Reference, turn_off_dropout
from lora_core.objectives.scoring import can_share, completion_log_probs
from lora_core.quant import quantize_model
from lora_core.train import TrainConfig

ROWS = [
    Branched((5, 6, 7, 8), ((1, 2, 3), (4, 3))),
    Branched((11, 2), ((3, 4), (5, 6, 7, 8))),
    Branched((2,), ((9,), (1, 1))),
]
KINDS: dict[str, Any] = {
    "lora": LoRAConfig(r=2),
    "dora": LoRAConfig(r=2, use_dora=True),
    "bias": LoRAConfig(r=2, bias="all", modules_to_save=["norm"], trainable_token_indices=[3]),
    "bottleneck": BottleneckConfig(reduction=4),
    "prompt": PromptTuningConfig(num_virtual_tokens=2),
    "prefix": PrefixTuningConfig(num_virtual_tokens=2),
}


def decoder() -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "llama"}
    model = CausalLM(ModelConfig.from_dict({**sizes, **heads, "attention_bias": True}))
    model.init_weights(std=0.3)
    return model


def setup(method: str = "lora", continued: Path | None = None) -> Any:
    return SimpleNamespace(
        method=method,
        continued=continued,
        device=torch.device("cpu"),
        training=TrainConfig(batch_size=2),
        bar=lambda items, unit, doing: items,
    )


def step_0(model: nn.Module, reference: Reference, rows: Any, run: Any, shared: bool) -> float:
    """DPO's loss before anything is learned, by the loop's way of putting batches together."""
    collate = lambda chosen: branch_batch(chosen, shared=shared)  # noqa: E731
    given = reference.record(model, rows, collate, run)
    # batches of a training are other than those of the recording
    batch = reference.collating(collate)([given[2], given[0], given[1]])
    model.train()
    policy, _ = completion_log_probs(model, batch)
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        x.sum(1).view(-1, 2).unbind(1) for x in (policy, reference.log_probs(model, batch))
    )
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_of_a_fresh_adapter_it_is_the_base_bit_for_bit(
    kind: str, quantized: bool, shake: Callable[..., nn.Module]
) -> None:
    model = decoder()
    if quantized:
        quantize_model(model)
    batch = branch_batch(ROWS, shared=False)
    base, _ = completion_log_probs(model, batch)
    add_adapter(model, KINDS[kind])
    reference = Reference.of(setup(), model)
    if kind not in ("prompt", "prefix"):
        assert step_0(model, reference, ROWS, setup(), can_share(model)) == pytest.approx(
            math.log(2), abs=2**-23
        )
    shake(model)
    assert torch.equal(reference.log_probs(model, batch), base)
    assert not torch.equal(completion_log_probs(model, batch)[0], base)
    assert str(reference) == "the base, adapters disabled"


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_continued_adapter_it_is_the_adapter_as_it_was(
    kind: str, shake: Callable[..., nn.Module], tmp_path: Path
) -> None:
    first = decoder()
    add_adapter(first, KINDS[kind])
    shake(first)
    save_adapter(first, tmp_path)
    model = decoder()
    load_adapter(model, tmp_path, trainable=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    run = setup(continued=tmp_path)
    reference = Reference.of(run, model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert active_names(model) == ["default"]
    assert step_0(model, reference, ROWS, run, can_share(model)) == pytest.approx(
        math.log(2), abs=2**-23
    )
    batch = branch_batch(ROWS, shared=False)
    before = reference.log_probs(model, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    assert torch.equal(reference.log_probs(model, batch), before)
    assert not torch.equal(completion_log_probs(model, batch)[0], before)
    assert not [key for key in adapter_state_dict(model) if "reference" in key]
    assert active_names(model) == ["default"]


@pytest.mark.parametrize("shared", [False, True])
def test_of_a_whole_model_it_is_recorded_before_the_first_step(shared: bool) -> None:
    model = decoder().requires_grad_(True)
    reference = Reference.of(setup("full"), model)
    assert step_0(model, reference, ROWS, setup("full"), shared) == pytest.approx(
        math.log(2), abs=2e-7
    )
    collate = lambda rows: branch_batch(rows, shared=shared)  # noqa: E731
    rows = reference.record(model, ROWS, collate, setup("full"))
    batch = reference.collating(collate)(rows)
    before, mask = completion_log_probs(model, batch)
    torch.testing.assert_close(batch["reference"], before.detach(), rtol=1e-5, atol=1e-5)
    assert not batch["reference"][~mask].any()
    with pytest.raises(ValueError, match="not in the model any more"), reference.active(model):
        pass


def test_recorded_rows_may_have_any_number_of_completions() -> None:
    model = decoder().requires_grad_(True)
    reference = Reference.of(setup("full"), model)
    uneven = [Branched((5, 6), ((1, 2), (3,), (4, 4, 4))), Branched((7,), ((8,),)), ROWS[0]]
    rows = reference.record(model, uneven, branch_batch, setup("full"), 0.5)
    batch = reference.collating(branch_batch)(rows[::-1])
    direct, _ = completion_log_probs(model, branch_batch(uneven[::-1]), 0.5)
    torch.testing.assert_close(batch["reference"], direct.detach(), rtol=1e-5, atol=1e-5)


def test_what_fails_inside_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = decoder()
    add_adapter(model, KINDS["lora"])
    save_adapter(model, tmp_path)
    model.train()
    bad = branch_batch([Branched((99,), ((1,),))])
    for run in (setup(), setup(continued=tmp_path)):
        reference = Reference.of(run, model)
        before, _ = completion_log_probs(model, branch_batch(ROWS))
        with pytest.raises(IndexError):
            reference.log_probs(model, bad)
        assert active_names(model) == ["default"]
        assert model.training
        assert torch.equal(completion_log_probs(model, branch_batch(ROWS))[0], before)


def test_dropout_is_turned_off_everywhere() -> None:
    model = decoder()
    add_adapter(model, LoRAConfig(r=2, dropout=0.5, targets=["q_proj"]))
    model.model.layers[0].self_attn.dropout = 0.1
    model.extra = nn.Dropout(0.3)
    assert turn_off_dropout(model) == 2 + 1 + 1
    assert turn_off_dropout(model) == 0
    model.train()
    found = [completion_log_probs(model, branch_batch(ROWS))[0] for _ in range(2)]
    assert torch.equal(*found)
