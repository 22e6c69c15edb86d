"""The two stacks behind one function each: (settings, folder, adapter) -> a function of one batch.

Both hold the base in bfloat16 (4-bit for qlora: NF4, blocks of 64, double quantization), the
adapters in float32, compute under bfloat16 autocast, clip the gradient to norm 1 and update by
AdamW without decay. The other stack is the loop that people write: `model(**batch).loss`,
`backward()`, `clip_grad_norm_`, `step()`, without a Trainer, and without
`prepare_model_for_kbit_training`, which would cast its embedding and head to float32 and cost it
1 GB and time.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.problem import Settings

Batch = dict[str, Any]
Step = Callable[[Batch], float]
Opened = tuple[Step, contextlib.AbstractContextManager[object]]


def ours(settings: Settings, folder: Path, adapter: Path) -> Opened:
    """This library: `train_step` on a loaded folder."""
    from benchmarks.training.plain import without
    from lora_core import load_adapter, load_model
    from lora_core.device import dtype_policy
    from lora_core.train import CausalLoss, TrainConfig, train_step, trained_parameters
    from lora_core.train.compile import compiled_layers
    from lora_core.train.optim import make_optimizer
    from lora_core.train.recompute import recomputed_layers

    quantize = "nf4" if settings.method == "qlora" else None
    model = load_model(folder, quantize=quantize, device=settings.device)
    load_adapter(model, adapter, trainable=True)
    model.train()
    config = TrainConfig(lr=settings.lr, optimizer=settings.optimizer, dtype="bfloat16")
    parameters = trained_parameters(model)
    optimizer = make_optimizer(model, parameters.items(), config)
    policy = dtype_policy("bfloat16", settings.device)
    scaler = torch.amp.GradScaler(settings.device, enabled=False)
    around = contextlib.ExitStack()
    around.enter_context(compiled_layers(model, settings.compile))
    around.enter_context(recomputed_layers(model, settings.checkpointing))
    around.enter_context(without(settings.without))

    def step(batch: Batch) -> float:
        result = train_step(
            model, parameters, [batch], optimizer, scaler, policy, loss=CausalLoss(), clip=1.0
        )
        return float(result["loss"])

    return step, around


def theirs(settings: Settings, folder: Path, adapter: Path) -> Opened:
    """Run transformers, PEFT and, for qlora or 8-bit AdamW, bitsandbytes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": settings.device}
    if settings.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _their_optimizer(settings, parameters)

    def step(batch: Batch) -> float:
        batch = {name: t.to(settings.device) for name, t in batch.items() if isinstance(t, Tensor)}
        with torch.autocast(settings.device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step, contextlib.nullcontext()


def _their_optimizer(settings: Settings, parameters: list[Any]) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=settings.lr, weight_decay=0.0)  # type: ignore[no-any-return]
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=True)


STACKS: dict[str, Callable[[Settings, Path, Path], Opened]] = {"ours": ours, "theirs": theirs}
