"""Decoders built from a Hugging Face configuration, their cache and generation."""

from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.decoder import CausalLM, ModelOutput
from lora_core.models.generate import generate, generate_ids, left_pad

__all__ = [
    "CausalLM",
    "KVCache",
    "ModelConfig",
    "ModelOutput",
    "generate",
    "generate_ids",
    "left_pad",
]
