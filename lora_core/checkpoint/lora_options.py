"""PEFT's options of a LoRA adapter as a `LoRAConfig`: what is read, passed over, or refused.

An option of PEFT's that changes what is computed and has no counterpart is refused by name; one at
its default, None or empty says nothing and is passed over. PEFT drops options it does not know.

PiSSA and OLoRA change the base as they start: PEFT writes W - s·B0 A0 into it, computed from W,
whenever such an adapter is loaded. Here the same start is taken away beside the base instead. Other
starts that change the base (LoftQ, CorDA, LoRA-GA) need what is in no file: data, a quantizer.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.forms import form_of
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.adapters.tokens import tied_modules
from lora_core.checkpoint.expert_files import expert_parameters, plain_targets
from lora_core.targets import nearest, sites, targets_for, unwrap

__all__ = ["PEFT_PREFIX", "leaves_base_alone", "lora_config", "pair_sites"]

PEFT_PREFIX = "base_model.model."

# options of PEFT's LoraConfig that say nothing about what is computed
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",  # the module says it
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# starts that leave the base weights alone
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# those that change them in a way that the weights alone determine
_REPEATED = ("pissa", "olora")


def lora_config(
    model: nn.Module, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LoRAConfig:
    """The configuration that a file of PEFT's describes.

    Args:
        model: what the adapter is for.
        raw: adapter_config.json.
        tensors: adapter_model.safetensors.

    Returns:
        Ours.

    Raises:
        ValueError: an option without counterpart, or a value out of range.
        TypeError: a value of another type.
    """
    nothing: tuple[Any, ...] = (None, False, "none", {}, [])
    options = [k for k in sorted(raw.keys() - _READ - _IGNORED) if raw[k] not in nothing]
    if options:
        told = ", ".join(f"{key}={raw[key]!r}" for key in options)
        near = nearest(options[0], sorted(_READ))
        raise ValueError(f"options that are not supported here: {told}; {near}")
    copies = _copies(model, raw, tensors)
    return LoRAConfig(
        r=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout") or 0.0,
        targets=_targets(model, raw, tensors, copies or []),
        target_parameters=expert_parameters(model, raw),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        use_rslora=raw.get("use_rslora") or False,
        use_dora=raw.get("use_dora") or False,
        init=_start(raw.get("init_lora_weights", True)),
        bias=raw.get("bias") or "none",
        lora_bias=raw.get("lora_bias") or False,
        modules_to_save=copies,
        trainable_token_indices=raw.get("trainable_token_indices"),
    )


def leaves_base_alone(start: Any) -> bool:
    """Whether a start of PEFT's of this name leaves the base's weights as they are."""
    return start in _PLAIN


def _start(start: Any) -> str:
    if start in _REPEATED:
        return str(start)
    if not leaves_base_alone(start):
        raise ValueError(
            f"init_lora_weights={start!r} changes the base weights, and the file does not say to "
            "what: save it again as a plain LoRA (PEFT: save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)), or save the changed base from PEFT "
            "(model.unload().save_pretrained(…)), load that, and set init_lora_weights to true"
        )
    return "gaussian" if start == "gaussian" else "kaiming"


def _targets(
    model: nn.Module, raw: Mapping[str, Any], tensors: Mapping[str, Tensor], copies: list[str]
) -> str | list[str]:
    """The targets in our terms: as they stand, or the modules that the keys name.

    PEFT passes over entries that match nothing, so they may be in a good file; the keys are still
    compared with what the others match. Where other options say more of what is meant (PEFT takes
    no target inside a copied module), the keys alone tell.
    """
    targets = raw.get("target_modules")
    if raw.get("target_parameters") and not isinstance(targets, str):
        return plain_targets(model, raw, pair_sites(tensors))
    modules = [name for name, module in sites(model) if form_of(unwrap(module)) is not None]
    narrowed = (
        raw.get("layers_to_transform") is not None
        or raw.get("exclude_modules")
        or raw.get("ensure_weight_tying")
        or any(f"{name}.".startswith(f"{copy}.") for name in modules for copy in copies)
    )
    if targets is None or narrowed:
        return targets_for(model, pair_sites(tensors)) or []
    if isinstance(targets, str):
        return targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"target_modules must be a list of names or a string, got {targets!r}")
    known = [t for t in targets if any(n == t or n.endswith(f".{t}") for n in modules)]
    return known or list(targets)


def pair_sites(keys: Iterable[str]) -> set[str]:
    """Names of the modules that have a pair in a file of these keys."""
    key = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_(embedding_[AB]|[AB]\.weight)")
    return {match[1] for name in keys if (match := key.fullmatch(name))}


def _copies(
    model: nn.Module, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[str] | None:
    """The modules that PEFT copies: every one whose name ends with an entry, dot or no dot.

    Entries without a match are passed over: PEFT adds the usual names of heads by itself. What
    ends with an entry without a dot is taken where the file has it, since PEFT's rule is not meant
    to reach it. With `ensure_weight_tying` the file has the modules tied to them, too.
    """
    patterns = raw.get("modules_to_save")
    if not patterns:
        return None
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"modules_to_save must be a list of names, got {patterns!r}")
    found: list[str] = []
    for name, module in sites(model):
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if not name or nested or next(unwrap(module).parameters(), None) is None:
            continue
        dotted = f".{name}".endswith(tuple(f".{pattern}" for pattern in patterns))
        if dotted or (name.endswith(tuple(patterns)) and _holds(tensors, name)):
            found.append(name)
    if raw.get("ensure_weight_tying"):
        modules = dict(sites(model))
        tied = {n for outer in found for n, _ in tied_modules(model, unwrap(modules[outer]))}
        found += sorted(n for n in tied - set(found) if _holds(tensors, n))
    return found or list(patterns)


def _holds(tensors: Mapping[str, Tensor], site: str) -> bool:
    """Whether a file has a copy of a module: its state under its own names."""
    first = f"{PEFT_PREFIX}{site}."
    odd = (".base_layer.", ".token_adapter.", ".lora_")
    return any(
        key.startswith(first) and not any(part in f".{key.removeprefix(first)}" for part in odd)
        for key in tensors
    )
