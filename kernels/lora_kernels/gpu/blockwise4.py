"""Expand 4-bit blocks on a GPU.

Expand reads half a byte a weight and writes two: it should run at the speed of a copy, which on an
H200 leaves about 17 instructions a weight. A chain of selects over 16 entries takes 21; reading
the table from memory with a pointer per weight 9 to 12. Here the codes are read as 32-bit words,
eight to a word, and looked up with `tl.gather` in a flat tensor: the compiler keeps the 16 entries
in shared memory, where no two of them lie in one bank, and it takes 7.3. Loads of codes and stores
of weights move 16 bytes a thread. A scale is decoded once, not by every thread that uses it.

Blocks of more than 64 are handled in runs of 64; whole, they took 9.4, as several lanes then decode
the same scale.

A program expands a tile of some rows by some runs of each; a whole weight is one long row, and a
slice of columns takes the same kernel. Where a tile begins is counted in 64 bits, what lies inside
it in 32, which saves two instructions a weight in a slice.

Bit-equal to the definition: a nested scale is rounded twice (`load_scales` says how) and the
product with it is narrowed once. A partial last block, or codes that do not begin at a multiple of
4 bytes, compile a second form (`BYTEWISE`) that reads bytes and masks each element; it takes three
times the instructions and is rare in weights.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch import device_of
from lora_kernels.gpu.decode import load_scales, narrow
from lora_kernels.gpu.variant import Variant
from lora_kernels.operands import Weight4

__all__ = ["expand", "expand4_slice", "variants"]

TILE = 8192  # weights a program
WARPS = 4
MOST_ROWS = 65535  # programs along the second side of a grid; along the first there may be 2^31 - 1
# always 64 bits wide, and a 1 among them is a number like any other
SIZES = ["first", "height", "width", "stride", "numel"]


@triton.jit(do_not_specialize=SIZES)
def _expand_kernel(
    codes_ptr,
    scales_ptr,
    absmax_ptr,
    offset_ptr,
    scale_table_ptr,
    table_ptr,
    out_ptr,
    first: tl.int64,  # run of the weight that out begins with
    height: tl.int64,  # rows of out
    width: tl.int64,  # runs in a row of out
    stride: tl.int64,  # runs from one row of the weight to the next
    numel: tl.int64,  # of the whole weight
    RUN: tl.constexpr,  # weights that are handled together, all with one scale
    RATIO: tl.constexpr,  # runs in a block
    ROWS: tl.constexpr,  # rows a program
    COLUMNS: tl.constexpr,  # runs a program takes of each row
    NESTED: tl.constexpr,
    BYTEWISE: tl.constexpr,
):
    # where the program begins, in 64 bits; from there on 32 are enough
    row = tl.program_id(1).to(tl.int64) * ROWS
    column = tl.program_id(0).to(tl.int64) * COLUMNS
    source = first + row * stride + column  # run of the weight
    target = row * width + column  # run of out
    each = tl.arange(0, ROWS * COLUMNS)
    i, j = each // COLUMNS, each % COLUMNS
    rows_left = tl.minimum(height - row, ROWS).to(tl.int32)
    columns_left = tl.minimum(width - column, COLUMNS).to(tl.int32)
    live = (i < rows_left) & (j < columns_left)  # (runs,)
    from_source = i * stride.to(tl.int32) + j
    from_target = i * width.to(tl.int32) + j
    hidden_zero = (numel >> 62).to(tl.int32)
    scale = load_scales(
        scales_ptr,
        absmax_ptr,
        offset_ptr,
        scale_table_ptr,
        (source + from_source) // RATIO,
        live,
        NESTED,
        hidden_zero,
    )  # (runs,)

    # bits 8k+4 ... 8k+7 of a word hold element 2k, bits 8k ... 8k+3 element 2k+1
    codes_ptr += source * (RUN // 2)
    words = from_source[:, None] * (RUN // 8) + tl.arange(0, RUN // 8)[None, :]
    if BYTEWISE:
        left = (numel + 1) // 2 - source * (RUN // 2)  # bytes that exist from here on
        word = tl.zeros((ROWS * COLUMNS, RUN // 8), tl.uint32)
        for k in tl.static_range(4):
            byte = words * 4 + k
            mask = live[:, None] & (byte < left)
            word |= tl.load(codes_ptr + byte, mask=mask, other=0).to(tl.uint32) << (8 * k)
    else:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.uint32))
        word = tl.load(words_ptr + words, mask=live[:, None], other=0)
    shift = ((tl.arange(0, 8) ^ 1) * 4).to(tl.uint32)
    code = ((word[:, :, None] >> shift[None, None, :]) & 15).to(tl.int32)  # (runs, RUN / 8, 8)
    table = tl.load(table_ptr + tl.arange(0, 16))
    value = tl.gather(table, code.reshape(ROWS * COLUMNS * RUN), 0)
    value = value.reshape(ROWS * COLUMNS, RUN) * scale[:, None]
    element = from_target[:, None] * RUN + tl.arange(0, RUN)[None, :]
    mask = live[:, None]
    if BYTEWISE:
        mask &= element < numel - target * RUN
    out_ptr += target * RUN
    tl.store(out_ptr + element, narrow(value, out_ptr.dtype.element_ty), mask=mask)


def expand(
    codes: Tensor,
    scales: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    table: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """Expand a tensor of any size in one launch.

    Args:
        codes: uint8, flat.
        scales: float32 (blocks,), or uint8 indices.
        nested: absmax, offset and table of uint8 scales.
        table: float32 (16,).
        block_size: elements that share a scale.
        out: contiguous bfloat16, float16 or float32, written.
    """
    runs = triton.cdiv(out.numel(), _run(block_size))
    part = _Slice(0, 1, runs, runs)
    _expand(codes, scales, nested, table, block_size, part, out.numel(), out)


def expand4_slice(
    weight: Weight4,
    row0: int,
    row1: int,
    col0: int,
    col1: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Expand rows `row0 … row1` and columns `col0 … col1` of a weight whose rows are whole blocks.

    Args:
        weight: codes and scales of (N, K), K a multiple of the block size.
        row0: first row.
        row1: one past the last.
        col0: first column, a multiple of the block size.
        col1: one past the last, likewise.
        dtype: bfloat16, float16 or float32.
        out: contiguous, as many elements of `dtype`: written and returned.

    Returns:
        `out`, or a new tensor (row1 - row0, col1 - col0).
    """
    if out is None:
        out = torch.empty((row1 - row0, col1 - col0), dtype=dtype, device=weight.codes.device)
    block, run = weight.block_size, _run(weight.block_size)
    across = weight.in_features // run
    part = _Slice(row0 * across + col0 // run, row1 - row0, (col1 - col0) // run, across)
    numel = weight.out_features * weight.in_features
    codes = weight.codes.view(-1)
    _expand(codes, weight.scales, weight.nested, weight.table, block, part, numel, out)
    return out


def _run(block_size: int) -> int:
    """Weights that are handled together; more than 64 would have several lanes decode a scale."""
    return min(block_size, 64)


class _Slice(NamedTuple):
    """Part of a weight, row by row, counted in runs: blocks, or pieces of 64 weights of a block."""

    first: int
    """run of the weight that it begins with"""
    height: int
    """rows"""
    width: int
    """runs a row"""
    stride: int
    """runs from one row of the weight to the next"""


def _expand(
    codes: Tensor,
    scales: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    table: Tensor,
    block_size: int,
    part: _Slice,
    numel: int,
    out: Tensor,
) -> None:
    """Launch; `numel` is that of the whole weight."""
    if not out.numel():
        return
    if part.width == part.stride:  # whole rows follow each other
        part = _Slice(part.first, 1, part.height * part.width, part.height * part.width)
    is_nested = scales.dtype == torch.uint8
    absmax, offset, scale_table = nested if is_nested and nested else (table, table, table)
    bytewise = numel % block_size != 0 or codes.data_ptr() % 4 != 0
    constants = _expand_constants(block_size, part, is_nested, bytewise)
    rows, columns = constants["ROWS"], constants["COLUMNS"]
    for top in range(0, part.height, rows * MOST_ROWS):
        height = min(part.height - top, rows * MOST_ROWS)
        with device_of(out):
            _expand_kernel[(triton.cdiv(part.width, columns), triton.cdiv(height, rows))](
                codes,
                scales.contiguous(),
                absmax.contiguous(),
                offset,
                scale_table,
                table,
                out.view(-1)[top * part.width * constants["RUN"] :],
                part.first + top * part.stride,
                height,
                part.width,
                part.stride,
                numel,
                **constants,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


@functools.lru_cache(maxsize=4096)
def _expand_constants(
    block_size: int, part: _Slice, nested: bool, bytewise: bool
) -> dict[str, Any]:
    """The tile that a program expands: the widest that leaves at most an eighth of it empty."""
    run = _run(block_size)
    columns = runs = TILE // run
    while part.height > 1 and 8 * triton.cdiv(part.width, columns) * columns > 9 * part.width:
        columns //= 2
    rows = runs // columns
    while rows > 1 and rows * part.stride * run >= 2**31:  # 32 bits inside a tile
        rows //= 2
    constants = {"RUN": run, "RATIO": block_size // run, "ROWS": rows, "COLUMNS": columns}
    return constants | {"NESTED": nested, "BYTEWISE": bytewise}


def variants() -> list[Variant]:
    """What the launchers compile by default: block 64 in every type, and the other paths once."""
    flat, columns = _Slice(0, 1, 1 << 20, 1 << 20), _Slice(0, 4096, 16, 64)
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for nested in (True, False):
            limit = 9.0 if dtype == "bf16" and nested else None
            found.append(_expand_variant(dtype, 64, flat, nested, limit=limit))
    found.append(_expand_variant("bf16", 64, columns, True, limit=9.0))
    for block in (32, 128, 4096):
        found.append(_expand_variant("bf16", block, flat, True, limit=9.0))
    found.append(_expand_variant("bf16", 64, flat, True, bytewise=True))
    return found


def _expand_variant(
    dtype: str,
    block_size: int,
    part: _Slice,
    nested: bool,
    bytewise: bool = False,
    limit: float | None = None,
) -> Variant:
    constants = _expand_constants(block_size, part, nested, bytewise)
    pointers = dict.fromkeys(("absmax_ptr", "offset_ptr", "scale_table_ptr", "table_ptr"), "*fp32")
    sizes = dict.fromkeys(SIZES, "i64")
    words = ["nested" if nested else "float32 scales", *(["slice"] if part.height > 1 else [])]
    return Variant(
        name=f"expand4/{dtype}/{block_size}/{'/'.join(words)}{'/bytewise' if bytewise else ''}",
        kernel=_expand_kernel,
        signature={
            "codes_ptr": "*u8",
            "scales_ptr": "*u8" if nested else "*fp32",
            **pointers,
            "out_ptr": f"*{dtype}",
            **sizes,
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        warps=WARPS,
        fp_fusion=False,
        weights=TILE / (WARPS * 32),
        exact=True,
        odd=frozenset(sizes),
        max_instructions=limit,
    )
