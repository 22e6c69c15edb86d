"""A hundred steps of LoRA against PEFT, transformers and a plain loop, loss by loss."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import LoRAConfig, TrainConfig, add_adapter, load_model, train
from lora_core.adapters import adapted_modules
from lora_core.data import collate

STEPS, ACCUMULATE, WARMUP, LR = 100, 2, 5, 5e-3

pytestmark = pytest.mark.oracle


def make_batches() -> list[dict[str, Tensor]]:
    """50 padded batches of 3 rows; 1 to 30 graded tokens a row, so batches weigh differently."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(50):
        rows = []
        for _ in range(3):
            length = int(torch.randint(4, 32, (1,), generator=generator))
            # a pattern to learn: the next id is the last one plus a step that the row keeps
            start, step = torch.randint(1, 8, (2,), generator=generator).tolist()
            ids = [50 + (start + i * step) % 20 for i in range(length)]
            masked = int(torch.randint(0, length - 1, (1,), generator=generator))
            rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
        batches.append(collate(rows))
    return batches


def plain_loop(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[float]:
    """What one writes without a Trainer: accumulate, clip, AdamW, cosine after a warm-up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)

    def factor(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    model.train()
    for step in range(STEPS):
        start = step * ACCUMULATE % len(batches)
        group = batches[start : start + ACCUMULATE]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
        total = 0.0
        for batch in group:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def copy_start(peft_model: nn.Module, model: nn.Module) -> None:
    """Give our adapter PEFT's random A; B is zero in both."""
    theirs = dict(peft_model.named_modules())
    for name, host in adapted_modules(model):
        lora = theirs[f"base_model.model.{name}"]
        with torch.no_grad():
            host.A.copy_(lora.lora_A["default"].weight)
            assert not host.B.any()
            assert not lora.lora_B["default"].weight.any()


@pytest.fixture(scope="module")
def peer(oracle: Callable[[str], ModuleType], llama_folder: Path) -> tuple[Any, list[float]]:
    """A PEFT model before training, and the losses of training it."""
    transformers, peft = oracle("transformers"), oracle("peft")
    model = transformers.LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    start = {k: v.clone() for k, v in wrapped.state_dict().items()}
    losses = plain_loop(wrapped, make_batches())
    wrapped.load_state_dict(start)
    return wrapped, losses


@pytest.mark.parametrize("base", ["lora_core", "transformers"])
def test_every_loss_of_100_steps_is_the_peers(
    peer: tuple[Any, list[float]],
    oracle: Callable[[str], ModuleType],
    llama_folder: Path,
    base: str,
) -> None:
    peft_model, theirs = peer
    if base == "lora_core":
        model = load_model(llama_folder, dtype=torch.float32)
    else:
        loader = oracle("transformers").LlamaForCausalLM
        model = loader.from_pretrained(llama_folder, dtype=torch.float32)
    add_adapter(model, LoRAConfig(r=8, alpha=16))
    copy_start(peft_model, model)
    config = TrainConfig(
        steps=STEPS,
        accumulate=ACCUMULATE,
        lr=LR,
        warmup=WARMUP,
        weight_decay=0.01,
        dtype="float32",
        progress=False,
    )
    result = train(model, make_batches(), config)
    ours = [record["loss"] for record in result.history]
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    assert worst <= 1e-5, f"losses differ by {worst:.1e}"
    # and it is training: what is compared is not the first step a hundred times
    assert theirs[-1] < 0.9 * theirs[0]
