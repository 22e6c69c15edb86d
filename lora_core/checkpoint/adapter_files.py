"""An adapter's two files, and what a family of adapters has to say about its own.

    adapter_config.json           a JSON object; `peft_type` names the family
    adapter_model.safetensors     the tensors

A family (LoRA, soft prompts, kinds of one's own) is one `AdapterFormat`; peft.py holds the table of
them. The two files are written so that old weights never meet a new configuration, nor new weights
an old one: the configuration is taken away once the new weights are there, and comes back last.
What a family writes beside them is written in between.

PEFT sorts every object of the configuration, `rank_pattern` too, although its first pattern that
matches wins: a file of PEFT's may mean other ranks than the run that wrote it had. Here only the
outermost keys are sorted.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.checkpoint.safetensors_folder import read_header, read_json_object
from lora_core.checkpoint.safetensors_writing import Pending, write_safetensors
from lora_core.files import atomic_write, sync
from lora_core.targets import nearest

__all__ = [
    "CONFIG",
    "PEFT_VERSION",
    "WEIGHTS",
    "AdapterFormat",
    "check_tensors",
    "keyed",
    "read_adapter",
    "write_adapter",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # the version whose files these are; PEFT asks for none


def _nothing_further(model: nn.Module, folder: Path, adapters: Mapping[str, Adapter]) -> None:
    """Write no further file."""


def _no_notes(
    model: nn.Module,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
) -> list[str]:
    return []


@dataclass(frozen=True)
class AdapterFormat:
    """How one family of adapters lies in the two files.

    Attributes:
        config: class of its configurations.
        tensors: {site: adapter} -> {key on disk: tensor}.
        record: (model, configuration, {site: adapter}, base model's name or None) -> what goes
            into adapter_config.json.
        read: (model, adapter_config.json, tensors, folder, trainable) -> (configuration,
            {site: adapter}), filled, the model left alone; ValueError says what does not fit.
        write_further: (model, folder, {site: adapter}): writes what else is needed to train on, and
            takes away what an adapter before it left there.
        notes: (model, record, tensors, {site: adapter}) -> what other programs get wrong about it.
    """

    config: type | UnionType
    tensors: Callable[[Mapping[str, Adapter]], dict[str, Tensor]]
    record: Callable[[nn.Module, Any, Mapping[str, Adapter], str | None], dict[str, Any]]
    read: Callable[
        [nn.Module, dict[str, Any], dict[str, Tensor], Path, bool], tuple[Any, dict[str, Adapter]]
    ]
    write_further: Callable[[nn.Module, Path, Mapping[str, Adapter]], None] = _nothing_further
    notes: Callable[
        [nn.Module, Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Adapter]], list[str]
    ] = _no_notes


def keyed(adapters: Mapping[str, Adapter], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of adapters by key: prefix, site, the adapter's own name for it.

    Args:
        adapters: by site.
        prefix: what every key starts with.

    Returns:
        {key: tensor}, live or derived, as `Adapter.tensors` gives them.
    """
    return {
        prefix + (f"{site}.{key}" if site else key): tensor
        for site, adapter in adapters.items()
        for key, tensor in adapter.tensors().items()
    }


def check_tensors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a file with those that a model needs: every key, shape and dtype.

    Args:
        wanted: by key, as the adapters have them.
        given: as the file has them.

    Raises:
        ValueError: a missing or unexpected key, another shape, or integers.
    """
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    for kind, keys, others in (
        ("is missing", missing, sorted(given)),
        ("is unexpected", unexpected, sorted(wanted)),
    ):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(f"the key {keys[0]!r} {kind}{more}; {nearest(keys[0], others)}")
    for key, tensor in given.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}, the model needs "
                f"{tuple(wanted[key].shape)}: another base, or another configuration"
            )
        if wanted[key].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{key!r} holds {tensor.dtype}, not floating-point numbers")


def write_adapter(
    folder: Path,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    write_further: Callable[[Path], None] = lambda _: None,
    weights: str = WEIGHTS,
) -> None:
    """Write the two files and what goes beside them.

    Args:
        folder: where; made if it is not there, other files in it stay.
        record: what adapter_config.json is to hold.
        tensors: by key.
        write_further: called with the folder once the weights are there.
        weights: name of the file that the tensors go to.

    Raises:
        TypeError: JSON cannot hold the record.
    """
    text = json.dumps({key: record[key] for key in sorted(record)}, indent=2) + "\n"
    pending = [
        Pending(key, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)  # type: ignore[misc]
        for key, tensor in sorted(tensors.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)

    def write_weights(aside: Path) -> None:
        write_safetensors(aside, pending)
        (folder / CONFIG).unlink(missing_ok=True)
        sync(folder)

    atomic_write(folder / weights, write_weights)
    write_further(folder)
    atomic_write(folder / CONFIG, text)


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
