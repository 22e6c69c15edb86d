"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them.

LoRA is written with PEFT's keys, so PEFT, transformers, vLLM and llama.cpp read it, and what PEFT
wrote is read here. Other kinds use the same two files with `peft_type` LORA_CORE_<KIND> and keys
`<module>.<parameter>`. docs/formats.md lists every key.

PEFT loads in silence when keys are left over and drops options it does not know; here a missing or
unexpected key, another shape and an option without counterpart are errors, raised before the model
is touched. Options of PEFT that change nothing (their default, None, empty) are passed over.
"""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import (
    Adapter,
    LoRA,
    LoRAConfig,
    adapted_modules,
    adapter_names,
    is_linear,
)
from lora_core.adapters.config import build_all, kind_of, registered
from lora_core.adapters.inject import AdapterReport, attach_built
from lora_core.checkpoint.safetensors_folder import (
    Pending,
    read_header,
    read_json_object,
    write_safetensors,
)
from lora_core.checkpoint.soft_prompts import KINDS as SOFT_PROMPTS
from lora_core.checkpoint.soft_prompts import (
    SoftPromptConfig,
    flat_tensors,
    read_soft_prompt,
    soft_prompt_record,
    write_further,
)
from lora_core.files import atomic_write, sync
from lora_core.targets import nearest, sites, unwrap

__all__ = ["adapter_state_dict", "load_adapter", "read_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_KIND = "LORA_CORE_"
PEFT_PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"  # the version whose files these are; PEFT asks for none

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


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Tensors of one adapter under the keys they have on disk.

    Args:
        model: a model with the adapter.
        name: which.

    Returns:
        {key: tensor}, detached, sharing memory with the model.

    Raises:
        ValueError: an unknown name.
    """
    found = _at(model, name)
    config = next(iter(found.values())).config
    if isinstance(config, SoftPromptConfig):
        return flat_tensors(found)
    prefix = _prefix(config)
    return {key: tensor.detach() for key, tensor in _keyed(found, prefix).items()}


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model: str | None = None,
) -> list[str]:
    """Write one adapter so that a crash leaves the old one, the new one, or none that loads.

    The configuration is taken away once the new weights are written, and comes back last: old
    weights never meet a new configuration, nor new weights an old one.

    Args:
        model: a model with the adapter, merged or not.
        directory: where; made if it is not there, other files in it stay.
        name: which adapter.
        base_model: what to record as `base_model_name_or_path`; None: what the model says it was
            loaded from.

    Returns:
        Notes on what other programs would misread, each also a warning; mostly empty.

    Raises:
        ValueError: an unknown name, an adapter without a configuration, or of a kind that is not
            registered.
        TypeError: a configuration that JSON cannot hold.
    """
    found = _at(model, name)
    config = next(iter(found.values())).config
    record = _record(model, config, found, base_model)
    tensors = adapter_state_dict(model, name)
    pending = [
        Pending(key, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)  # type: ignore[misc]
        for key, tensor in sorted(tensors.items())
    ]
    try:
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise TypeError(f"{type(config).__name__} cannot be written as JSON: {error}") from None
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)

    def write_weights(aside: Path) -> None:
        write_safetensors(aside, pending)
        (folder / CONFIG).unlink(missing_ok=True)
        sync(folder)

    atomic_write(folder / WEIGHTS, write_weights)
    write_further(folder, found)
    atomic_write(folder / CONFIG, text)
    notes = _misread(config)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return notes


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's two files without a model.

    Args:
        directory: the adapter's folder.

    Returns:
        (the configuration as it stands in the file, {key: tensor on the CPU}).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is malformed or truncated, or the weights are a pickle.
    """
    from safetensors import safe_open

    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            if file == WEIGHTS and (folder / "adapter_model.bin").is_file():
                raise ValueError(
                    f"{folder} holds its weights as pickle (adapter_model.bin), which can run code "
                    "when it is read: refused; convert it to safetensors"
                )
            raise FileNotFoundError(f"{folder} has no {file}: it is no adapter folder")
    config = read_json_object(folder / CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{folder / CONFIG} has no peft_type: it is no adapter's configuration")
    entries = read_header(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as handle:
        return config, {key: handle.get_tensor(key) for key in entries}


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
    *,
    untie: bool = False,
) -> AdapterReport:
    """Put an adapter from disk into a model; it alone is active afterwards.

    The rest of the model is frozen; other adapters keep their `requires_grad` unless `trainable`.

    Args:
        model: the base model, possibly with other adapters.
        directory: the adapter's folder, written here or by PEFT.
        name: name to give it, new to the model.
        trainable: whether it is trained further.
        untie: give a targeted module whose weight is tied its own copy instead of refusing it.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: malformed files; an option that is not supported; missing or unexpected keys,
            another shape; whatever `add_adapter` refuses. The model is then as it was.
    """
    raw, tensors = read_adapter(directory)
    if raw["peft_type"] in SOFT_PROMPTS:
        soft, built = read_soft_prompt(model, raw, tensors, Path(directory), trainable)
        return attach_built(model, soft, name, built, trainable=trainable)
    where = str(Path(directory))
    config = _config(model, raw, tensors, where)
    if untie and isinstance(config, LoRAConfig):
        config = dataclasses.replace(config, untie=True)
    built = build_all(config, model)
    tensors = _without_base_weights(model, tensors, where)
    _fill(_keyed(built, _prefix(config)), tensors, where)
    return attach_built(model, config, name, built, trainable=trainable)


def _at(model: nn.Module, name: str) -> dict[str, Adapter]:
    found = {
        site: host.adapter(name) for site, host in adapted_modules(model) if name in host.adapters
    }
    if not found:
        raise ValueError(f"no adapter {name!r} in the model; {nearest(name, adapter_names(model))}")
    return found


def _prefix(config: object) -> str:
    return PEFT_PREFIX if isinstance(config, LoRAConfig) else ""


def _keyed(adapters: Mapping[str, Adapter], prefix: str) -> dict[str, Tensor]:
    """The adapters' live tensors by key: prefix, module, name."""
    return {
        prefix + (f"{site}.{key}" if site else key): tensor
        for site, adapter in adapters.items()
        for key, tensor in adapter.tensors().items()
    }


