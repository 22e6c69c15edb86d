"""Runs from folder to folder: open a model as it was trained, fine-tune one."""

from lora_core.runs.finetune import FinetuneConfig, Finetuned, finetune
from lora_core.runs.heads import OpenedHeads, open_heads
from lora_core.runs.opening import (
    AdapterConfig,
    Opened,
    check_no_heads,
    check_writes_text,
    open_model,
    read_run,
)

__all__ = [
    "AdapterConfig",
    "FinetuneConfig",
    "Finetuned",
    "Opened",
    "OpenedHeads",
    "check_no_heads",
    "check_writes_text",
    "finetune",
    "open_heads",
    "open_model",
    "read_run",
]
