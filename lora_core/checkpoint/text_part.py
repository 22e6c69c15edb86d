"""A LoRA that PEFT wrote for a multimodal model, in the terms of its text part.

The text part of such a model is loaded here as a model of its own (names.py), and an adapter for
the whole has other names for the same modules: `model.language_model.layers.0…` or, in older files,
`language_model.model.layers.0…` where the text model has `model.layers.0…`. Keys are renamed by the
rules that rename weights. Pairs of the vision part, which PEFT's "all-linear" makes too, are left
out with a warning, as its weights are when the model is loaded: text alone never meets them.

What the configuration says by patterns (ranks, alphas) is looked up under the old names and said
again by the new ones; the targets are the modules that have a pair.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_core.checkpoint.layout import some
from lora_core.checkpoint.lora_options import PEFT_PREFIX, pair_sites
from lora_core.checkpoint.names import OTHER_PARTS, UNWRAPPED, matches
from lora_core.targets import pattern_value, sites

__all__ = ["text_part"]


def text_part(
    model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Say an adapter's files in the terms of a text model, where they are a multimodal one's.

    Args:
        model: what the adapter is to be put into.
        raw: adapter_config.json.
        tensors: by key.

    Returns:
        The two, as they are where the model has the names that the file has.
    """
    named = {key: _renamed(key.removeprefix(PEFT_PREFIX)) for key in tensors}
    wrapped = any(PEFT_PREFIX + name != key for key, name in named.items())
    if not wrapped or any("language_model" in name.split(".") for name, _ in sites(model)):
        return raw, tensors
    left_out = [key for key, name in named.items() if matches(OTHER_PARTS, name)]
    if left_out:
        warnings.warn(
            f"{some(left_out)} left out: of parts beside the text model, which are not in this one",
            stacklevel=5,
        )
    kept = {PEFT_PREFIX + named[k]: t for k, t in tensors.items() if k not in left_out}
    own = {site: _renamed(site) for site in pair_sites(tensors.keys() - set(left_out))}
    return _in_text_terms(raw, own), kept


def _renamed(name: str) -> str:
    for pattern, replacement in UNWRAPPED:
        name = re.sub(pattern, replacement, name)
    return name


def _in_text_terms(raw: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """The configuration for modules {name in the file: name in the text model}."""
    said: dict[str, Any] = {**raw, "target_modules": None, "exclude_modules": None}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = raw.get(key) or {}
        values = {new: pattern_value(patterns, old, None) for old, new in own.items()}
        said[key] = {re.escape(new): v for new, v in values.items() if v is not None}
    rows, copies = raw.get("trainable_token_indices"), raw.get("modules_to_save")
    if isinstance(rows, dict):
        said["trainable_token_indices"] = {_renamed(name): ids for name, ids in rows.items()}
    if isinstance(copies, list):
        said["modules_to_save"] = [_renamed(c) if isinstance(c, str) else c for c in copies]
    return said
