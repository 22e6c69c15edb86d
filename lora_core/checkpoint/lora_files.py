"""LoRA on disk, in PEFT's format: what is written, what is read, what is refused.

PEFT loads in silence when keys are left over; here a missing or unexpected key, another shape and
an option without counterpart are errors. The numbers come from the two files alone. A third,
`lora_core.json` (lora_resume.py), says how they are trained on where PEFT's format cannot.
docs/formats.md lists every key.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import build_all
from lora_core.adapters.forms import TransposedForm
from lora_core.adapters.full import FullCopy
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.adapters.tokens import TrainableTokens, tied_modules
from lora_core.checkpoint.adapter_files import PEFT_VERSION, AdapterFormat, check_tensors
from lora_core.checkpoint.base_copies import without_base_copies
from lora_core.checkpoint.conv_groups import as_written, check_padding, from_disk, mixed
from lora_core.checkpoint.expert_files import (
    expert_record,
    refuse_single_experts,
    taken_for_experts,
)
from lora_core.checkpoint.lora_options import PEFT_PREFIX, lora_config, pair_sites
from lora_core.checkpoint.lora_resume import RESUME, Resume, read_resume, write_resume
from lora_core.checkpoint.lora_scaling import record_for
from lora_core.checkpoint.lora_starts import is_start, is_subtracted, repeated_starts
from lora_core.checkpoint.misread import saving_notes
from lora_core.checkpoint.text_part import text_part
from lora_core.quant import NF4Linear
from lora_core.targets import nearest, pattern_value, sites, targets_for, unwrap

__all__ = ["LORA", "lora_record", "lora_tensors"]

# --- writing ---


def lora_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Tensors of a LoRA adapter by key.

    Args:
        adapters: by site.

    Returns:
        {key: tensor} in PEFT's names and shapes.
    """
    return {
        f"{PEFT_PREFIX}{site}.{key}": tensor
        for site, adapter in adapters.items()
        for key, tensor in as_written(adapter).items()
    }


def _task_type(model: nn.Module, copies: list[str]) -> str | None:
    """PEFT's word for what the model is for: a trained `score` is a sequence classifier's head."""
    if "score" in copies:
        return "SEQ_CLS"
    return "CAUSAL_LM" if type(model).__name__.endswith("CausalLM") else None


def lora_record(
    model: nn.Module, config: LoRAConfig, adapters: Mapping[str, Adapter], base_model: str | None
) -> dict[str, Any]:
    """What goes into adapter_config.json.

    Args:
        model: the model that has the adapter.
        config: its configuration.
        adapters: by site.
        base_model: `base_model_name_or_path`.

    Returns:
        PEFT's fields.
    """
    pairs = {site: adapter for site, adapter in adapters.items() if isinstance(adapter, LoRA)}
    copies = [site for site, adapter in adapters.items() if isinstance(adapter, FullCopy)]
    gaussian = config.init == "gaussian" and not config.lora_bias  # PEFT refuses the two together
    return {
        **record_for(model, config, adapters),
        "base_model_name_or_path": base_model,
        "bias": config.bias,
        "exclude_modules": None,
        "fan_in_fan_out": any(isinstance(pair.form, TransposedForm) for pair in pairs.values()),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if gaussian else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.dropout,
        "modules_to_save": copies or None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "revision": None,
        "target_modules": targets_for(model, pairs.keys() - taken_for_experts(model, pairs)),
        **expert_record(model, adapters),
        "task_type": _task_type(model, copies),
        "trainable_token_indices": _token_indices(config, adapters),
        "use_dora": config.use_dora,
    }


def _token_indices(
    config: LoRAConfig, adapters: Mapping[str, Adapter]
) -> list[int] | dict[str, list[int]] | None:
    """The option as it stands, or by the modules whose rows they are: a tied head has none."""
    given = config.trainable_token_indices
    rows = {s: a for s, a in adapters.items() if isinstance(a, TrainableTokens)}
    own = {site: a.index.tolist() for site, a in rows.items() if not a.follows}
    named = given if isinstance(given, dict) else {}
    owners = all(any(f".{site}".endswith(f".{key}") for site in own) for key in named)
    return given if owners else own


# --- reading ---


