"""Adapters for other programs: a copy in PEFT's format, plain or with its scaling baked in.

What an adapter in PEFT's format means is s·B A, s from r, alpha, their patterns and use_rslora by
module. vLLM, llama.cpp and SGLang read part of that and scale the rest wrongly in silence; a baked
copy (baking.py) leaves nothing to scale. What they have no place for (DoRA's lengths, biases, whole
modules, token rows) is refused with a reason, or converted: `to_lora` makes any linear update a
plain LoRA by SVD, which has an error that is reported. The copy is read back and compared by every
program's own rules (loaders.py).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.convert import convert_to_lora
from lora_core.adapters.inject import delete_adapter
from lora_core.adapters.switch import adapter_names
from lora_core.adapters.truncate import ConversionReport
from lora_core.checkpoint.adapter_files import read_adapter, write_adapter
from lora_core.checkpoint.baking import baked, check
from lora_core.checkpoint.loaders import LOADERS, Applied, Refused, loader_named, read_as_peft
from lora_core.checkpoint.lora_files import lora_record, lora_tensors
from lora_core.checkpoint.lora_options import leaves_base_alone
from lora_core.checkpoint.lora_resume import read_resume
from lora_core.checkpoint.misread import misread, refusals
from lora_core.checkpoint.peft import adapters_named, load_adapter

__all__ = ["ExportReport", "export_adapter"]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote; `print` it.

    Attributes:
        directory: where.
        rank: the one rank of a baked copy; None for a plain one.
        errors: for each program that reads the copy right, the largest |ΔW' - ΔW| / |ΔW| of a
            module, by its own rules.
        refused: programs that do not load it, and why.
        notes: what programs misread in silence.
        conversion: of `to_lora`, or None.
    """

    directory: Path
    rank: int | None
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    conversion: ConversionReport | None = None

    def __str__(self) -> str:
        what = "a plain copy" if self.rank is None else f"baked, rank {self.rank} everywhere"
        lines = [f"wrote {self.directory}: {what}"]
        if self.conversion is not None:
            lines.append(f"converted by SVD, relative error {self.conversion.error:.3%}")
        lines += [f"read by {name}: off by {error:.1e}" for name, error in self.errors.items()]
        lines += [f"not read by {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def export_adapter(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bake: bool = False,
    loader: str | None = None,
    rank: int | None = None,
    to_lora: int | None = None,
    model: nn.Module | None = None,
) -> ExportReport:
    """Write a copy of an adapter for other programs, and check it by their rules.

    Args:
        directory: a LoRA adapter's folder, written here or by PEFT.
        out: a new folder.
        bake: fold the scaling into B and give every pair one rank.
        loader: the program it is for, "peft", "vllm", "llama.cpp" or "sglang": refuse what that
            one does not read; None: say who does not.
        rank: that one rank, to fill up to; None: the largest there is. Only with `bake`.
        to_lora: make a plain LoRA of at most this rank by SVD first. Only with `bake`.
        model: the base model, which `to_lora` needs; frozen afterwards, otherwise as it was.

    Returns:
        What was written, and who reads it how.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no LoRA adapter, a folder that is not empty, options that do not go together, or
            an adapter that the program does not read. Nothing is written then.
    """
    folder, target = Path(directory), Path(out)
    _check_options(target, bake, loader, rank, to_lora, model)
    record, tensors = read_adapter(folder)
    if record["peft_type"] != "LORA":
        raise ValueError(
            f"{folder} is a {record['peft_type']} adapter: only LORA ones are for other programs"
        )
    resume = read_resume(folder, record)
    conversion = None
    if to_lora is not None and model is not None:
        record, tensors, conversion = _converted(model, folder, record, to_lora)
    true = _read_true(folder, record, tensors)
    if bake:
        _check_start(record)
        record, tensors = baked(record, tensors, rank)
    refused = {name: _advised(why) for name, why in refusals(record, tensors).items()}
    if loader in refused:
        raise ValueError(f"{folder}: {refused[loader]}")
    write_adapter(target, record, tensors, lambda _: None)
    written, stored = read_adapter(target)
    readers = [name for name in LOADERS if name not in refused and (bake or name == "peft")]
    errors = {name: _checked(name, written, stored, true) for name in readers}
    notes = misread(written, stored)
    if resume.loftq_base is not None:
        notes.append("the adapter is for the 4-bit base that init='loftq' made, and for no other")
    return ExportReport(target, record["r"] if bake else None, errors, refused, notes, conversion)


def _check_options(
    target: Path,
    bake: bool,
    loader: str | None,
    rank: int | None,
    to_lora: int | None,
    model: nn.Module | None,
) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: choose a new folder for the exported adapter")
    if not bake and (rank is not None or to_lora is not None):
        raise ValueError("rank and to_lora change the adapter: give them with --baked (bake=True)")
    if to_lora is not None and model is None:
        raise ValueError("to_lora decomposes updates of weights: give the base, --model (model)")
    if loader is not None:
        loader_named(loader)


def _read_true(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Applied]:
    try:
        true = read_as_peft(record, tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if not true:
        raise ValueError(f"{folder} has no pair of A and B: there is nothing to export")
    return true


def _check_start(record: Mapping[str, Any]) -> None:
    """Refuse A and B that are not the update, but what PEFT trained from a base it had changed."""
    start = record.get("init_lora_weights", True)
    if not leaves_base_alone(start):
        raise ValueError(
            f"init_lora_weights={start!r} trains from a changed base, which other programs do not "
            "have: load it here and save it again first (load_adapter, save_adapter), or --to-lora"
        )


def _checked(
    name: str,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    true: Mapping[str, Applied],
) -> float:
    try:
        return check(record, tensors, true, LOADERS[name])
    except Refused:
        raise
    except ValueError as error:
        raise ValueError(f"the exported adapter would be misread by {name}: {error}") from None


def _advised(reason: str) -> str:
    """A program's reason with what to do about it."""
    if "DoRA" in reason or "magnitude" in reason:
        return f"{reason}; --to-lora RANK (with --model) makes it a plain LoRA, with an error"
    if " rank" in reason:
        return f"{reason}; --baked gives all one rank"
    if "convolution" in reason:
        return reason
    return f"{reason}; `lora-core merge` puts it into the model instead"


def _converted(
    model: nn.Module, folder: Path, raw: Mapping[str, Any], r: int
) -> tuple[dict[str, Any], dict[str, Tensor], ConversionReport]:
    """The adapter as a plain LoRA; the model keeps neither."""
    taken: Sequence[str] = adapter_names(model)
    names = [next(n for n in _unused(word) if n not in taken) for word in ("export", "exported")]
    load_adapter(model, folder, names[0])
    try:
        report = convert_to_lora(model, names[0], r, names[1], trainable=False)
        found = adapters_named(model, names[1])
        config = next(iter(found.values())).config
        base = raw.get("base_model_name_or_path")
        record = lora_record(model, config, found, base)
        tensors = {key: t.detach().cpu().clone() for key, t in lora_tensors(found).items()}
        delete_adapter(model, names[1])
    finally:
        delete_adapter(model, names[0])
    return record, tensors, report


def _unused(word: str) -> Sequence[str]:
    return [word, *(f"{word}_{i}" for i in range(100))]
