"""Decoders built from a Hugging Face configuration, their cache and generation."""

from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.decoder import CausalLM, ModelOutput

__all__ = ["CausalLM", "KVCache", "ModelConfig", "ModelOutput"]
