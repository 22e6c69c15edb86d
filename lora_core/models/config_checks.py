"""Do the values of a `ModelConfig` fit together? One line for whatever does not.

Each message names the key, as config.json has it, the value and the rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lora_core.models.families import FULL, LAYER_TYPES, SLIDING
from lora_core.models.reading import COMMON, unknown
from lora_core.models.rope_check import check_rope

if TYPE_CHECKING:
    from lora_core.models.config import ModelConfig
    from lora_core.models.encoder_config import EncoderConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
LARGEST = 2**31 - 1  # of any size: a larger one is no model's


def required(cls: type[ModelConfig] | type[EncoderConfig]) -> list[str]:
    """The sizes that say which model it is: fields without a default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def check_types(config: ModelConfig | EncoderConfig) -> None:
    """Every field of its annotation's type; a boolean is no number."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        kinds = _KINDS[str(f.type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{f.name} must be of type {f.type}; got {value!r}")
        element = _ELEMENTS.get(str(f.type))
        if element and isinstance(value, tuple) and any(type(v) is not element for v in value):
            raise TypeError(f"{f.name} must hold {element.__name__} alone; got {value!r}")


_NONE = type(None)
# the annotations above -> what isinstance accepts (a whole number is a fine float)
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "int | None": (int, _NONE),
    "float | None": (float, int, _NONE),
    "str | None": (str, _NONE),
    "int | tuple[int, ...] | None": (int, tuple, _NONE),
    "tuple[int, ...]": (tuple,),
    "tuple[int, ...] | None": (tuple, _NONE),
    "tuple[str, ...] | None": (tuple, _NONE),
    "Mapping[str, Any]": (Mapping,),
}
_ELEMENTS: dict[str, type] = {
    "int | tuple[int, ...] | None": int,
    "tuple[int, ...]": int,
    "tuple[int, ...] | None": int,
    "tuple[str, ...] | None": str,
}


def check_sizes(config: ModelConfig) -> None:
    """Sizes within what any model has."""
    more = ["num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"]
    more += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"]
    for key in [*required(type(config)), *more]:
        size = getattr(config, key)
        if size is not None and not 1 <= size <= LARGEST:
            rule = "be at least 1" if size < 1 else f"be at most {LARGEST}"
            raise ValueError(f"{key} must {rule}; got {size}")
    if config.num_hidden_layers > 10_000:
        raise ValueError(f"num_hidden_layers must be at most 10000; got {config.num_hidden_layers}")


def check_read(config: ModelConfig) -> None:
    """Refuse a value that the family's config.json could not hold, so that saving loses nothing."""
    known = {*COMMON, *config.family.keys, "rope_parameters", "dtype", "model_type", "layer_types"}
    for f in dataclasses.fields(config):
        if f.name not in known and getattr(config, f.name) != f.default:
            raise ValueError(f"{f.name} is no key of {config.model_type}'s configuration")


def checked_rope(config: ModelConfig) -> dict[str, Any]:
    """The rotation, or that of each layer type, complete and possible."""
    family, rope = config.family, config.rope_parameters
    if family.local_rope_theta is None:
        whole = {"rope_theta": family.rope_theta, **rope}
        return check_rope(whole, config.heads[2], partial=family.partial_rotary)
    thetas = {FULL: family.rope_theta, SLIDING: family.local_rope_theta}
    if rope and set(rope) != set(thetas):
        raise ValueError(
            f"rope_parameters of {config.model_type} must hold {' and '.join(thetas)}; "
            f"got {', '.join(map(str, rope))}"
        )
    return {
        kind: check_rope(
            {"rope_theta": theta, **rope.get(kind, {})},
            config.heads[2],
            partial=family.partial_rotary,
        )
        for kind, theta in thetas.items()
    }


def check_layers(config: ModelConfig) -> None:
    """What is said layer by layer, for as many layers as there are."""
    for key in ("layer_types", "no_rope_layers"):
        value = getattr(config, key)
        if value is not None and len(value) != config.num_hidden_layers:
            raise ValueError(
                f"{key} must have an entry for each of {config.num_hidden_layers} layers; "
                f"got {len(value)}"
            )
    if any(turns not in (0, 1) for turns in config.no_rope_layers or ()):
        raise ValueError(f"no_rope_layers must hold 0 and 1 alone; got {config.no_rope_layers}")
    for kind in config.kinds:
        if kind not in LAYER_TYPES:
            raise ValueError(unknown("layer type", kind, LAYER_TYPES))
    if SLIDING in config.kinds and config.sliding_window is None:
        raise ValueError(f"{SLIDING} layers need sliding_window, the tokens that they see")
    if "layer_types" not in config.family.keys:
        own = tuple(config.family.layer_types(vars(config)))
        if config.kinds != own:
            raise ValueError(f"layer_types is no key of {config.model_type}'s configuration")


def check_experts(config: ModelConfig) -> None:
    """Experts with a width, and as many as a token is sent to."""
    if config.num_experts is None:
        return
    if config.moe_intermediate_size is None:
        raise ValueError("num_experts needs moe_intermediate_size, the width of an expert")
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than num_experts "
            f"{config.num_experts}"
        )


def check_ranges(config: ModelConfig) -> None:
    """Numbers within their bounds, names that are known, token ids that could be."""
    _check_heads(config)
    _check_tokens(config)
    limits = {
        "rms_norm_eps": (config.rms_norm_eps > 0, "be positive"),
        "attention_dropout": (0 <= config.attention_dropout < 1, "lie in [0, 1)"),
        "initializer_range": (config.initializer_range >= 0, "not be negative"),
        "router_aux_loss_coef": (
            0 <= config.router_aux_loss_coef < math.inf,
            "be finite, 0 or more",
        ),
    }
    for key in _POSITIVE:
        value = getattr(config, key)
        limits[key] = (value is None or 0 < value < math.inf, "be positive and finite")
    for key, (fits, rule) in limits.items():
        if not fits:
            raise ValueError(f"{key} must {rule}; got {getattr(config, key)}")
    for key, known in {"hidden_act": ACTIVATIONS, "dtype": (*DTYPES, None)}.items():
        if getattr(config, key) not in known:
            raise ValueError(unknown(key, getattr(config, key), tuple(filter(None, known))))


def _check_heads(config: ModelConfig) -> None:
    heads, kv_heads, head_dim = config.heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embedding; got {head_dim}")


def _check_tokens(config: ModelConfig) -> None:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, key)
        for token in ids if isinstance(ids, tuple) else (ids,):
            if token is not None and not 0 <= token <= LARGEST:
                raise ValueError(f"{key} must be the number of a token; got {token}")


_POSITIVE = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
