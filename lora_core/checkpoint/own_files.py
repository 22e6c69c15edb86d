"""Kinds of one's own on disk: the configuration's fields, and `<site>.<parameter>`.

`peft_type` is LORA_CORE_<KIND>, KIND being the name under `@register_adapter`. PEFT does not know
these, so nothing in them has to look like PEFT's.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import build_all, kind_of, registered
from lora_core.checkpoint.adapter_files import AdapterFormat, check_tensors, keyed
from lora_core.targets import nearest, targets_for

__all__ = ["OWN", "OWN_KIND"]

OWN_KIND = "LORA_CORE_"


def _record(
    model: nn.Module, config: Any, adapters: Mapping[str, Adapter], base_model: str | None
) -> dict[str, Any]:
    """The configuration's fields, targets by name where a function chose them."""
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
        named = targets_for(model, adapters)
        fields["targets"] = named if isinstance(named, str) else list(adapters)
    own = {"peft_type": OWN_KIND + kind, "base_model_name_or_path": base_model}
    if taken := sorted(fields.keys() & own.keys()):
        raise ValueError(f"{type(config).__name__} may not have a field called {taken[0]!r}")
    return {**fields, **own}


def _read(
    model: nn.Module,
    raw: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
    trainable: bool,
) -> tuple[Any, dict[str, Adapter]]:
    kind = registered(raw["peft_type"].removeprefix(OWN_KIND))
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    fields = {k: v for k, v in raw.items() if k not in ("peft_type", "base_model_name_or_path")}
    for key in sorted(fields.keys() - set(known)):
        raise ValueError(f"{kind.__name__} has no option {key!r}; {nearest(key, known)}")
    try:
        config = kind(**fields)
    except TypeError as error:
        raise ValueError(str(error)) from None
    built = build_all(config, model)
    check_tensors(keyed(built), tensors)
    for site, adapter in built.items():
        start = f"{site}." if site else ""
        adapter.load({key: tensors[start + key] for key in adapter.tensors()})
    return config, built


OWN = AdapterFormat(config=object, tensors=keyed, record=_record, read=_read)
