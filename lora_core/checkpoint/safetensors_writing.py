"""Safetensors files written as a stream, one tensor in memory at a time.

The library's writer needs all tensors at once; here each is made when its turn comes, so that a
model of 4-bit layers is written dense without ever being dense. The format is described in
`safetensors_folder.py`.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.checkpoint.safetensors_folder import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Pending:
    """A tensor to write: what the header needs, and how to make it when its turn comes."""

    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    """Sizes."""
    dtype: torch.dtype
    """Dtype on disk."""
    make: Callable[[], Tensor]
    """Returns the tensor, on any device."""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Iterable[Pending]) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    Args:
        path: the file, overwritten.
        tensors: what to write, in the order of the buffer.

    Raises:
        TypeError: a dtype that the format does not know.
        ValueError: `make` returned a tensor of another shape or dtype.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in tensors:
        if item.dtype not in _CODES:
            raise TypeError(f"tensor {item.name}: safetensors files here hold no {item.dtype}")
        header[item.name] = {
            "dtype": _CODES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, position + item.nbytes],
        }
        position += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the buffer starts on a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for item in tensors:
            tensor = item.make().detach()
            if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype:
                raise ValueError(
                    f"tensor {item.name} was announced as {item.shape} {item.dtype}; "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            flat = tensor.cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
