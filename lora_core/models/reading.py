"""From config.json's content to the arguments of `ModelConfig`, and back.

Two dialects are in circulation: transformers 5's (`rope_parameters`, `dtype`) and the older one
(`rope_theta`, `rope_scaling` with `type` or `rope_type`, `torch_dtype`); both are read, both are
written. A multimodal model's file holds the language model's as `text_config`, often leaving out
what its configuration class knows (families.WRAPPERS).

A key that is absent takes the default of the family's configuration class in transformers; null
does too, except where null is a value of its own, as in `"sliding_window": null`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lora_core.models.families import FAMILIES, WRAPPERS, Family
from lora_core.models.rope_config import read_rope, read_rope_by_type, rope_to_dict

Config = TypeVar("Config")
# what every family's config.json may say, beside the sizes that it must
COMMON = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# here null is a value, not an absent key
_NULLABLE = {
    "num_key_value_heads",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def from_config_json(directory: str | Path, read: Callable[[dict[str, Any]], Config]) -> Config:
    """What `read` makes of a folder's config.json; its errors name the file.

    Args:
        directory: a Hugging Face folder.
        read: takes the file's content.

    Returns:
        What `read` returns.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no JSON object, or `read` raises one.
        TypeError: `read` raises one.
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
        return read(raw)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from None


def unknown(key: str, value: object, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """The line that refuses a name and lists those that are known."""
    return f"{key} {value!r} is not implemented; known: {', '.join(sorted(known))}"


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration: the file's own, or a multimodal model's `text_config`.

    Args:
        raw: config.json's content.

    Returns:
        What describes the decoder, with the wrapper's tokens and dtype where it names none, and the
        wrapper's word on whether the head is tied.

    Raises:
        TypeError: `text_config` is no object.
    """
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    by_architecture = {name: kind for kind, (name, _) in WRAPPERS.items()}
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        if kind is not None or first not in by_architecture:
            return dict(raw)
        kind = by_architecture[first]
    elif first is not None and first not in by_architecture:
        return dict(raw)  # the names contradict each other: `family_of` says so
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        raise TypeError(f"text_config of a {kind} model must be an object; got {inner!r}")
    outer = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {key: raw[key] for key in outer if key in raw}
    # the head is the wrapper's, and so is the word on it
    said = raw.get("tie_word_embeddings")
    head = {} if said is None else {"tie_word_embeddings": said}
    return {**WRAPPERS[kind][1], **shared, **inner, **head, "architectures": None}


def family_of(raw: Mapping[str, Any]) -> str:
    """The family, by `model_type` and by `architectures`, which must not contradict it.

    Raises:
        ValueError: neither key, a name that is not known, or two that contradict each other.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type is None and not architectures:
        raise ValueError("the key model_type is missing")
    by_name = {family.architecture: kind for kind, family in FAMILIES.items()}
    if architectures:
        name = architectures[0] if isinstance(architectures, list) else architectures
        if not isinstance(architectures, list) or name not in by_name:
            known = (*by_name, *(wrapper for wrapper, _ in WRAPPERS.values()))
            raise ValueError(unknown("architecture", name, known))
        model_type = model_type or by_name[name]
        if by_name[name] != model_type and model_type in FAMILIES:
            raise ValueError(
                f"architectures names {name}, which is {by_name[name]!r}, and model_type is "
                f"{model_type!r}: correct one of them"
            )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(unknown("model_type", model_type, FAMILIES))
    return model_type


def read_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ModelConfig` for config.json's content; unknown keys are left out.

    Raises:
        ValueError: an unknown family, or a key that makes it another model.
        TypeError: a value of the wrong type, where it decides how to read others.
    """
    raw = text_part(raw)
    model_type = family_of(raw)
    family = FAMILIES[model_type]
    for key in family.refused:
        if raw.get(key):
            raise ValueError(
                f"{key} {raw[key]!r} is not implemented for {model_type}; leave it out if the "
                "weights do not need it"
            )
    values: dict[str, Any] = {**family.defaults, "model_type": model_type}
    for name in (*COMMON, *family.keys):
        key = family.renamed.get(name, name)
        if key in raw and (raw[key] is not None or name in _NULLABLE):
            values[name] = raw[key]
    for name, key in family.also.items():
        if raw.get(key) is not None:
            values[name] = raw[key]
    if values.get("pad_token_id") == -1:
        values["pad_token_id"] = None  # how the first Llama files say it
    if family.optional_window and not raw.get("use_sliding_window"):
        values["sliding_window"] = None
    act = values.get("hidden_act")
    if isinstance(act, str):
        values["hidden_act"] = family.activations.get(act, act)
    values["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    _read_layers(values, raw, family)
    values["rope_parameters"] = _rope(values, raw, family)
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _read_layers(values: dict[str, Any], raw: Mapping[str, Any], family: Family) -> None:
    """What is said layer by layer, from the rules by which a file may abbreviate it."""
    count = values.get("num_hidden_layers")
    if type(count) is not int or not 0 < count <= 10_000:
        return  # ModelConfig says what is wrong with it
    if "no_rope_layers" in family.keys and "no_rope_layers" not in values:
        each = raw.get("no_rope_layer_interval") or 4
        if type(each) is not int or each < 1:
            raise TypeError(f"no_rope_layer_interval must be a positive integer; got {each!r}")
        values["no_rope_layers"] = [int((i + 1) % each != 0) for i in range(count)]
    turns = values.get("no_rope_layers")
    if turns is not None and not isinstance(turns, list | tuple):
        raise TypeError(f"no_rope_layers must be a list of 0 and 1; got {turns!r}")
    if "layer_types" not in values:
        # the pattern's own keys are no fields: the list that they make is
        more = {}
        for key in ("max_window_layers", "sliding_window_pattern"):
            if raw.get(key) is None:
                continue
            if type(raw[key]) is not int or raw[key] < 0:
                raise TypeError(f"{key} must be a whole number, 0 or more; got {raw[key]!r}")
            more[key] = raw[key]
        values["layer_types"] = family.layer_types({**values, **more})


def _rope(values: Mapping[str, Any], raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    # the two lengths that scalings are worked out from, as the family has them where absent
    lengths: dict[str, Any] = {
        "max_position_embeddings": values.get("max_position_embeddings", 2048)
    }
    if family.rope_context is not None and raw.get("original_max_position_embeddings") is None:
        lengths["original_max_position_embeddings"] = family.rope_context
    raw = {**raw, **lengths}
    if family.local_rope_theta is None:
        return read_rope(raw, theta=family.rope_theta, aliases=family.rope_aliases)
    return read_rope_by_type(
        raw,
        theta={"full_attention": family.rope_theta, "sliding_attention": family.local_rope_theta},
        aliases=family.rope_aliases,
    )


def write_values(config: Any) -> dict[str, Any]:
    """config.json's content for a `ModelConfig`, in both dialects, for transformers 5 and us."""
    family = FAMILIES[config.model_type]
    raw: dict[str, Any] = {
        "model_type": config.model_type,
        "architectures": [family.architecture],
        "dtype": config.dtype,
    }
    fields = {f.name for f in dataclasses.fields(config)}
    for name in (*COMMON, *family.keys):
        if name in fields:
            value = getattr(config, name)
            key = family.renamed.get(name, name)
            raw[key] = list(value) if isinstance(value, tuple) else value
    if family.optional_window:
        raw["use_sliding_window"] = config.sliding_window is not None
    raw |= rope_to_dict(config.rope_parameters, config.max_position_embeddings)
    return dict(sorted(raw.items()))
