"""Experts' pairs in PEFT's files: `target_parameters`, and what is not read.

PEFT's option lists parameters by name or suffix. Stacked experts' are among them, and plain
weights: a router is a parameter to PEFT, a linear layer here, with the same keys and shapes. Where
`target_parameters` is used, the keys of the file say which layers have a pair.

PEFT rewrites `target_modules` of a model with experts: whatever ends in `gate_proj`, `up_proj` or
`down_proj` it takes for experts' parameters, although layers without experts (`mlp_only_layers`)
have plain ones of those names. Written as parameters (`mlp.up_proj.weight`) they are left alone.

Before transformers 5 each expert was three linear layers, and files of that time have a pair for
each (`experts.0.gate_proj.lora_A.weight`). PEFT makes one pair of doubled rank of gate's and up's;
that is another adapter to train, and such files are refused here.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.expert_targets import targeted_parameters
from lora_core.adapters.experts import ExpertLoRA
from lora_core.adapters.forms import form_of
from lora_core.adapters.lora import LoRA
from lora_core.targets import sites, targets_for, unwrap

__all__ = [
    "expert_notes",
    "expert_parameters",
    "expert_record",
    "plain_targets",
    "refuse_single_experts",
    "taken_for_experts",
]

_SINGLE = re.compile(r".*\.experts\.\d+\.(gate|up|down)_proj\.lora_[AB]\.weight")
_MATRICES = ("gate_proj", "up_proj", "down_proj")


def taken_for_experts(model: nn.Module, adapters: Mapping[str, Adapter]) -> list[str]:
    """The plain layers with a pair that PEFT would take for experts', by their names.

    Args:
        model: the model that has the adapter.
        adapters: by site.

    Returns:
        Sites; none in a model without experts.
    """
    if getattr(getattr(model, "config", None), "num_experts", None) is None:
        return []
    plain = [site for site, adapter in adapters.items() if isinstance(adapter, LoRA)]
    return [site for site in plain if site.rsplit(".", 1)[-1] in _MATRICES]


def expert_record(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """PEFT's `target_parameters`, where there are experts' pairs, or layers taken for them.

    Args:
        model: the model that has the adapter.
        adapters: by site.

    Returns:
        {"target_parameters": whole names}, or {}.
    """
    names = [
        f"{site}.{name}"
        for site, adapter in adapters.items()
        if isinstance(adapter, ExpertLoRA)
        for name in adapter.pairs
    ]
    names += [f"{site}.weight" for site in taken_for_experts(model, adapters)]
    return {"target_parameters": names} if names else {}


def expert_parameters(model: nn.Module, raw: Mapping[str, Any]) -> list[str] | None:
    """The experts' parameters that a file's `target_parameters` mean.

    Args:
        model: what the adapter is for.
        raw: adapter_config.json.

    Returns:
        Whole names, or None. Entries that match nothing are passed over, as PEFT does.

    Raises:
        ValueError: no list of names, or none that matches.
    """
    given = raw.get("target_parameters")
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"target_parameters must be a list of names, got {given!r}")
    modules = {name: unwrap(module) for name, module in sites(model)}
    found: dict[str, None] = {}
    known = 0
    for pattern in given:
        try:
            hits = targeted_parameters(modules, [pattern])
        except ValueError:
            continue
        known += 1
        found |= {f"{site}.{name}": None for site, own in hits.items() for name in own}
    if not known:
        raise ValueError(
            f"not supported here: target_parameters={given!r}, of which none is an expert's "
            "parameter or a layer's weight in this model"
        )
    return list(found) or None


def plain_targets(
    model: nn.Module, raw: Mapping[str, Any], keyed: Iterable[str]
) -> str | list[str]:
    """The layers other than experts that a file with `target_parameters` has pairs for.

    Args:
        model: what the adapter is for.
        raw: adapter_config.json.
        keyed: names under which the file has a pair.

    Returns:
        As `LoRAConfig.targets`, [] if there are none.
    """
    modules = {name: unwrap(module) for name, module in sites(model)}
    own = set(keyed)
    return targets_for(
        model, [name for name in modules if name in own and form_of(modules[name]) is not None]
    )


def refuse_single_experts(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file with a pair for each matrix of an expert; ValueError names one."""
    found = next((key for key in tensors if _SINGLE.fullmatch(key)), None)
    if found is not None:
        raise ValueError(
            f"the file has a pair for each expert's matrix ({found!r}), as before transformers 5; "
            "pairs of stacked experts are read: load it with PEFT 0.21 and save it again"
        )


def expert_notes(record: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> list[str]:
    """What other programs do with experts' pairs.

    Args:
        record: adapter_config.json.
        adapters: by site.

    Returns:
        Lines, mostly none.
    """
    experts = [site for site, adapter in adapters.items() if isinstance(adapter, ExpertLoRA)]
    named = record.get("target_parameters")
    if not named:
        return []
    what = (
        f"{experts[0]!r} has pairs of stacked experts (target_parameters)"
        if experts
        else f"{named[0]!r} is a layer that PEFT takes for an expert's if it is in target_modules; "
        "it is written to target_parameters"
    )
    readers = "PEFT alone is known to read: for vLLM, SGLang and llama.cpp merge the adapter"
    notes = [f"{what}, which {readers}"]
    if record.get("lora_dropout"):
        notes.append(
            "lora_dropout with target_parameters: PEFT refuses the two together; to load it there, "
            "set lora_dropout to 0 in adapter_config.json"
        )
    notes += [
        f"{option} with target_parameters: PEFT refuses the two together"
        for option in ("use_dora", "lora_bias")
        if record.get(option)
    ]
    return notes
