"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes them.

LoRA and soft prompts are written with PEFT's keys, so PEFT, transformers, vLLM and llama.cpp read
them, and what PEFT wrote is read here. Other kinds use the same two files with `peft_type`
LORA_CORE_<KIND>. docs/formats.md lists every key.

This module is what all families share: which adapter is meant, the order of checks (everything is
read and compared before the model is touched) and of writes; `FORMATS` says which family does what.
"""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.adapter_report import AdapterReport
from lora_core.adapters.host import adapted_modules
from lora_core.adapters.inject import attach_built
from lora_core.adapters.switch import adapter_names
from lora_core.checkpoint.adapter_files import AdapterFormat, read_adapter, write_adapter
from lora_core.checkpoint.lora_files import LORA
from lora_core.checkpoint.own_files import OWN, OWN_KIND
from lora_core.checkpoint.soft_prompts import KINDS as SOFT_PROMPTS
from lora_core.checkpoint.soft_prompts import SOFT_PROMPT
from lora_core.targets import nearest, uncompiled

__all__ = ["adapter_state_dict", "load_adapter", "read_adapter", "save_adapter"]

# peft_type -> how that family is read and written; kinds of one's own are OWN
FORMATS: dict[str, AdapterFormat] = {
    "LORA": LORA,
    **dict.fromkeys(SOFT_PROMPTS, SOFT_PROMPT),
}


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Tensors of one adapter under the keys they have on disk.

    Args:
        model: a model with the adapter.
        name: which.

    Returns:
        {key: tensor}, detached; where the file holds what the model holds, they share memory.

    Raises:
        ValueError: an unknown name.
    """
    found = adapters_named(uncompiled(model), name)
    return _tensors(found, format_of(found))


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model: str | None = None,
) -> list[str]:
    """Write one adapter so that a crash leaves the old one, the new one, or none that loads.

    Args:
        model: a model with the adapter, merged or not, compiled or not.
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
    model = uncompiled(model)
    found = adapters_named(model, name)
    config = next(iter(found.values())).config
    form = format_of(found)
    if base_model is None:
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    record = form.record(model, config, found, base_model)
    tensors = _tensors(found, form)
    try:
        write_adapter(
            Path(directory),
            record,
            tensors,
            lambda folder: form.write_further(model, folder, found),
        )
    except TypeError as error:
        raise TypeError(f"{type(config).__name__} cannot be written as JSON: {error}") from None
    notes = form.notes(model, record, tensors, found)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return notes


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
    model = uncompiled(model)
    config, built = built_from(model, Path(directory), trainable)
    if untie and "untie" in {field.name for field in dataclasses.fields(config)}:
        config = dataclasses.replace(config, untie=True)
    return attach_built(model, config, name, built, trainable=trainable)


def built_from(
    model: nn.Module, folder: Path, trainable: bool = False
) -> tuple[Any, dict[str, Adapter]]:
    """Read a folder and build its adapters for a model, which is left alone.

    Args:
        model: what they are for.
        folder: the adapter's.
        trainable: whether they are to be trained further.

    Returns:
        (configuration, {site: adapter}), filled.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: see `load_adapter`; the message begins with the folder.
    """
    raw, tensors = read_adapter(folder)
    try:
        return _format_named(raw["peft_type"]).read(model, raw, tensors, folder, trainable)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The adapters of one name by site; ValueError with the nearest names if there are none."""
    found = {
        site: host.adapter(name) for site, host in adapted_modules(model) if name in host.adapters
    }
    if not found:
        raise ValueError(f"no adapter {name!r} in the model; {nearest(name, adapter_names(model))}")
    return found


def _tensors(adapters: dict[str, Adapter], form: AdapterFormat) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in form.tensors(adapters).items()}


def format_of(adapters: dict[str, Adapter]) -> AdapterFormat:
    """How an adapter in a model is written: by the class of its configuration."""
    config: Any = next(iter(adapters.values())).config
    return next((form for form in FORMATS.values() if isinstance(config, form.config)), OWN)


def _format_named(peft_type: str) -> AdapterFormat:
    """How a file is read: by its `peft_type`."""
    if peft_type.startswith(OWN_KIND):
        return OWN
    if peft_type not in FORMATS:
        raise ValueError(
            f"peft_type {peft_type!r} is not supported: {', '.join(FORMATS)} and {OWN_KIND}<KIND> "
            "are"
        )
    return FORMATS[peft_type]
