"""The configuration of a soft prompt on disk: PEFT's fields, to and from ours.

PEFT records what the prompt was made with (the network's width, the text it started from) beside
the sizes of the model that it is for. Options that change nothing (their default, None, empty) are
passed over, any other one without counterpart is an error.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_core.adapters.prefix import Heads, PrefixTuningConfig
from lora_core.adapters.prompt import Prompt, PromptTuningConfig
from lora_core.adapters.ptuning import PTuningConfig
from lora_core.checkpoint.adapter_files import PEFT_VERSION

__all__ = ["KINDS", "SoftPromptConfig", "config_of", "record_of"]

SoftPromptConfig = PromptTuningConfig | PrefixTuningConfig | PTuningConfig

KINDS: dict[str, type[SoftPromptConfig]] = {
    "PROMPT_TUNING": PromptTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "P_TUNING": PTuningConfig,
}
_INITS = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary", "TEXT": "text"}
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "num_attention_heads",
    "num_layers",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
_READ = {
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "init_weights",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
}


def config_of(raw: Mapping[str, Any]) -> SoftPromptConfig:
    """The configuration that a file of PEFT's, or one of ours, describes.

    Args:
        raw: `adapter_config.json`.

    Returns:
        The configuration.

    Raises:
        ValueError: an option without counterpart, or a value out of range.
    """
    nothing: tuple[Any, ...] = (None, False, {}, [])
    if options := [k for k in sorted(raw.keys() - _READ - _IGNORED) if raw[k] not in nothing]:
        told = ", ".join(f"{key}={raw[key]!r}" for key in options)
        raise ValueError(f"options that are not supported here: {told}")
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(
            f"num_transformer_submodules={raw['num_transformer_submodules']!r}: prompts of "
            "encoder-decoder models are not supported"
        )
    tokens = raw.get("num_virtual_tokens")
    kind = raw["peft_type"]
    if kind == "PROMPT_TUNING":
        start = _INITS.get(raw.get("prompt_tuning_init") or "RANDOM", "random")
        text = raw.get("prompt_tuning_init_text") if start == "text" else None
        start = "random" if start == "text" and text is None else start
        return PromptTuningConfig(tokens, start, text)  # type: ignore[arg-type]  # it checks
    hidden = raw.get("encoder_hidden_size")
    if kind == "PREFIX_TUNING":
        projection = bool(raw.get("prefix_projection"))
        start = "zeros" if raw.get("init_weights") == "zero" else "normal"
        width = hidden if projection else None
        return PrefixTuningConfig(tokens, projection, width, start)  # type: ignore[arg-type]
    encoder = str(raw.get("encoder_reparameterization_type") or "MLP").lower()
    layers, dropout = raw.get("encoder_num_layers") or 2, raw.get("encoder_dropout") or 0.0
    lasting = dropout if encoder == "lstm" and layers > 1 else 0.0  # elsewhere PEFT has none
    return PTuningConfig(tokens, encoder, hidden, layers, lasting)  # type: ignore[arg-type]


def record_of(
    model: nn.Module,
    config: SoftPromptConfig,
    first: Any,
    heads: Heads | None,
    base_model: str | None,
) -> dict[str, Any]:
    """What goes into `adapter_config.json`: PEFT's fields.

    Args:
        model: the model, for its sizes.
        config: the prompt's.
        first: the adapter at the embedding.
        heads: of the attention modules that a prefix stands before; None: a prompt.
        base_model: `base_model_name_or_path`.

    Returns:
        The record.
    """
    owner = getattr(model, "config", None)
    record: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": heads.number if heads else getattr(owner, "num_attention_heads", 1),
        "num_layers": getattr(owner, "num_hidden_layers", 1),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config.num_virtual_tokens,
        "peft_type": next(name for name, known in KINDS.items() if known is type(config)),
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": heads.number * heads.size if heads else _size(first),
    }
    return record | _own_fields(config, first, base_model)


def _size(first: Any) -> int:
    """C, the size of a virtual token."""
    vectors = first.prompt if isinstance(first, Prompt) else first.inputs
    return int(vectors.shape[1])


def _own_fields(config: SoftPromptConfig, first: Any, base_model: str | None) -> dict[str, Any]:
    if isinstance(config, PromptTuningConfig):
        # PEFT asks for a tokenizer's name with a text, although nothing is started from it again
        text = config.text if base_model is not None else None
        start = {ours: theirs for theirs, ours in _INITS.items()}[config.init]
        return {
            "prompt_tuning_init": "RANDOM" if start == "TEXT" and text is None else start,
            "prompt_tuning_init_text": text,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": base_model if text is not None else None,
        }
    if isinstance(config, PrefixTuningConfig):
        hidden = None if first.hidden is None else first.hidden.out_features
        return {
            "encoder_hidden_size": hidden or config.hidden,
            "init_weights": "zero" if config.init == "zeros" else None,
            "prefix_projection": config.projection,
        }
    return {
        "encoder_dropout": config.dropout,
        "encoder_hidden_size": config.hidden or _size(first),
        "encoder_num_layers": config.layers,
        "encoder_reparameterization_type": config.encoder.upper(),
    }
