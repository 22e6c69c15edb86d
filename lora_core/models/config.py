"""config.json to a checked, frozen description of a decoder.

Both dialects in circulation are read: transformers 5 (`rope_parameters`, `dtype`) and the older one
(`rope_theta`, `rope_scaling` with `type` or `rope_type`, `torch_dtype`). The five sizes that say
which model it is must be there; every other absent key takes the default of transformers'
configuration class of that family. What the decoder does not implement (an architecture, a RoPE
type, an activation) is refused by name, so no checkpoint is ever run as something it is not.

A family is a row of `FAMILIES`: the names under which it is known and its defaults. What a new
family needs beyond existing fields becomes a field here and a branch on that field in `decoder`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from lora_core.models.rope import ROPE_TYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")

# model_type -> the architecture's name, and defaults that differ from ModelConfig's
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("LlamaForCausalLM", {})}


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
    rope_parameters: Mapping[str, float | str] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    """`rope_type`, `rope_theta` and that type's own keys."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have a bias."""
    mlp_bias: bool = False
    """Whether gate, up and down projections have a bias."""
    attention_dropout: float = 0.0
    """Dropout of attention weights in training mode, a probability."""
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
            raise ValueError(_unknown("model_type", self.model_type, FAMILIES))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "rope_parameters", _checked_rope(self.rope_parameters))
        _check_ranges(self)

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, channels per head."""
        assert self.num_key_value_heads is not None  # both are set by __post_init__
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, () if there is none."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else ids

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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
        model_type = _model_type(raw)
        values = dict(FAMILIES[model_type][1])
        names = {f.name for f in dataclasses.fields(cls)}
        values |= {key: raw[key] for key in names if raw.get(key) is not None}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # here null has a meaning
            if key in raw:
                values[key] = raw[key]
        values["model_type"] = model_type
        values["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
        values["rope_parameters"] = _rope_from(raw)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        for key in _required(cls):
            if key not in values:
                raise ValueError(f"the key {key} is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Content of a config.json that transformers 5 and this library load."""
        raw = dataclasses.asdict(self) | {"architectures": [FAMILIES[self.model_type][0]]}
        raw["rope_parameters"] = dict(self.rope_parameters)
        if isinstance(self.eos_token_id, tuple):
            raw["eos_token_id"] = list(self.eos_token_id)
        # the older dialect too: readers that know it alone would run the model without its scaling
        scaling = dict(self.rope_parameters)
        raw["rope_theta"] = scaling.pop("rope_theta")
        if scaling["rope_type"] != "default":
            raw["rope_scaling"] = scaling
        return dict(sorted(raw.items()))


def _required(cls: type[ModelConfig]) -> list[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def _unknown(key: str, value: object, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    return f"{key} {value!r} is not implemented; known: {', '.join(sorted(known))}"


def _model_type(raw: Mapping[str, Any]) -> str:
    """The family, by `model_type` and by `architectures`, which must not contradict it."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type is None and not architectures:
        raise ValueError("the key model_type is missing")
    by_name = {name: kind for kind, (name, _) in FAMILIES.items()}
    if architectures:
        if not isinstance(architectures, list) or architectures[0] not in by_name:
            name = architectures[0] if isinstance(architectures, list) else architectures
            raise ValueError(_unknown("architecture", name, by_name))
        model_type = model_type or by_name[architectures[0]]
    if model_type not in FAMILIES:
        raise ValueError(_unknown("model_type", model_type, FAMILIES))
    return str(model_type)


def _rope_from(raw: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters from transformers 5's key or from the two older ones."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise TypeError(f"rope_parameters must be an object; got {rope!r}")
    rope = dict(rope)
    rope["rope_type"] = str(rope.get("rope_type") or rope.get("type") or "default")
    rope.pop("type", None)
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    if "original_max_position_embeddings" in ROPE_TYPES.get(rope["rope_type"], ((), ()))[1]:
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return rope


def _checked_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0} | dict(rope)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(_unknown("rope_type", rope["rope_type"], tuple(ROPE_TYPES)))
    needed = ("rope_theta", *ROPE_TYPES[rope["rope_type"]][1])
    for key in needed:
        value = rope.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"rope_parameters[{key!r}] must be a positive number for rope_type "
                f"{rope['rope_type']!r}; got {value!r}"
            )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor {rope['partial_rotary_factor']} is not implemented; only 1.0"
        )
    return {key: rope[key] for key in ("rope_type", *needed)}


def _check_types(config: ModelConfig) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        kinds = _KINDS[str(f.type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{f.name} must be of type {f.type}; got {value!r}")


_NONE = type(None)
# the annotations above -> what isinstance accepts (a whole number is a fine float)
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "int | None": (int, _NONE),
    "str | None": (str, _NONE),
    "int | tuple[int, ...] | None": (int, tuple, _NONE),
    "Mapping[str, float | str]": (Mapping,),
}


def _check_sizes(config: ModelConfig) -> None:
    sizes = [*_required(ModelConfig), "num_key_value_heads", "head_dim", "max_position_embeddings"]
    for key in sizes:
        size = getattr(config, key)
        if size is not None and size < 1:
            raise ValueError(f"{key} must be at least 1; got {size}")


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
    }
    for key, (fits, rule) in limits.items():
        if not fits:
            raise ValueError(f"{key} must {rule}; got {getattr(config, key)}")
    for key, known in {"hidden_act": ACTIVATIONS, "dtype": (*DTYPES, None)}.items():
        if getattr(config, key) not in known:
            raise ValueError(_unknown(key, getattr(config, key), tuple(filter(None, known))))
    if not all(isinstance(token, int) for token in config.eos_token_ids):
        raise TypeError(f"eos_token_id must be integers; got {config.eos_token_id!r}")
