"""4-bit blockwise codes: quantize, decode the scales, dequantize.

A tensor is read flat, row-major, in blocks of `block_size`. Each block is divided by its largest
magnitude, the block's scale, and each quotient becomes the index of the nearest of 16 table
entries. Two indices share a byte, the first in the high nibble:

    elements  e0 e1 e2 e3 …            codes  c0 c1 c2 c3 …
    bytes     [c0 << 4 | c1] [c2 << 4 | c3] …           ceil(n / 2) of them
    scales    [max |e0 … e63|] [max |e64 … e127|] …     ceil(n / block_size), float32

`blockwise4_reference.py` holds the definition in plain PyTorch, byte for byte bitsandbytes' on a
CPU. The 16-entry table and the 256-entry table of the scales are arguments; nothing here knows a
data type by name.

On a GPU each of the three operators is one launch, bit-equal to the definition
(`gpu/quantize4.py`, `gpu/blockwise4.py`). None waits for the device, except to tell whether all
values were finite. Whoever quantizes many weights passes a `flag` for each, which the device sets,
and reads them all once at the end.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (equations 1-4).
"""

import math

import torch
from torch import Tensor

from lora_kernels import blockwise4_reference as reference
from lora_kernels.dispatch import backend_for
from lora_kernels.operands import Weight4
from lora_kernels.scales4 import SCALE_GROUP, TINY, check_flag, decode_scales, encode_scales

__all__ = [
    "SCALE_GROUP",
    "Weight4",
    "decode_scales",
    "dequantize4",
    "encode_scales",
    "expand4",
    "expand4_slice",
    "quantize4",
]

BACKENDS = ("reference", "triton")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def quantize4(
    x: Tensor,
    table: Tensor,
    block_size: int,
    name: str = "tensor",
    *,
    check_finite: bool = True,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize to 4-bit codes with one float32 scale a block.

    `scale_b = max_{i in b} |x_i|`, `code_i = argmin_c |x_i / scale_b - table_c|`.

    Args:
        x: any shape and layout, float16, bfloat16, float32 or float64 (rounded to float32 first).
        table: float32 (16,), in the order of the codes; of equal entries the first is used.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        name: what `x` is called in messages.
        check_finite: wait for the result and refuse what is not finite.
        flag: int32 (1,) on the device of `x`, set to 1 if a value is not finite; then nothing is
            waited for and `check_finite` has no say.

    Returns:
        codes uint8 (ceil(n / 2),) and scales float32 (ceil(n / block_size),). The low nibble that
        an odd n leaves over holds the code of 0. Codes of a block that is not finite mean nothing.

    Raises:
        TypeError: `x` is not floating-point.
        ValueError: NaN or infinity in `x`, no data (meta), or a bad block size, table or flag.
    """
    check_block_size(block_size)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values to quantize")
    _check_table(table)
    check_flag(flag, x)
    run = {"reference": reference.quantize, "triton": _quantize4_triton}[backend_for(x, BACKENDS)]
    with torch.no_grad():
        x = x.detach()
        found = flag
        if found is None and check_finite:
            found = torch.zeros(1, dtype=torch.int32, device=x.device)
        codes, scales = run(x, table, block_size, found)
        if flag is None and found is not None and bool(found):
            raise ValueError(reference.describe_non_finite(x, name))
    return codes, scales


def _quantize4_triton(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lora_kernels.gpu import quantize4 as gpu

    return gpu.quantize(x, *_ranks(table.to(x.device)), block_size, TINY, flag)


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
        TypeError: `dtype` is not floating-point.
        ValueError: too many or too few codes or scales for `numel`, uint8 scales without `nested`,
            or a table or an `out` of another kind.
    """
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
    _check_table(table)
    _check_nested(scales, nested)
    out = _place(out, (numel,), dtype, codes.device)
    offered = {"reference": reference.dequantize, "triton": _dequantize4_triton}
    run = offered[backend_for(codes, BACKENDS)]
    with torch.no_grad():
        run(codes.reshape(-1), scales, table, block_size, nested, out.view(-1))
    return out


def _dequantize4_triton(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    from lora_kernels.gpu import blockwise4 as gpu

    wide = _single(out)
    gpu.expand(codes, scales, nested, table.to(codes.device), block_size, wide)
    if wide is not out:
        out.copy_(wide)


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
        TypeError: `dtype` is not floating-point.
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
    _check_table(weight.table)
    _check_nested(weight.scales, weight.nested)
    out = _place(out, (row1 - row0, col1 - col0), dtype, weight.codes.device)
    offered = {"reference": reference.expand_slice, "triton": _expand4_slice_triton}
    run = offered[backend_for(weight.codes, BACKENDS)]
    if out.numel():
        with torch.no_grad():
            run(weight, row0, row1, col0, col1, out)
    return out


def _expand4_slice_triton(
    weight: Weight4, row0: int, row1: int, col0: int, col1: int, out: Tensor
) -> None:
    from lora_kernels.gpu import blockwise4 as gpu

    wide = _single(out)
    gpu.expand4_slice(weight, row0, row1, col0, col1, wide.dtype, wide)
    if wide is not out:
        out.copy_(wide)


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is not a power of two from 32 to 4096.

    Raises:
        ValueError: with the value.
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"block_size must be a power of two from 32 to 4096; got {block_size!r}")


def _check_table(table: Tensor) -> None:
    if table.shape != (16,) or table.dtype != torch.float32:
        raise ValueError(
            f"the code table must be float32 (16,); got {table.dtype} {tuple(table.shape)}"
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


def _place(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A new tensor, or the caller's if it is what the result needs."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64; got {dtype}")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    fits = out.numel() == math.prod(shape) and out.dtype == dtype and out.device == device
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, {math.prod(shape)} elements of {dtype} on {device}; got "
            f"{tuple(out.shape)} of {out.dtype} on {out.device}, strides {out.stride()}"
        )
    return out


def _single(out: Tensor) -> Tensor:
    """Where a kernel writes what goes to `out`: itself, or float32 on the way to float64."""
    return torch.empty_like(out, dtype=torch.float32) if out.dtype == torch.float64 else out


def _ranks(table: Tensor) -> tuple[Tensor, Tensor]:
    """What turns a number of midpoints into a code, without a look at the values on the host.

    Returns:
        The 15 midpoints of the sorted table and infinity, float32 (16,); the code of each rank,
        int32 (16,). Equal entries have a midpoint between them too, and the first one's code on
        both sides of it.
    """
    values, order = table.sort(stable=True)
    middle = torch.nn.functional.pad((values[:-1] + values[1:]) / 2, (0, 1), value=math.inf)
    rank = torch.arange(16, device=table.device)
    first = rank.masked_fill(torch.nn.functional.pad(values[1:] == values[:-1], (1, 0)), 0)
    return middle, order[first.cummax(0).values].to(torch.int32)
