"""Runs from folder to folder: open a model as it was trained, fine-tune one."""

from lora_core.runs.finetune import FinetuneConfig, Finetuned, finetune
from lora_core.runs.opening import AdapterConfig, Opened, check_writes_text, open_model, read_run

__all__ = [
    "AdapterConfig",
    "FinetuneConfig",
    "Finetuned",
    "Opened",
    "check_writes_text",
    "finetune",
    "open_model",
    "read_run",
]
