"""act(gate) * up and its gradient in C: `swiglu.c`, for float32, bfloat16 and float16."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lora_kernels.cpu import arguments, library

__all__ = ["ACTIVATIONS", "backward", "forward"]

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_ARGUMENTS = (
    *(c_int, c_int, c_int, *(c_void_p, c_int64) * 3),  # threads, dtype, act; gate, up, dout
    *(c_int64, c_int64, c_void_p, c_void_p),  # rows, columns, out, dup
)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`.

    Args:
        gate: (M, D), rows without gaps inside.
        up: likewise.
        activation: a key of `ACTIVATIONS`.

    Returns:
        (M, D) in the dtype of gate.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run(gate, up, None, activation, out, None)
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, both (M, D); arguments as `forward`'s."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run(gate, up, dout, activation, dgate, dup)
    return dgate, dup


def _run(
    gate: Tensor, up: Tensor, dout: Tensor | None, activation: str, out: Tensor, dup: Tensor | None
) -> None:
    run = library.function("lora_swiglu", *_ARGUMENTS)
    chosen = (library.threads(), arguments.DTYPES[gate.dtype], ACTIVATIONS[activation])
    given = (gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0))
    third = (None, 0) if dout is None else (dout.data_ptr(), dout.stride(0))
    to = (out.data_ptr(), None if dup is None else dup.data_ptr())
    run(*chosen, *given, *third, *gate.shape, *to)