def _read(
    model: nn.Module,
    raw: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
    trainable: bool,
) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """Build and fill the adapters that a folder describes."""
    resume = read_resume(folder, raw)
    raw, tensors = text_part(model, raw, tensors)
    _check_model(model, tensors)
    refuse_single_experts(tensors)
    config = resume.training or lora_config(model, raw, tensors)
    _check_ranks(config, tensors)
    built = _empty(model, config, resume)
    if not (folder / RESUME).is_file():
        check_padding(model, built)
    starts = {} if resume.training is not None else repeated_starts(model, config)
    tensors = without_base_copies(model, tensors, lora_tensors(built).keys())
    _check_ties(model, raw, built, tensors, trainable)
    check_tensors(lora_tensors(built), tensors)
    for site, adapter in built.items():
        first = f"{PEFT_PREFIX}{site}."
        own = {key: tensors[first + key] for key in as_written(adapter)}
        built[site] = mixed(adapter, own)
        built[site].load(from_disk(built[site], own))
    for site, (down, up) in starts.items():
        pair = built[site]
        assert isinstance(pair, LoRA)
        pair.A0, pair.B0 = down, up
    resume.check_base(built, model)
    resume.place(built)
    return config, built


def _check_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter for a model whose modules have other names; ValueError says so."""
    names = [name for name, _ in sites(model) if name]
    own = sorted(pair_sites(tensors))
    if own and not set(own) & set(names):
        raise ValueError(
            f"the adapter is for another model: it has pairs for {len(own)} modules, {own[0]!r} "
            f"the first, and none of these is in this one; {nearest(own[0], names)}"
        )


def _check_ranks(config: LoRAConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a rank that no A in the file has, before a pair of it is made; ValueError names it."""
    ends = (".lora_A.weight", ".lora_embedding_A")
    rows = [len(t) for key, t in tensors.items() if key.endswith(ends) and t.dim()]
    for site in sorted(pair_sites(tensors)):
        r = pattern_value(config.rank_pattern, site, config.r)
        if r > max(rows, default=r):
            raise ValueError(
                f"the configuration says rank {r} for {site!r}, no A in the file has more than "
                f"{max(rows)} rows"
            )


def _check_ties(
    model: nn.Module,
    raw: Mapping[str, Any],
    built: Mapping[str, Adapter],
    tensors: Mapping[str, Tensor],
    trainable: bool,
) -> None:
    """Refuse what PEFT does to one of two tied modules, or to both as one, and this library not."""
    for site, adapter in built.items():
        key = f"{PEFT_PREFIX}{site}.token_adapter.trainable_tokens_delta"
        if isinstance(adapter, TrainableTokens) and adapter.follows and key in tensors:
            raise ValueError(
                f"the file has token rows of {site!r} alone, whose weight is the embedding's here "
                "too: load it into a model whose head has a weight of its own"
            )
    if not (trainable and raw.get("ensure_weight_tying")):
        return
    modules = dict(sites(model))
    for site, adapter in built.items():
        others = (name for name, _ in tied_modules(model, unwrap(modules[site])))
        if not isinstance(adapter, TrainableTokens) and (other := set(others) & built.keys()):
            raise ValueError(
                f"ensure_weight_tying=True trains {site!r} and {min(other)!r} as one, here each is "
                "trained by itself: load it with trainable=False"
            )


def _empty(model: nn.Module, config: LoRAConfig, resume: Resume) -> dict[str, Adapter]:
    """The adapters of a configuration, to be filled; a start is computed only where it has to be.

    LoftQ's start makes the base: a 16-bit one is quantized again as it was, a 4-bit one is compared
    with what was used.
    """
    four_bit = any(isinstance(module, NF4Linear) for module in model.modules())
    if config.init == "loftq" and not four_bit:
        return build_all(config, model)
    plain = dataclasses.replace(config, init="kaiming") if is_start(config.init) else config
    built = build_all(plain, model)
    if resume.training is not None and is_subtracted(config.init):
        for pair in built.values():
            if isinstance(pair, LoRA):
                pair.start_at(torch.zeros_like(pair.A), torch.zeros_like(pair.B))
    return built


LORA = AdapterFormat(LoRAConfig, lora_tensors, lora_record, _read, write_resume, saving_notes)
