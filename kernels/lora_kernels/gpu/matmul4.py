"""`x Wᵀ` for tens of rows: 4-bit codes decoded inside the product, LoRA in the same launch.

    y (M, N) = x Wᵀ + b,   W[n, k] = table[code[n, k]] * scale[n, k // block], rounded to x's dtype

W is never written. A weight costs the 0.52 bytes it is stored in, where expanding first costs 4.5
(read 0.5, write 2, read 2). What limits such a kernel on a large GPU is not the memory but the
instructions it issues: 4.3 TB/s leave 4 instructions a weight on an H200, so they are what is saved
here. halves4.py says how the codes become the left operand of `tl.dot` in registers. The right
operand is xᵀ, through shared memory, so a program's cost hardly depends on the rows of x up to 64:

    rows of x   instructions a weight, sm_90   sm_80 (PAIRS 2)   registers
    16          3.96 (flat scales 3.77)        4.59              167
    32          4.14                           8.07              191
    64          4.52                           11.1              242

Of the 3.96, 2.6 are the look-up, 0.5 the scaled table, 0.13 `wgmma`, 0.15 scales; x and addresses
are the rest. On sm_80 from 32 rows on Triton splits the warps over the rows of x, and the decoded
weights go through shared memory.

* **Latency.** The loads of a step are issued during the step before and wait in registers. Triton's
  own pipelining would take the codes through shared memory. Two or three programs a multiprocessor
  hide the rest.
* **Splits.** A product with few rows has few tiles, so K is cut; every part writes float32 sums,
  which finish4.py adds in fixed order. One part and no update: the kernel writes y itself.
* **LoRA.** The rows of A are more rows of the weight, in programs of their own: they read float32
  and round to the dtype of x. The tile does not depend on whether there is an update, so B = 0
  changes no bit.

Accuracy: W is rounded once, to what expanding gives, and sums are float32; so is the error that of
a dense product with the weight rounded to 16 bits (ratio 1.00 in bfloat16 and float16).

Known kernels (Marlin, Machete, FLUTE) rearrange the codes beforehand and scale in 16 bits, or
scale the sums of each block. Tried, in instructions a weight on sm_90 with 16 rows: runs of 32
columns 4.9; the loads not ahead of use 3.98 with 146 registers; a tile of 8 rows, which Triton
multiplies by `mma.sync`, 5.8. 128 rows cost 6.1 with runs of 32, and spill on sm_80 to sm_120. A
pre-arranged copy of the codes is not read: stored ones arrive by 128-bit loads already, 4 for 128
weights, and all that remains to be saved is some address arithmetic, less than 3 %.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.finish4 import Update, finish
from lora_kernels.gpu.halves4 import (
    aligned,
    code_words,
    decode,
    dot16,
    left_operand,
    load_codes,
    load_table,
    load_x,
    own_rows,
    pairs,
    parts,
    permute_x,
    run_length,
    scale_parts,
    uses_assembly,
)
from lora_kernels.gpu.matmul4_dx import default_dx_tile, multiply_dx
from lora_kernels.gpu.variant import Variant
from lora_kernels.operands import Weight4

__all__ = ["Tile", "default_dx_tile", "default_tile", "multiply", "multiply_dx", "variants"]

FEATURES, WARPS = 64, 4  # of the default tiles


@dataclass(frozen=True)
class Tile:
    """How the product is cut into programs."""

    rows: int
    """rows of x a program: 16, 32 or 64"""
    features: int
    """rows of W a program: 16 a warp, or a multiple of that"""
    warps: int
    """warps a program"""
    splits: int
    """parts into which K is cut, each in programs of its own"""

    def __post_init__(self) -> None:
        if self.rows not in (16, 32, 64, 128):
            raise ValueError(f"rows must be a power of two from 16 to 128; got {self.rows}")
        if self.features % (16 * self.warps) or self.features & (self.features - 1):
            raise ValueError(
                "features must be a multiple of 16 a warp and a power of two; "
                f"got {self.features} for {self.warps} warps"
            )
        if self.splits < 1:
            raise ValueError(f"splits must be 1 or more; got {self.splits}")


def default_tile(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """The tile where none was measured.

    Args:
        m: rows of x.
        n: rows of W.
        k: columns of both.
        dtype: of x.

    Returns:
        The smallest that takes all rows, and parts enough to occupy a large GPU.
    """
    del dtype  # both cost the same
    rows = 16 if m <= 16 or torch.version.hip is not None else 32 if m <= 32 else 64
    programs = triton.cdiv(n, FEATURES) * triton.cdiv(max(m, 1), rows)
    return Tile(rows, FEATURES, WARPS, parts(programs, triton.cdiv(k, 256), cost=rows / 16))


@triton.jit(do_not_specialize=["m"])
def _multiply(
    x_ptr,  # (M, K)
    codes_ptr,  # (N, K / 8) int32
    scales_ptr,  # (N K / BLOCK,) uint8 or float32
    absmax_ptr,  # (ceil(N K / BLOCK / 256),) float32 or None
    offset_ptr,  # () float32 or None
    scale_table_ptr,  # (256,) float32 or None
    table_ptr,  # (16,) float32
    down_ptr,  # (R, K) float32; not read if R is 0
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N) in the dtype of x, or (S, M, N + R) float32
    m,
    n,
    k,
    r,
    x_stride,
    part,  # columns of W that a split covers, a multiple of 4 RUN
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    row_tiles = tl.cdiv(m, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    tile = tl.program_id(0) // row_tiles
    split = tl.program_id(1)
    begin = tl.multiple_of(split * part, 4 * RUN)
    end = tl.minimum(begin + part, k)
    # rows past the last are computed from the last, and not stored
    x_ptr += tl.minimum(row, m - 1).to(tl.int64)[:, None] * tl.multiple_of(x_stride, 8)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles = tl.cdiv(n, FEATURES)
    if tile < tiles:
        first = tile * FEATURES
        acc = _coded(
            x_ptr,
            codes_ptr,
            scales_ptr,
            absmax_ptr,
            offset_ptr,
            scale_table_ptr,
            table_ptr,
            first,
            n,
            k,
            begin,
            end,
            BLOCK,
            RUN,
            ROWS,
            FEATURES,
            WARPS,
            ASM,
            PAIRS,
            EVEN,
        )
        column = first + tl.arange(0, FEATURES)
        inside = column < n
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            acc += narrow(bias, dtype).to(tl.float32)[:, None]
    else:
        feature = (tile - tiles) * FEATURES + tl.arange(0, FEATURES)
        acc = _dense(x_ptr, down_ptr, feature, r, k, begin, end, ROWS, FEATURES)
        column = n + feature
        inside = feature < r
    width = n + r
    y_ptr += (split * m + row).to(tl.int64)[None, :] * width
    kept = inside[:, None] & (row[None, :] < m)
    tl.store(y_ptr + column[:, None], narrow(acc, y_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _coded(
    x_ptr,
    codes_ptr,
    scales_ptr,
    absmax_ptr,
    offset_ptr,
    scale_table_ptr,
    table_ptr,
    first,
    n,
    k,
    begin,
    end,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    WARPS: tl.constexpr,
    ASM: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows of W from `first` on, times x transposed, over columns `begin` to `end`."""
    NESTED: tl.constexpr = absmax_ptr is not None
    STEP: tl.constexpr = 4 * RUN
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    table = load_table(table_ptr)
    offset = tl.load(offset_ptr) if NESTED else 0.0
    run = tl.arange(0, 4 * FEATURES) % 4 * RUN  # (4 FEATURES,) first column of each run
    # rows past the last are computed from the last row, and not stored
    feature = tl.minimum(first + own_rows(FEATURES, WARPS), n - 1)  # (4 FEATURES,)
    row_words = tl.multiple_of(k // 8, 4)
    at = feature.to(tl.int64) * row_words + run // 8
    words = codes_ptr + at[:, None] + tl.arange(0, 4)[None, :]  # (4 FEATURES, 4)
    x_words = x_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, RUN // 2)[None, :]
    # not contiguous, as far as loads are concerned: each lane is to load its own
    block = tl.max_contiguous(feature * (k // BLOCK) + run // BLOCK, 1)

    there = (begin + run < end) | EVEN
    q = load_codes(words + begin // 8, there, RUN)
    scale, absmax = scale_parts(scales_ptr, absmax_ptr, block + begin // BLOCK, there, NESTED)
    x = load_x(x_words + begin // 2, begin, end, RUN, EVEN)
    acc = tl.zeros((FEATURES, ROWS), tl.float32)
    for start in range(begin, end, STEP):
        w = decode(q, scale, absmax, offset, scale_table_ptr, table, table_ptr, dtype, NESTED, ASM)
        left = left_operand(w, WARPS, PAIRS)
        right = permute_x(x, dtype, PAIRS)
        # the next step's loads are under way while this one's product is computed
        following = start + STEP
        if EVEN:  # after the last step, something that exists
            following = tl.where(following < end, following, begin)
        following = tl.multiple_of(following, STEP)
        there = (following + run < end) | EVEN
        q = load_codes(words + following // 8, there, RUN)
        next_block = block + following // BLOCK
        scale, absmax = scale_parts(scales_ptr, absmax_ptr, next_block, there, NESTED)
        x = load_x(x_words + following // 2, following, end, RUN, EVEN)
        acc = dot16(left, right.trans(), acc)
    return acc


@triton.jit
def _dense(
    x_ptr,
    down_ptr,
    feature,
    r,
    k,
    begin,
    end,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Rows of LoRA's A, rounded to x's dtype, times x transposed."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    down_ptr += feature.to(tl.int64)[:, None] * k
    features_inside = feature[:, None] < r
    acc = tl.zeros((FEATURES, ROWS), tl.float32)
    for start in range(begin, end, 64):
        column = start + tl.arange(0, 64)[None, :]
        inside = column < end
        a = tl.load(down_ptr + column, mask=features_inside & inside, other=0.0)
        x = tl.load(x_ptr + column, mask=inside, other=0.0)
        acc = dot16(narrow(a, dtype), x.trans(), acc)
    return acc


def multiply(
    x: Tensor, weight: Weight4, bias: Tensor | None, update: Update | None, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """`x Wᵀ + bias`, and LoRA's update, without writing W.

    Args:
        x: (M, K), bfloat16 or float16, the last dimension contiguous.
        weight: codes and scales of W (N, K), K a multiple of the block.
        bias: (N,) or None.
        update: the low-rank update, or None.
        tile: how the work is cut.

    Returns:
        y (M, N) in the dtype of x, and with an update `x Aᵀ` (M, r) in float32.
    """
    (m, k), n, x = x.shape, weight.out_features, aligned(x)
    r = 0 if update is None else update.width
    step = 4 * run_length(weight.block_size)
    part = triton.cdiv(triton.cdiv(k, step), tile.splits) * step
    splits = triton.cdiv(k, part)
    whole = splits == 1 and update is None
    shape = (m, n) if whole else (splits, m, n + r)
    y = torch.empty(shape, dtype=x.dtype if whole else torch.float32, device=x.device)
    if m and n:
        tiles = triton.cdiv(n, tile.features) + triton.cdiv(r, tile.features)
        _multiply[(triton.cdiv(m, tile.rows) * tiles, splits)](
            x,
            code_words(weight),
            weight.scales,
            *(weight.nested or (None, None, None)),
            weight.table,
            weight.table if update is None else update.down,
            bias if whole else None,
            y,
            m,
            n,
            k,
            r,
            x.stride(0),
            part,
            BLOCK=weight.block_size,
            RUN=run_length(weight.block_size),
            ROWS=tile.rows,
            FEATURES=tile.features,
            WARPS=tile.warps,
            ASM=uses_assembly(),
            PAIRS=pairs(x.device),
            EVEN=k % step == 0,
            num_warps=tile.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return (y, None) if whole else finish(y, n, bias, update, x.dtype)


def variants() -> list[Variant]:
    """Every form that `multiply` launches with default tiles, for rows of whole steps."""
    both, sizes = ("bf16", "fp16"), (16, 32, 64)
    return [
        *(_variant(d, rows, nested) for d in both for rows in sizes for nested in (True, False)),
        *(_variant(d, rows, whole=True) for d in both for rows in sizes),
        *(_variant("bf16", rows, PAIRS=2) for rows in sizes),
        _variant("bf16", 16, ASM=False),
        *(_variant("bf16", rows, EVEN=False) for rows in (16, 64)),
        _variant("bf16", 16, BLOCK=32, RUN=32),
    ]


def _variant(
    dtype: str, rows: int, nested: bool = True, whole: bool = False, **other: Any
) -> Variant:
    constants: dict[str, Any] = {"BLOCK": 64, "RUN": 64, "ROWS": rows, "FEATURES": FEATURES}
    constants |= {"WARPS": WARPS, "ASM": True, "PAIRS": 1, "EVEN": True} | other
    if not nested:
        constants |= dict.fromkeys(("absmax_ptr", "offset_ptr", "scale_table_ptr"))
    if not whole:
        constants["bias_ptr"] = None
    signature = {"x_ptr": f"*{dtype}", "codes_ptr": "*i32"}
    signature |= {"scales_ptr": "*u8" if nested else "*fp32", "absmax_ptr": "*fp32"}
    signature |= {"offset_ptr": "*fp32", "scale_table_ptr": "*fp32", "table_ptr": "*fp32"}
    signature |= {"down_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
    signature |= {"y_ptr": f"*{dtype}" if whole else "*fp32"}
    signature |= dict.fromkeys(("m", "n", "k", "r", "x_stride", "part"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    said = ["nested" if nested else "flat", "whole" if whole else "parts"]
    said += [f"{name} {value}" for name, value in other.items()]
    best = rows == 16 and constants["ASM"] and not {"EVEN", "PAIRS", "RUN"} & set(other)
    return Variant(
        f"matmul4/{dtype}/{rows} rows/{'/'.join(said)}",
        _multiply,
        signature,
        constants,
        warps=WARPS,
        fp_fusion=False,
        weights=constants["RUN"] * 4 * FEATURES / (32 * WARPS),
        asm=constants["ASM"],
        plain=not constants["ASM"],
        odd=frozenset(("m",)),
        max_instructions=4.5 if best else None,
    )
