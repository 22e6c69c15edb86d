"""act(gate) * up and its gradient on a GPU: one launch each, bound by memory.

A program handles BLOCK elements of a row, 16 a thread, so that a 16-bit tensor is read in pieces of
16 bytes. Tensors without gaps are one row; gate and up that lie side by side, as one product gives
them, are read where they are. Forward moves 6 bytes an element of 16 bits, backward 10.

The sigmoid is formed from exp(-|z|), which cannot overflow.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.variant import Variant

__all__ = ["backward", "forward", "variants"]

BLOCK = 2048  # elements a program
WARPS = 4


@triton.jit
def _widen(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _activate(gate, GELU: tl.constexpr):
    """act(gate) and its derivative."""
    z, dz = gate, gate * 0 + 1
    if GELU:
        square, twice = gate * gate, 1.5957691216057308  # 2 sqrt(2 / pi)
        z = twice * gate * (1 + 0.044715 * square)
        dz = twice * (1 + 0.134145 * square)
    e = tl.exp(-tl.abs(z))
    larger = 1 / (1 + e)
    smaller = e * larger  # 1 - larger, without the cancellation
    s = tl.where(z < 0, smaller, larger)
    value = gate * s
    return value, s + value * tl.where(z < 0, larger, smaller) * dz


@triton.jit
def _load(at, row, i, stride, columns):
    return _widen(tl.load(at + row * stride + i, mask=i < columns, other=0.0))


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    columns,
    pieces,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // pieces).to(tl.int64)
    i = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    value, _ = _activate(_load(gate_ptr, row, i, gate_stride, columns), GELU)
    out = value * _load(up_ptr, row, i, up_stride, columns)
    at = out_ptr + row * columns + i
    tl.store(at, narrow(out, out_ptr.dtype.element_ty), mask=i < columns)


@triton.jit
def _backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    columns,
    pieces,
    dout_stride,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // pieces).to(tl.int64)
    i = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    value, slope = _activate(_load(gate_ptr, row, i, gate_stride, columns), GELU)
    up = _load(up_ptr, row, i, up_stride, columns)
    dout = _load(dout_ptr, row, i, dout_stride, columns)
    dtype: tl.constexpr = dgate_ptr.dtype.element_ty
    at = row * columns + i
    tl.store(dgate_ptr + at, narrow(dout * up * slope, dtype), mask=i < columns)
    tl.store(dup_ptr + at, narrow(dout * value, dtype), mask=i < columns)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`.

    Args:
        gate: (M, D), channels side by side.
        up: likewise, of the same dtype.
        activation: "silu" or "gelu_tanh".

    Returns:
        (M, D) in the dtype of gate.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_forward_kernel, (gate, up), (out,), activation)
    return out


def backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, both (M, D); arguments as `forward`'s."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_backward_kernel, (dout, gate, up), (dgate, dup), activation)
    return dgate, dup


def _launch(
    kernel: Any, given: tuple[Tensor, ...], made: tuple[Tensor, ...], activation: str
) -> None:
    rows, columns = given[0].shape
    pieces = triton.cdiv(columns, BLOCK)
    if rows * pieces == 0:
        return
    strides = [t.stride(0) for t in given]
    options = {**_constants(activation), "num_warps": WARPS}
    kernel[(rows * pieces,)](*given, *made, columns, pieces, *strides, **options)


def _constants(activation: str) -> dict[str, Any]:
    return {"GELU": activation == "gelu_tanh", "BLOCK": BLOCK}


def variants() -> list[Variant]:
    """Both directions in 16 bits and float32, and the other activation."""
    return [
        _variant(kernel, dtype, activation)
        for kernel in (_forward_kernel, _backward_kernel)
        for dtype, activation in (
            ("bf16", "silu"),
            ("fp16", "silu"),
            ("fp32", "silu"),
            ("bf16", "gelu_tanh"),
        )
    ]


def _variant(kernel: Any, dtype: str, activation: str) -> Variant:
    constants = _constants(activation)
    signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    way = "forward" if kernel is _forward_kernel else "backward"
    return Variant(
        f"swiglu/{way}/{dtype}/{activation}",
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        warps=WARPS,
        odd=frozenset(("pieces",)),
    )
