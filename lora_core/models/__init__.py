"""Decoders and encoders built from a Hugging Face configuration, their cache and generation."""

from lora_core.models.build import build_model, read_config
from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.decode_step import DecodeStep
from lora_core.models.decoder import CausalLM, ModelOutput
from lora_core.models.encoder import Encoder, EncoderModel, EncoderOutput
from lora_core.models.encoder_config import EncoderConfig
from lora_core.models.encoder_heads import MaskedLM, SequenceClassifier, SpanFinder, TokenClassifier
from lora_core.models.families import Family, register_family
from lora_core.models.generate import generate, generate_batch, generate_ids, left_pad
from lora_core.models.multi_head import HeadOutput, MultiHead
from lora_core.models.sampling import Sampling
from lora_core.models.session import Session
from lora_core.models.stopping import TextStream
from lora_core.models.task_heads import Head, HeadShape

__all__ = [
    "CausalLM",
    "DecodeStep",
    "Encoder",
    "EncoderConfig",
    "EncoderModel",
    "EncoderOutput",
    "Family",
    "Head",
    "HeadOutput",
    "HeadShape",
    "KVCache",
    "MaskedLM",
    "ModelConfig",
    "ModelOutput",
    "MultiHead",
    "Sampling",
    "SequenceClassifier",
    "Session",
    "SpanFinder",
    "TextStream",
    "TokenClassifier",
    "build_model",
    "generate",
    "generate_batch",
    "generate_ids",
    "left_pad",
    "read_config",
    "register_family",
]