def _without_base_weights(
    model: nn.Module, tensors: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
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
                f"{where}: {key!r} is not the weight that {site!r} has: the adapter belongs to "
                "another base, or to one whose vocabulary was changed"
            )
    return rest


def _fill(wanted: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Copy the tensors of a file into the adapters', every key and shape accounted for."""
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    for kind, keys, others in (
        ("is missing", missing, sorted(given)),
        ("is unexpected", unexpected, sorted(wanted)),
    ):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            near = nearest(keys[0], others)
            raise ValueError(f"{where}: the key {keys[0]!r} {kind}{more}; {near}")
    for key, tensor in given.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{where}: {key!r} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(wanted[key].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {key!r} holds {tensor.dtype}, not floating-point numbers")
    with torch.no_grad():
        for key, tensor in given.items():
            wanted[key].copy_(tensor)


# --- configurations ---


def _record(
    model: nn.Module, config: Any, at: Mapping[str, Adapter], base_model: str | None
) -> dict[str, Any]:
    """What goes into adapter_config.json."""
    if base_model is None:
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if isinstance(config, LoRAConfig):
        return _lora_record(model, config, at, base_model)
    if isinstance(config, SoftPromptConfig):
        return soft_prompt_record(model, config, at, base_model, PEFT_VERSION)
    if config is None:
        raise ValueError(
            "the adapter was put in by hand and has no configuration to write: make it with "
            "add_adapter, or set the `config` of each of its adapters"
        )
    kind = kind_of(config)
    if kind is None:
        raise ValueError(
            f"{type(config).__name__} is no registered kind of adapter: put "
            '@register_adapter("KIND") above the dataclass to save it'
        )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if callable(fields.get("targets")):
        fields["targets"] = list(at)
    own = {"peft_type": OWN_KIND + kind, "base_model_name_or_path": base_model}
    if taken := sorted(fields.keys() & own.keys()):
        raise ValueError(f"{type(config).__name__} may not have a field called {taken[0]!r}")
    return {**fields, **own}


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


def _config(model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor], where: str) -> Any:
    """The configuration object that a file describes."""
    kind = raw["peft_type"]
    try:
        if kind == "LORA":
            return _lora_config(model, raw, tensors, where)
        if not kind.startswith(OWN_KIND):
            known = ", ".join(("LORA", *SOFT_PROMPTS))
            raise ValueError(
                f"peft_type {kind!r} is not supported: {known} and {OWN_KIND}<KIND> are"
            )
        cls = registered(kind.removeprefix(OWN_KIND))
        fields = {
            key: value
            for key, value in raw.items()
            if key not in ("peft_type", "base_model_name_or_path")
        }
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _lora_config(
    model: nn.Module, raw: dict[str, Any], tensors: dict[str, Tensor], where: str
) -> LoRAConfig:
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
