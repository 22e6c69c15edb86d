"""Expand 4-bit codes: all of a tensor, or a slice of a matrix.

    x_i = round(table[code_i] * scale_b)        b = i // block_size, the product in float32

`blockwise4_reference.py` is the definition; C on a CPU and Triton on a GPU are bit-equal to it.

Each is a `torch.library` operator: a compiler takes it as it stands, whichever backend runs,
instead of tracing the definition or stopping at C. Without gradient: codes are not differentiable,
and scales are frozen with them. What multiplies by an expanded weight and is differentiated keeps
that weight for its gradient, compiled or not, except under `torch.utils.checkpoint`; `matmul4` and
`lora_linear4` keep the codes instead.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (equations 1-4).
"""

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels import blockwise4_reference as reference
from lora_kernels.dispatch import backend_for
from lora_kernels.operands import Weight4
from lora_kernels.scales4 import SCALE_GROUP

__all__ = ["FLOATS", "check_stored", "check_table", "dequantize4", "expand4", "expand4_slice"]

BACKENDS = ("reference", "native", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor table, Tensor? scale_absmax, Tensor? scale_offset, "
    "Tensor? scale_table, int block_size"
)
_OPS = torch.ops.lora_kernels

torch.library.define(
    "lora_kernels::dequantize4", f"({_WEIGHT}, int numel, ScalarType dtype) -> Tensor"
)
torch.library.define("lora_kernels::dequantize4_into", f"({_WEIGHT}, Tensor(a!) out) -> ()")
torch.library.define(
    "lora_kernels::expand4_slice_into",
    f"({_WEIGHT}, int out_features, int in_features, int[] box, Tensor(a!) out) -> ()",
)


