"""`lora_core.json`: what PEFT's files cannot say of a LoRA adapter, and training needs.

    trained_on   precision of the base: text, or {precision: [site, …]} where it differs
    training     the configuration it was trained with, where the two files hold another form of it:
                 a pair of rank 2r for PiSSA and OLoRA, block-diagonal ones for independent parts
    written      what adapter_config.json says of rank and scaling, to tell whether this file still
                 belongs to the two beside it
    loftq_base   {site, checksum} of one 4-bit layer that LoftQ made: the adapter is for that base

PEFT passes over the file. Loading takes the numbers from the two files alone; this one decides how
they are trained on, so another program's changes to the weights are kept. If it has changed rank or
scaling, this file describes nothing that is there, and loading says so.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.checkpoint.lora_scaling import record_for
from lora_core.checkpoint.lora_starts import is_start
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.files import atomic_write
from lora_core.quant import NF4Linear
from lora_core.targets import nearest, sites, targets_for, unwrap

__all__ = ["RESUME", "Resume", "read_resume", "write_resume"]

RESUME = "lora_core.json"


@dataclasses.dataclass(frozen=True)
class Resume:
    """What the file says; all empty where there is none.

    Attributes:
        trained_on: {site: precision}, or {"": precision} for all.
        training: the configuration, or None.
        loftq_base: (site, checksum), or None.
    """

    trained_on: dict[str, str] = dataclasses.field(default_factory=dict)
    training: LoRAConfig | None = None
    loftq_base: tuple[str, int] | None = None

    def place(self, adapters: Mapping[str, Adapter]) -> None:
        """Set `trained_on` of adapters that are about to be attached."""
        for site, adapter in adapters.items():
            adapter.trained_on = self.trained_on.get(site, self.trained_on.get(""))

    def check_base(self, adapters: Mapping[str, Adapter], model: nn.Module) -> None:
        """Refuse another 4-bit base than the one that LoftQ made; ValueError says what to load."""
        if self.loftq_base is None:
            return
        site, wanted = self.loftq_base
        adapter = adapters.get(site)
        if adapter is None:
            raise ValueError(
                f"{RESUME} names the module {site!r}, at which the adapter has nothing"
            )
        made = adapter.new_base if isinstance(adapter, LoRA) else ()
        base = made[0] if made else unwrap(dict(sites(model))[site])
        if not isinstance(base, NF4Linear) or _checksum(base) != wanted:
            raise ValueError(
                f"the adapter belongs to the 4-bit base that init='loftq' made, and {site!r} is "
                "another here: load the 16-bit model it was made from, or the 4-bit folder that "
                "save_model(model, directory, quantized=True) wrote"
            )


def write_resume(model: nn.Module, folder: Path, adapters: Mapping[str, Adapter]) -> None:
    """Write the file.

    Args:
        model: the model that has the adapter.
        folder: the adapter's.
        adapters: by site.
    """
    config: LoRAConfig = next(iter(adapters.values())).config
    content: dict[str, Any] = {"trained_on": _by_precision(adapters)}
    pairs = {site: a for site, a in adapters.items() if isinstance(a, LoRA)}
    if is_start(config.init) or any(pair.parts for pair in pairs.values()):
        content["training"] = _fields(config, targets_for(model, pairs))
        content["written"] = record_for(model, config, adapters)
    modules = dict(sites(model))
    base = next((s for s in pairs if isinstance(unwrap(modules[s]), NF4Linear)), None)
    if config.init == "loftq" and base is not None:
        content["loftq_base"] = {"site": base, "checksum": _checksum(unwrap(modules[base]))}
    atomic_write(folder / RESUME, json.dumps(content, indent=2) + "\n")


def read_resume(folder: Path, raw: Mapping[str, Any]) -> Resume:
    """Read the file, where there is one.

    Args:
        folder: the adapter's.
        raw: its adapter_config.json.

    Returns:
        What it says.

    Raises:
        ValueError: malformed, or about another adapter than the one beside it.
    """
    if not (folder / RESUME).is_file():
        return Resume()
    content = read_json_object(folder / RESUME)
    trained_on = content.get("trained_on") or {}
    if isinstance(trained_on, str):
        trained_on = {trained_on: [""]}
    base = content.get("loftq_base")
    try:
        by_site = {site: precision for precision, where in trained_on.items() for site in where}
        loftq_base = None if base is None else (str(base["site"]), int(base["checksum"]))
        training = _config(content.get("training"), content.get("written"), raw)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{RESUME} is malformed: {error!r}") from None
    return Resume(by_site, training, loftq_base)


def _config(
    fields: Mapping[str, Any] | None, written: Mapping[str, Any] | None, raw: Mapping[str, Any]
) -> LoRAConfig | None:
    if fields is None:
        return None
    for key, value in (written or {}).items():
        if raw.get(key) != value:
            raise ValueError(
                f"{RESUME} is of another adapter ({key} = {value!r}) than adapter_config.json "
                f"({key} = {raw.get(key)!r}), which another program has written: remove {RESUME} "
                "to load the other two files as they stand"
            )
    known = [field.name for field in dataclasses.fields(LoRAConfig)]
    for key in sorted(fields.keys() - set(known)):
        raise ValueError(f"{RESUME}: LoRAConfig has no option {key!r}; {nearest(key, known)}")
    return LoRAConfig(**fields)


def _fields(config: LoRAConfig, targets: list[str] | str) -> dict[str, Any]:
    """The configuration as JSON holds it, its targets by name."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {**fields, "targets": targets, "exclude": None}


def _by_precision(adapters: Mapping[str, Adapter]) -> str | dict[str, list[str]] | None:
    found: dict[str, list[str]] = {}
    for site, adapter in adapters.items():
        if adapter.trained_on is not None:
            found.setdefault(adapter.trained_on, []).append(site)
    if len(found) > 1:
        return found
    return next(iter(found), None)


def _checksum(layer: nn.Module) -> int:
    """A number that other codes would hardly give: the sum of code x place, exact in int64."""
    assert isinstance(layer, NF4Linear)
    codes = layer.codes.detach().flatten().cpu().long()
    return int((codes * torch.arange(1, len(codes) + 1)).sum())
