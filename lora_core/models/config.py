"""config.json as a checked, frozen description of a decoder.

Which keys a family reads, what an absent one means and which parts it is made of is the family's
row in families.py; how the two dialects in circulation are read is reading.py's. Here are the
values themselves and whether they fit together. The five sizes that say which model it is must be
there. What the decoder does not implement (an architecture, a RoPE type, an activation) is refused
by name, so no checkpoint is ever run as something it is not.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from lora_core.models.families import FAMILIES, FULL, LAYER_TYPES, SLIDING, Family
from lora_core.models.reading import COMMON, read_values, unknown, write_values
from lora_core.models.rope_config import check_rope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
LARGEST = 2**31 - 1  # of any size: a larger one is no model's


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder, with Hugging Face's names.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
        TypeError: a value of the wrong type.
    """

    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated feed-forward layer."""
    num_hidden_layers: int
    """Number of decoder layers."""
    num_attention_heads: int
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (grouped-query attention); None: one per query head."""
    head_dim: int | None = None
    """Channels per head, even; None: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    """Activation of the feed-forward gate."""
    max_position_embeddings: int = 2048
    """Longest sequence of the pretraining, in tokens; not enforced."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    """`rope_type`, `rope_theta` and that type's own keys; or, where the family has it so, such a
    mapping for each layer type. Empty: the plain rotation with the family's theta."""
    no_rope_layers: tuple[int, ...] | None = None
    """1 for each layer that rotates queries and keys, 0 for one that does not; None: all do."""
    layer_types: tuple[str, ...] | None = None
    """"full_attention" or "sliding_attention" for each layer; None: as the family has it."""
    sliding_window: int | None = None
    """Tokens that a sliding layer sees, the present one included; None: no layer slides."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have a bias."""
    mlp_bias: bool = False
    """Whether gate, up and down projections have a bias."""
    attention_dropout: float = 0.0
    """Dropout of attention weights in training mode, a probability."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its square root; None: head_dim."""
    attention_multiplier: float | None = None
    """Factor on the scores, in the place of 1 / sqrt(head_dim); None: that."""
    attn_logit_softcapping: float | None = None
    """c: scores become c · tanh(score / c); None: no cap."""
    final_logit_softcapping: float | None = None
    """The same for the logits."""
    embedding_multiplier: float = 1.0
    """Factor on the embeddings."""
    residual_multiplier: float = 1.0
    """Factor on what a layer's two parts add to the residual stream."""
    logits_scaling: float = 1.0
    """What logits are divided by."""
    num_experts: int | None = None
    """Experts of a mixture-of-experts layer; None: the feed-forward layers are dense."""
    num_experts_per_tok: int = 8
    """Experts that each token is sent to."""
    moe_intermediate_size: int | None = None
    """Width of an expert."""
    norm_topk_prob: bool = False
    """Whether the chosen experts' weights are made to sum to 1."""
    decoder_sparse_step: int = 1
    """Every so many layers one has experts."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers without experts, by number."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss."""
    output_router_logits: bool = False
    """Whether the load-balancing loss is computed, and added to the loss."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding's own weight."""
    bos_token_id: int | None = 1
    """Token that starts a text, where the tokenizer adds one."""
    eos_token_id: int | tuple[int, ...] | None = 2
    """Token or tokens that end a text."""
    pad_token_id: int | None = None
    """Padding token."""
    dtype: str | None = None
    """Floating dtype of the weights on disk, a key of `DTYPES`; None: not said."""
    model_type: str = "llama"
    """Family: a key of `FAMILIES`."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self)
        if self.model_type not in FAMILIES:
            raise ValueError(unknown("model_type", self.model_type, FAMILIES))
        _check_read(self)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", tuple(self.family.layer_types(vars(self))))
        _check_ranges(self)
        object.__setattr__(self, "rope_parameters", _checked_rope(self))
        _check_layers(self)
        _check_experts(self)

    @property
    def family(self) -> Family:
        """What the sizes do not say."""
        return FAMILIES[self.model_type]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, channels per head."""
        assert self.num_key_value_heads is not None  # both are set by __post_init__
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """`layer_types`, which is always filled in."""
        assert self.layer_types is not None  # by __post_init__
        return self.layer_types

    @property
    def attention_scale(self) -> float | None:
        """Factor on the scores; None: 1 / sqrt(head_dim)."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        width = self.query_pre_attn_scalar
        return None if width is None else 1 / math.sqrt(width)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, () if there is none."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else ids

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is a mixture of experts."""
        if self.num_experts is None or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    def with_layers(self, count: int) -> Self:
        """The same with another number of layers, those kinds repeated that there are.

        Args:
            count: number of layers, at least 1.
        """
        kinds = tuple(self.kinds[i % len(self.kinds)] for i in range(count))
        turns = self.no_rope_layers
        if turns is not None:
            turns = tuple(turns[i % len(turns)] for i in range(count))
        return dataclasses.replace(
            self, num_hidden_layers=count, layer_types=kinds, no_rope_layers=turns
        )

    @classmethod
    def from_folder(cls, directory: str | Path) -> Self:
        """Read `config.json` of a Hugging Face folder.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: it is no JSON object, or describes what this library cannot run.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no config.json: not a Hugging Face folder")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object; got {type(raw).__name__}")
        try:
            return cls.from_dict(raw)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build from config.json's content, in either dialect; unknown keys are left out.

        Raises:
            ValueError: unknown architecture, missing size, value out of range.
            TypeError: value of the wrong type.
        """
        values = read_values(raw)
        for key in _required(cls):
            if key not in values:
                raise ValueError(f"the key {key} is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Content of a config.json that transformers 5 and this library load."""
        return write_values(self)


def _required(cls: type[ModelConfig]) -> list[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def _check_types(config: ModelConfig) -> None:
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


def _check_sizes(config: ModelConfig) -> None:
    more = ["num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"]
    more += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"]
    for key in [*_required(ModelConfig), *more]:
        size = getattr(config, key)
        if size is not None and not 1 <= size <= LARGEST:
            rule = "be at least 1" if size < 1 else f"be at most {LARGEST}"
            raise ValueError(f"{key} must {rule}; got {size}")
    if config.num_hidden_layers > 10_000:
        raise ValueError(f"num_hidden_layers must be at most 10000; got {config.num_hidden_layers}")


def _check_read(config: ModelConfig) -> None:
    """Refuse a value that the family's config.json could not hold, so that saving loses nothing."""
    known = {*COMMON, *config.family.keys, "rope_parameters", "dtype", "model_type", "layer_types"}
    for f in dataclasses.fields(config):
        if f.name not in known and getattr(config, f.name) != f.default:
            raise ValueError(f"{f.name} is no key of {config.model_type}'s configuration")


def _checked_rope(config: ModelConfig) -> dict[str, Any]:
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


def _check_layers(config: ModelConfig) -> None:
    for key in ("layer_types", "no_rope_layers"):
        value = getattr(config, key)
        if value is not None and len(value) != config.num_hidden_layers:
            raise ValueError(
                f"{key} must have an entry for each of {config.num_hidden_layers} layers; "
                f"got {len(value)}"
            )
    for kind in config.kinds:
        if kind not in LAYER_TYPES:
            raise ValueError(unknown("layer type", kind, LAYER_TYPES))
    if SLIDING in config.kinds and config.sliding_window is None:
        raise ValueError(f"{SLIDING} layers need sliding_window, the tokens that they see")
    if "layer_types" not in config.family.keys:
        own = tuple(config.family.layer_types(vars(config)))
        if config.kinds != own:
            raise ValueError(f"layer_types is no key of {config.model_type}'s configuration")


def _check_experts(config: ModelConfig) -> None:
    if config.num_experts is None:
        return
    if config.moe_intermediate_size is None:
        raise ValueError("num_experts needs moe_intermediate_size, the width of an expert")
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"num_experts_per_tok {config.num_experts_per_tok} is more than num_experts "
            f"{config.num_experts}"
        )


def _check_ranges(config: ModelConfig) -> None:
    heads, kv_heads, head_dim = config.heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embedding; got {head_dim}")
    limits = {
        "rms_norm_eps": (config.rms_norm_eps > 0, "be positive"),
        "attention_dropout": (0 <= config.attention_dropout < 1, "lie in [0, 1)"),
        "initializer_range": (config.initializer_range >= 0, "not be negative"),
        "embedding_multiplier": (_finite(config.embedding_multiplier), "be finite"),
        "residual_multiplier": (_finite(config.residual_multiplier), "be finite"),
        "attention_multiplier": (_finite(config.attention_multiplier), "be finite"),
        "router_aux_loss_coef": (_finite(config.router_aux_loss_coef), "be finite"),
    }
    positive = ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
    for key in (*positive, "logits_scaling"):
        value = getattr(config, key)
        limits[key] = (value is None or (value > 0 and _finite(value)), "be positive and finite")
    for key, (fits, rule) in limits.items():
        if not fits:
            raise ValueError(f"{key} must {rule}; got {getattr(config, key)}")
    for key, known in {"hidden_act": ACTIVATIONS, "dtype": (*DTYPES, None)}.items():
        if getattr(config, key) not in known:
            raise ValueError(unknown(key, getattr(config, key), tuple(filter(None, known))))


def _finite(value: float | None) -> bool:
    return value is None or math.isfinite(value)