def dequantize4(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
    *,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Expand 4-bit codes: `x_i = round(table[code_i] * scale_b)`, the product in float32.

    Args:
        codes: uint8, ceil(numel / 2) bytes, any shape.
        scales: float32 (ceil(numel / block_size),), or uint8 indices, decoded on the way.
        table: float32 (16,).
        block_size: elements that share a scale.
        numel: elements, which tells an even count from an odd one.
        dtype: of the result; the product is rounded to it once.
        nested: what decodes uint8 scales: absmax, offset, table, as `decode_scales` takes them.
        out: contiguous, `numel` elements of `dtype`: written and returned.

    Returns:
        `out`, or a new tensor (numel,) of `dtype`.

    Raises:
        TypeError: `dtype` is not floating-point, or codes are not uint8.
        ValueError: too many or too few codes or scales for `numel`, scales on another device,
            uint8 scales without `nested`, or a table or an `out` of another kind.
    """
    check_stored(codes, scales, table, block_size, nested, numel)
    _check_dtype(dtype)
    weight = (codes, scales, table, *(nested or (None, None, None)), block_size)
    with torch.no_grad():
        if out is None:
            return _OPS.dequantize4(*weight, numel, dtype)
        _check_out(out, numel, dtype, codes.device)
        _OPS.dequantize4_into(*weight, out)
    return out


def expand4(weight: Weight4, dtype: torch.dtype) -> Tensor:
    """Expand a whole matrix.

    Args:
        weight: codes and scales of W (N, K).
        dtype: of the result.

    Returns:
        (N, K) of `dtype`.
    """
    n, k = weight.out_features, weight.in_features
    codes, scales, table, block = weight.codes, weight.scales, weight.table, weight.block_size
    return dequantize4(codes, scales, table, block, n * k, dtype, nested=weight.nested).view(n, k)


def expand4_slice(
    weight: Weight4,
    row0: int,
    row1: int,
    col0: int,
    col1: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Expand rows `row0 … row1` and columns `col0 … col1` of a weight, and nothing else of it.

    Args:
        weight: rows are whole blocks.
        row0: first row.
        row1: one past the last.
        col0: first column, a multiple of the block size.
        col1: one past the last, likewise.
        dtype: of the result, to which the float32 product is rounded once.
        out: contiguous, as many elements of `dtype`: written and returned.

    Returns:
        `out`, or a new tensor (row1 - row0, col1 - col0).

    Raises:
        TypeError: as `dequantize4`.
        ValueError: rows that are not whole blocks, a slice that is not within the weight or does
            not end on blocks, or as `dequantize4`.
    """
    n, k, block = weight.out_features, weight.in_features, weight.block_size
    if k % block:
        raise ValueError(f"slices need rows of whole blocks; got {k} columns in blocks of {block}")
    if not (0 <= row0 <= row1 <= n and 0 <= col0 <= col1 <= k):
        raise ValueError(f"[{row0}:{row1}, {col0}:{col1}] is not a slice of ({n}, {k})")
    if col0 % block or col1 % block:
        raise ValueError(f"columns must be multiples of the block size {block}; got {col0}:{col1}")
    check_stored(weight.codes, weight.scales, weight.table, block, weight.nested, n * k)
    _check_dtype(dtype)
    shape, device = (row1 - row0, col1 - col0), weight.codes.device
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        _check_out(out, math.prod(shape), dtype, device)
    nested = weight.nested or (None, None, None)
    tensors = (weight.codes, weight.scales, weight.table, *nested)
    with torch.no_grad():
        _OPS.expand4_slice_into(*tensors, block, n, k, (row0, row1, col0, col1), out)
    return out


# --- what does not fit ---------------------------------------------------------------------------


def check_table(table: Tensor) -> None:
    """Refuse a code table that is not float32 (16,).

    Raises:
        ValueError: with what it is instead.
    """
    if table.shape != (16,) or table.dtype != torch.float32:
        raise ValueError(
            f"the code table must be float32 (16,); got {table.dtype} {tuple(table.shape)}"
        )


def check_stored(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    numel: int,
) -> None:
    """Refuse what a kernel, which sees addresses alone, would read wrongly or beyond.

    Raises:
        TypeError: codes that are not uint8.
        ValueError: a number of codes or scales that does not fit `numel`, scales that nothing
            decodes, a table of another kind, or scales on another device than the codes.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, two a byte; got {codes.dtype}")
    if codes.numel() != (numel + 1) // 2:
        raise ValueError(
            f"codes must have ceil(n / 2) = {(numel + 1) // 2} bytes for n = {numel}; "
            f"got {codes.numel()}"
        )
    if scales.numel() != -(-numel // block_size):
        raise ValueError(
            f"scales must have ceil(n / block) = {-(-numel // block_size)} entries for "
            f"n = {numel}, block = {block_size}; got {scales.numel()}"
        )
    check_table(table)
    _check_nested(scales, nested)
    for t in (scales, *(nested or ())[:2]):  # tables are copied to where they are read
        if t.device != codes.device:
            raise ValueError(
                f"scales must be on {codes.device} with their codes, and so must what decodes "
                f"them; got {t.device}"
            )


def _check_nested(scales: Tensor, nested: tuple[Tensor, Tensor, Tensor] | None) -> None:
    """Refuse scales that nothing decodes, before a kernel reads past their end."""
    if scales.dtype == torch.float32:
        return
    if nested is None:
        raise ValueError(f"scales of {scales.dtype} need nested=(absmax, offset, table) to decode")
    groups = -(-scales.numel() // SCALE_GROUP)
    got = [tuple(t.shape) for t in nested]
    if got != [(groups,), (), (256,)] or any(t.dtype != torch.float32 for t in nested):
        raise ValueError(
            f"nested must be float32 ({groups},), () and (256,) for {scales.numel()} scales; got "
            + ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in nested)
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype}")


def _check_out(out: Tensor, numel: int, dtype: torch.dtype, device: torch.device) -> None:
    fits = out.numel() == numel and out.dtype == dtype and out.device == device
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {numel} elements of {dtype} on {device}; got "
            f"{tuple(out.shape)} of {out.dtype} on {out.device}, strides {out.stride()}"
        )


# --- the operators -------------------------------------------------------------------------------


@torch.library.impl("lora_kernels::dequantize4", "default")
def _dequantize4(codes: Tensor, *args: Any) -> Tensor:
    *weight, numel, dtype = args
    out = torch.empty(numel, dtype=dtype, device=codes.device)
    _expand(codes, *weight, out)
    return out


def _expand(codes: Tensor, scales: Tensor, table: Tensor, *args: Any) -> None:
    absmax, offset, scale_table, block_size, out = args
    nested = None if absmax is None else (absmax, offset, scale_table)
    offered = {
        "reference": _expand_reference,
        "native": _expand_native,
        "triton": _expand_triton,
    }
    run = offered[_backend(codes, block_size)]
    run(codes, scales, table, block_size, nested, out)


@torch.library.impl("lora_kernels::dequantize4_into", "default")
def _dequantize4_into(*args: Any) -> None:
    _expand(*args)
    torch.autograd.graph.increment_version(args[-1])  # what saved `out` has to notice


def _expand_reference(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    reference.dequantize(codes.reshape(-1), scales, table, block_size, nested, out.view(-1))


def _expand_native(*args: Any) -> None:
    from lora_kernels.cpu import blockwise4 as cpu

    cpu.expand(*args)


def _expand_triton(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    from lora_kernels.gpu import blockwise4 as gpu

    wide = _single(out)
    table = table.to(codes.device)
    gpu.expand(codes.reshape(-1), scales, nested, table, block_size, wide.view(-1))
    if wide is not out:
        out.copy_(wide)


@torch.library.impl("lora_kernels::expand4_slice_into", "default")
def _expand4_slice_into(codes: Tensor, scales: Tensor, table: Tensor, *args: Any) -> None:
    *nested, block_size, out_features, in_features, box, out = args
    weight = Weight4(codes, scales, table, out_features, in_features, block_size, *nested)
    offered = {
        "reference": reference.expand_slice,
        "native": _slice_native,
        "triton": _slice_triton,
    }
    run = offered[_backend(codes, block_size)]
    if out.numel():
        run(weight, *box, out)
    torch.autograd.graph.increment_version(out)


def _slice_native(*args: Any) -> None:
    from lora_kernels.cpu import blockwise4 as cpu

    cpu.expand_slice(*args)


def _slice_triton(weight: Weight4, row0: int, row1: int, col0: int, col1: int, out: Tensor) -> None:
    from lora_kernels.gpu import blockwise4 as gpu

    wide = _single(out)
    gpu.expand4_slice(weight, row0, row1, col0, col1, wide.dtype, wide)
    if wide is not out:
        out.copy_(wide)


def _single(out: Tensor) -> Tensor:
    """Where a Triton kernel writes: `out` itself, or float32 on the way to float64."""
    return torch.empty_like(out, dtype=torch.float32) if out.dtype == torch.float64 else out


def _backend(codes: Tensor, block_size: int) -> str:
    """The backend to use; C takes blocks of whole 32 codes, which all that are quantized have."""
    backend = backend_for(codes, BACKENDS)
    return "reference" if backend == "native" and block_size % 32 else backend


def _fake(codes: Tensor, *args: Any) -> Tensor:
    return codes.new_empty(args[-2], dtype=args[-1])


def _fake_into(*args: Any) -> None:
    """Nothing is made."""


torch.library.register_fake("lora_kernels::dequantize4", _fake)
torch.library.register_fake("lora_kernels::dequantize4_into", _fake_into)
torch.library.register_fake("lora_kernels::expand4_slice_into", _fake_into)
