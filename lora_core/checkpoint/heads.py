"""Heads on disk, beside the adapter of their backbone.

    heads.json           {"heads": {task: kind, labels, problem, pooling, dropout}, "rows": {…}}
    heads.safetensors    <task>.out.weight and <task>.out.bias, float32

The adapter's own two files stay in PEFT's format with the base's names, so that other programs load
it on the plain base; the heads are tensors of a few kilobytes that only this library reads. The
base's folder is not written to. As with an adapter, the description is taken away while the weights
change, so that a crash leaves old heads, new heads, or none that load.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.checkpoint.safetensors_folder import read_header, read_json_object
from lora_core.checkpoint.safetensors_writing import Pending, write_safetensors
from lora_core.files import atomic_write, sync
from lora_core.models.multi_head import MultiHead
from lora_core.models.task_heads import Head, HeadShape

__all__ = ["HEADS", "HEAD_WEIGHTS", "load_heads", "read_heads", "save_heads"]

HEADS, HEAD_WEIGHTS = "heads.json", "heads.safetensors"


def save_heads(
    model: MultiHead, directory: str | Path, rows: Mapping[str, Any] | None = None
) -> None:
    """Write the heads of a model; its backbone's adapter is saved by `save_adapter`.

    Args:
        model: with the heads.
        directory: where; made if it is not there, other files in it stay.
        rows: JSON-ready facts on how rows are made (max_length, …), for predictions.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{task}.{name}": tensor.detach()
        for task, head in model.task_heads().items()
        for name, tensor in head.state_dict().items()
    }
    pending = [
        Pending(key, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)  # type: ignore[misc]
        for key, tensor in tensors.items()
    ]
    shapes = {task: head.shape.to_dict() for task, head in model.task_heads().items()}

    def write(aside: Path) -> None:
        write_safetensors(aside, pending)
        (folder / HEADS).unlink(missing_ok=True)
        sync(folder)

    atomic_write(folder / HEAD_WEIGHTS, write)
    content = {"heads": shapes, "rows": dict(rows or {})}
    atomic_write(folder / HEADS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_heads(directory: str | Path) -> tuple[dict[str, HeadShape], dict[str, Any]]:
    """What heads a folder holds.

    Args:
        directory: the folder.

    Returns:
        (task -> shape, how rows were made).

    Raises:
        FileNotFoundError: it holds none.
        ValueError: heads.json is damaged, or describes what cannot be.
    """
    file = Path(directory) / HEADS
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no {HEADS}: no heads were trained there (finetune --objective heads)"
        )
    content = read_json_object(file)
    described, rows = content.get("heads"), content.get("rows", {})
    if not isinstance(described, dict) or not described or not isinstance(rows, dict):
        raise ValueError(f'{file} must hold an object "heads" with a head for each task')
    shapes = {}
    for task, fields in described.items():
        try:
            shapes[task] = HeadShape(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {task}: {error}") from None
    return shapes, rows


def load_heads(directory: str | Path, size: int | None = None) -> dict[str, Head]:
    """The heads of a folder, for `MultiHead(backbone, heads)`.

    Args:
        directory: the folder.
        size: the backbone's hidden size; None: as the file has it.

    Returns:
        Task -> head, on the CPU, bit-equal to what was saved.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that do not fit together, or heads of another backbone.
    """
    from safetensors import safe_open

    shapes, _ = read_heads(directory)
    file = Path(directory) / HEAD_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {HEAD_WEIGHTS}, which {HEADS} belongs to")
    entries = read_header(file)
    wanted = {f"{task}.out.{name}" for task in shapes for name in ("weight", "bias")}
    if wanted != set(entries):
        odd = sorted(wanted ^ set(entries))[0]
        raise ValueError(f"{file} and {HEADS} do not fit together: {odd!r} is in only one of them")
    with safe_open(file, framework="pt", device="cpu") as handle:
        tensors = {key: handle.get_tensor(key) for key in entries}
    heads = {}
    for task, shape in shapes.items():
        weight = tensors[f"{task}.out.weight"]
        own = weight.shape[-1] if size is None else size
        if tuple(weight.shape) != (shape.outputs, own):
            raise ValueError(
                f"{file}: {task}.out.weight is {tuple(weight.shape)}; the head needs "
                f"{(shape.outputs, own)}: another backbone, or a damaged {HEADS}"
            )
        head = Head(shape, own)
        with torch.no_grad():
            head.out.weight.copy_(weight)
            head.out.bias.copy_(tensors[f"{task}.out.bias"])
        heads[task] = head
    return heads


def differing(model: nn.Module, directory: str | Path) -> str | None:
    """The first tensor of a model's heads that a folder holds differently; None: all are equal."""
    assert isinstance(model, MultiHead)
    saved = load_heads(directory)
    for task, head in model.task_heads().items():
        for name, tensor in head.state_dict().items():
            if not torch.equal(tensor.cpu(), saved[task].state_dict()[name]):
                return f"{task}.{name}"
    return None
