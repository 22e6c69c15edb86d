"""LoRA on disk, in PEFT's format: what is written, what is read, what is refused.

PEFT loads in silence when keys are left over and drops options it does not know; here a missing or
unexpected key, another shape and an option without counterpart are errors. Options of PEFT that
change nothing (their default, None, empty) are passed over. docs/formats.md lists every key.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.base import Adapter, is_linear
from lora_core.adapters.config import build_all
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.checkpoint.adapter_files import PEFT_VERSION, AdapterFormat, check_tensors, keyed
from lora_core.targets import sites, unwrap

__all__ = ["LORA", "PEFT_PREFIX"]

PEFT_PREFIX = "base_model.model."

# options of PEFT's LoraConfig that say nothing about what is computed
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
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
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_rslora",
}
# starts that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, …) write into them
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def _lora_record(
    model: nn.Module, config: LoRAConfig, at: Mapping[str, Adapter], base_model: str | None
) -> dict[str, Any]:
    targets = [site for site, adapter in at.items() if isinstance(adapter, LoRA)]
    causal = type(model).__name__.endswith("CausalLM")
    return {
        "alpha_pattern": {key: _whole(value) for key, value in config.alpha_pattern.items()},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": config.r,
        "rank_pattern": config.rank_pattern,
        "revision": None,
        "target_modules": _shortest(targets, [name for name, _ in sites(model) if name]),
        "task_type": "CAUSAL_LM" if causal else None,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _shortest(targets: list[str], names: list[str]) -> list[str]:
    """The last parts of the targets' names, where these mean the targets and nothing else."""
    last = {target.rsplit(".", 1)[-1] for target in targets}
    same = {name for name in names if name.rsplit(".", 1)[-1] in last} == set(targets)
    return sorted(last) if same else sorted(targets)


def _misread(config: object) -> list[str]:
    """What other readers of PEFT's format get wrong about this adapter, in silence."""
    if not isinstance(config, LoRAConfig):
        return []
    faults = {
        "rank_pattern or alpha_pattern": (
            bool(config.rank_pattern or config.alpha_pattern),
            "vLLM and llama.cpp, which use one scale for all layers",
        ),
        "use_rslora": (config.use_rslora, "llama.cpp, which scales by alpha / r"),
    }
    return [
        f"{option} is misread by {who}; PEFT reads it. For them, write `export --baked`"
        for option, (used, who) in faults.items()
        if used
    ]


def _without_base_weights(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out copies of base weights, which PEFT stores when it adapts an embedding or a head.

    Raises:
        ValueError: such a copy differs from the model's own weight.
    """
    modules = dict(sites(model))
    rest = {}
    for key, tensor in tensors.items():
        site = key.removeprefix(PEFT_PREFIX).removesuffix(".base_layer.weight")
        if not key.endswith(".base_layer.weight") or site not in modules:
            rest[key] = tensor
            continue
        own = getattr(unwrap(modules[site]), "weight", None)
        if (
            own is None
            or own.shape != tensor.shape
            or not torch.equal(own.cpu(), tensor.to(own.dtype))
        ):
            raise ValueError(
                f"{key!r} is not the weight that {site!r} has: the adapter belongs to "
                "another base, or to one whose vocabulary was changed"
            )
    return rest


def _lora_config(model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor]) -> LoRAConfig:
    nothing: tuple[Any, ...] = (None, False, "none", {}, [])
    options = [k for k in sorted(raw.keys() - _READ - _IGNORED) if raw[k] not in nothing]
    if options:
        told = ", ".join(f"{key}={raw[key]!r}" for key in options)
        raise ValueError(f"options that are not supported here: {told}")
    start = raw.get("init_lora_weights", True)
    if start not in _STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} changes the base weights, which are not in the adapter: "
            "convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    return LoRAConfig(
        r=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout") or 0.0,
        targets=_lora_targets(model, raw, tensors),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        use_rslora=raw.get("use_rslora") or False,
        init="gaussian" if start == "gaussian" else "kaiming",
        trainable_token_indices=raw.get("trainable_token_indices"),
    )


def _lora_targets(
    model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor]
) -> str | list[str]:
    """The targets in our terms: as they stand, or the modules that the keys name.

    PEFT passes over entries that match nothing, so they may be in a good file; the keys are still
    compared with what the others match.
    """
    targets = raw.get("target_modules")
    narrowed = raw.get("layers_to_transform") is not None or raw.get("exclude_modules")
    if targets is None or narrowed:
        key = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_[AB]\.weight")
        return sorted({match[1] for name in tensors if (match := key.fullmatch(name))})
    if isinstance(targets, str):
        return targets
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"target_modules must be a list of names or a string, got {targets!r}")
    names = [name for name, module in sites(model) if is_linear(unwrap(module))]
    known = [t for t in targets if any(n == t or n.endswith(f".{t}") for n in names)]
    return known or list(targets)


def _tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return keyed(adapters, PEFT_PREFIX)


def _notes(adapters: Mapping[str, Adapter]) -> list[str]:
    return _misread(next(iter(adapters.values())).config)


def _read(
    model: nn.Module,
    raw: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
    trainable: bool,
) -> tuple[Any, dict[str, Adapter]]:
    config = _lora_config(model, raw, tensors)
    built = build_all(config, model)
    tensors = _without_base_weights(model, tensors)
    check_tensors(_tensors(built), tensors)
    for site, adapter in built.items():
        start = f"{PEFT_PREFIX}{site}."
        adapter.load({key: tensors[start + key] for key in adapter.tensors()})
    return config, built


LORA = AdapterFormat(LoRAConfig, _tensors, _lora_record, _read, notes=_notes)
