"""What other programs get wrong about an adapter in PEFT's format, in silence.

A program that refuses says so itself. These notes are about the others: a scale that is not the one
the adapter was trained with (loaders.py knows whose rules those are), and what PEFT itself cannot
load or computes otherwise. `lora-core export --baked` writes what every one of them reads right.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.forms import ConvForm
from lora_core.adapters.lora import LoRA
from lora_core.checkpoint.conv_groups import unlike_peft
from lora_core.checkpoint.expert_files import expert_notes
from lora_core.checkpoint.loaders import LOADERS, Applied, Refused, read_as_peft

__all__ = ["misread", "refusals", "saving_notes"]

_PROGRAMS = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "sglang": "SGLang"}


def saving_notes(
    model: nn.Module,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
) -> list[str]:
    """Notes for whoever saves an adapter; mostly none.

    Args:
        model: the model that has it.
        record: adapter_config.json.
        tensors: by key.
        adapters: by site.

    Returns:
        One line each: what PEFT 0.21.2 does not load or computes otherwise, what others misread.
    """
    notes = []
    if record.get("lora_bias") and record.get("use_dora"):
        notes.append("lora_bias with use_dora: PEFT refuses the two together")
    pairs = {site: a for site, a in adapters.items() if isinstance(a, LoRA)}
    grouped = [s for s, p in pairs.items() if isinstance(p.form, ConvForm) and p.form.groups > 1]
    if grouped and record.get("use_dora"):
        notes.append(f"use_dora at {grouped[0]!r}, a convolution in groups: PEFT mixes up its rows")
    for copy in record.get("modules_to_save") or []:
        notes += [
            f"modules_to_save={copy!r}: PEFT takes {site!r}, which ends so, for another of them"
            for site in pairs
            if site.endswith(copy)
        ][:1]
    notes += [f"{site!r}: {why}" for site, why in unlike_peft(model, pairs).items()][:1]
    if any(getattr(adapter.config, "init", None) == "loftq" for adapter in adapters.values()):
        notes.append(
            "init='loftq' made the 4-bit base that this adapter is for: load_adapter makes it "
            "again from the 16-bit model; other programs need it saved (unload_adapters(model); "
            "save_model(model, directory, quantized=True))"
        )
    stacked = expert_notes(record, adapters)
    return notes + (stacked or misread(record, tensors))  # loaders.py knows single matrices alone


def misread(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What programs that load an adapter scale otherwise than PEFT: a line, or none.

    Args:
        record: adapter_config.json.
        tensors: by key.

    Returns:
        A line that names the options and the programs, or none.
    """
    true = read_as_peft(record, tensors)
    wrong = [_PROGRAMS[name] for name in _PROGRAMS if _scaled_wrong(name, record, tensors, true)]
    options = [key for key in ("rank_pattern", "alpha_pattern", "use_rslora") if record.get(key)]
    line = (
        f"{' and '.join(options)}: misread by {', '.join(wrong)}, in silence; PEFT reads it. For "
        "them, write `lora-core export --baked`"
    )
    return [line] if wrong else []


def refusals(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which programs do not load an adapter, and why: {program: reason}."""
    found = {}
    for name, read in LOADERS.items():
        try:
            read(record, tensors)
        except Refused as reason:
            found[name] = str(reason)
    return found


def _scaled_wrong(
    name: str,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    true: Mapping[str, Applied],
) -> bool:
    """Whether a program loads the adapter and scales a pair of it otherwise."""
    try:
        got = LOADERS[name](record, tensors)
    except Refused:
        return False
    return any(not math.isclose(got[site].scale, true[site].scale) for site in true)
