"""Adapters: small trainable modules beside frozen ones, and how they get into a model."""

from lora_core.adapters.base import Adapted, Adapter, adapted_modules, dense_weight
from lora_core.adapters.lora import LoRA, LoRALinear

__all__ = ["Adapted", "Adapter", "LoRA", "LoRALinear", "adapted_modules", "dense_weight"]
