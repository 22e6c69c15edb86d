"""Model folders and adapters on disk."""

from lora_core.checkpoint.folder import load_model, save_model
from lora_core.checkpoint.safetensors_folder import SafetensorsFolder, load_state

__all__ = ["SafetensorsFolder", "load_model", "load_state", "save_model"]
