"""Model folders and adapters on disk."""

from lora_core.checkpoint.adapterhub import load_adapterhub, save_adapterhub
from lora_core.checkpoint.base_model import base_model_path
from lora_core.checkpoint.export import ExportReport, export_adapter
from lora_core.checkpoint.folder import load_model, save_model
from lora_core.checkpoint.peft import (
    adapter_state_dict,
    load_adapter,
    read_adapter,
    save_adapter,
)
from lora_core.checkpoint.safetensors_folder import SafetensorsFolder, load_state
from lora_core.checkpoint.spectrum import read_spectrum
from lora_core.checkpoint.swap import swap_adapter

__all__ = [
    "ExportReport",
    "SafetensorsFolder",
    "adapter_state_dict",
    "base_model_path",
    "export_adapter",
    "load_adapter",
    "load_adapterhub",
    "load_model",
    "load_state",
    "read_adapter",
    "read_spectrum",
    "save_adapter",
    "save_adapterhub",
    "save_model",
    "swap_adapter",
]
