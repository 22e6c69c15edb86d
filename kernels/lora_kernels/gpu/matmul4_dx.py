"""`dy W` for tens of rows: 4-bit codes decoded inside the product.

    dx (M, K) = dy W,   dx[m, k] = sum over n of dy[m, n] W[n, k]

The sum runs over the rows of W, and a scale belongs to 64 columns of one row, so it cannot be
applied to a finished sum. It is applied to the table, as in the product with Wᵀ (halves4.py): W is
decoded to the bits that expanding gives, and the error is that of a dense product.

Tensor cores want both operands with neighbours in n side by side, and the stored codes have
neighbours in k. So the decoded tile passes through shared memory once: a 128-bit store and a
transposing load (LDSM) for 8 weights, 0.25 instructions a weight. Doing it in registers would take
one more PRMT for 2 weights, 0.5. As in the product with Wᵀ, W is the left operand:

    rows of dy   instructions a weight, sm_90   sm_80   registers
    16           4.20 (flat scales 4.06)        5.6     128
    32           4.31                           7.4     128
    64           4.50                           10.4    203

With dy on the left, 16 rows cost 5.4, as `wgmma` has no fewer than 64 and Triton takes `mma.sync`,
and 64 rows 4.4; Triton 3.6 fails to compile those.

A program has 256 columns and a part of the rows of W; parts write float32 sums that finish4.py adds
in fixed order. Loads run one step ahead, as in the product with Wᵀ. Blocks of 32 columns cost twice
as much: they are correct, not fast.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.finish4 import finish
from lora_kernels.gpu.halves4 import (
    aligned,
    code_words,
    decode,
    dot16,
    in_order,
    load_codes,
    load_table,
    parts,
    run_length,
    scale_parts,
    uses_assembly,
)
from lora_kernels.gpu.variant import Variant
from lora_kernels.operands import Weight4

__all__ = ["DxTile", "default_dx_tile", "multiply_dx", "variants"]


@dataclass(frozen=True)
class DxTile:
    """How the product is cut into programs; each has 4 runs of columns, 256."""

    rows: int
    """rows of dy a program: 16, 32 or 64"""
    features: int
    """rows of W a step of its loop"""
    warps: int
    """warps a program"""
    splits: int
    """parts into which N is cut, each in programs of its own"""

    def __post_init__(self) -> None:
        for name in ("rows", "features"):
            if getattr(self, name) not in (16, 32, 64, 128):
                raise ValueError(
                    f"{name} must be a power of two from 16 to 128; got {getattr(self, name)}"
                )
        if self.splits < 1:
            raise ValueError(f"splits must be 1 or more; got {self.splits}")


TILES = (DxTile(16, 32, 4, 1), DxTile(32, 64, 8, 1), DxTile(64, 64, 8, 1))
HIP_TILES = TILES[:1]  # by registers


def default_dx_tile(m: int, n: int, k: int, dtype: torch.dtype) -> DxTile:
    """The tile where none was measured.

    Args:
        m: rows of dy.
        n: rows of W.
        k: columns of W.
        dtype: of dy.

    Returns:
        The smallest that takes all rows, and parts enough to occupy a large GPU.
    """
    del dtype  # both cost the same
    tiles = TILES if torch.version.hip is None else HIP_TILES
    tile = next((tile for tile in tiles if m <= tile.rows), tiles[-1])
    programs = triton.cdiv(k, 256) * triton.cdiv(max(m, 1), tile.rows)
    steps = triton.cdiv(n, tile.features)
    cost = 16 * tile.rows / tile.features  # 256 sums a row to write and read, codes of a step
    return replace(tile, splits=parts(programs, steps, cost))


@triton.jit(do_not_specialize=["m"])
def _multiply_dx(
    dy_ptr,  # (M, N)
    codes_ptr,  # (N, K / 8) int32
    scales_ptr,  # (N K / BLOCK,) uint8 or float32
    absmax_ptr,  # (ceil(N K / BLOCK / 256),) float32 or None
    offset_ptr,  # () float32 or None
    scale_table_ptr,  # (256,) float32 or None
    table_ptr,  # (16,) float32
    dx_ptr,  # (M, K) in the dtype of dy, or (S, M, K) float32
    m,
    n,
    k,
    dy_stride,
    part,  # rows of W that a split covers, a multiple of FEATURES
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    ASM: tl.constexpr,
):
    NESTED: tl.constexpr = absmax_ptr is not None
    COLUMNS: tl.constexpr = 4 * RUN
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    row_tiles = tl.cdiv(m, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    first = tl.program_id(0) // row_tiles * COLUMNS
    split = tl.program_id(1)
    begin = tl.multiple_of(split * part, FEATURES)
    end = tl.minimum(begin + part, n)

    table = load_table(table_ptr)
    offset = tl.load(offset_ptr) if NESTED else 0.0
    # rows and columns past the last are computed from the last, and not stored
    dy_ptr += tl.minimum(row, m - 1).to(tl.int64)[:, None] * tl.multiple_of(dy_stride, 8)
    i = tl.arange(0, 4 * FEATURES)
    run = tl.minimum(first + i % 4 * RUN, k - RUN)  # (4 FEATURES,) first column of each run
    words = codes_ptr + tl.multiple_of(run // 8, 4)[:, None] + tl.arange(0, 4)[None, :]
    row_words = tl.multiple_of(k // 8, 4)
    there = tl.full((4 * FEATURES,), True, tl.int1)
    step = tl.arange(0, FEATURES)

    feature = tl.minimum(begin + i // 4, n - 1)  # (4 FEATURES,)
    q = load_codes(words + (feature.to(tl.int64) * row_words)[:, None], there, RUN)
    # not contiguous, as far as loads are concerned: each lane is to load its own
    block = tl.max_contiguous(feature * (k // BLOCK) + run // BLOCK, 1)
    scale, absmax = scale_parts(scales_ptr, absmax_ptr, block, there, NESTED)
    column = begin + step[None, :]
    dy = tl.load(dy_ptr + column, mask=column < end, other=0.0)
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(begin, end, FEATURES):
        w = decode(q, scale, absmax, offset, scale_table_ptr, table, table_ptr, dtype, NESTED, ASM)
        right = dy
        # the next step's loads are under way while this one's product is computed
        feature = tl.minimum(start + FEATURES + i // 4, n - 1)
        q = load_codes(words + (feature.to(tl.int64) * row_words)[:, None], there, RUN)
        block = tl.max_contiguous(feature * (k // BLOCK) + run // BLOCK, 1)
        scale, absmax = scale_parts(scales_ptr, absmax_ptr, block, there, NESTED)
        column = start + FEATURES + step[None, :]
        dy = tl.load(dy_ptr + column, mask=column < end, other=0.0)
        acc = dot16(in_order(w).trans(), right.trans(), acc)
    to = (split * m + row).to(tl.int64)[None, :] * k
    column = first + tl.arange(0, COLUMNS)[:, None]
    kept = (column < k) & (row[None, :] < m)
    tl.store(dx_ptr + to + column, narrow(acc, dx_ptr.dtype.element_ty), mask=kept)


def multiply_dx(dy: Tensor, weight: Weight4, tile: DxTile) -> Tensor:
    """`dy W` without writing W.

    Args:
        dy: (M, N), bfloat16 or float16, the last dimension contiguous.
        weight: codes and scales of W (N, K), K a multiple of the block.
        tile: how the work is cut.

    Returns:
        (M, K) in the dtype of dy.
    """
    (m, n), k, dy = dy.shape, weight.in_features, aligned(dy)
    run = run_length(weight.block_size)
    part = triton.cdiv(triton.cdiv(n, tile.features), tile.splits) * tile.features
    splits = triton.cdiv(n, part)
    whole = splits == 1
    shape = (m, k) if whole else (splits, m, k)
    dx = torch.empty(shape, dtype=dy.dtype if whole else torch.float32, device=dy.device)
    if m:
        _multiply_dx[(triton.cdiv(m, tile.rows) * triton.cdiv(k, 4 * run), splits)](
            dy,
            code_words(weight),
            weight.scales,
            *(weight.nested or (None, None, None)),
            weight.table,
            dx,
            m,
            n,
            k,
            dy.stride(0),
            part,
            BLOCK=weight.block_size,
            RUN=run,
            ROWS=tile.rows,
            FEATURES=tile.features,
            ASM=uses_assembly(),
            num_warps=tile.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return dx if whole else finish(dx, k, None, None, dy.dtype)[0]


def variants() -> list[Variant]:
    """Every form that `multiply_dx` launches with default tiles."""
    both = ("bf16", "fp16")
    return [
        *(_variant(d, tile, nested) for d in both for tile in TILES for nested in (True, False)),
        *(_variant(d, tile, whole=True) for d in both for tile in TILES),
        *(_variant("bf16", tile, ASM=False) for tile in HIP_TILES),
        _variant("bf16", TILES[0], BLOCK=32, RUN=32),
    ]


def _variant(
    dtype: str, tile: DxTile, nested: bool = True, whole: bool = False, **other: Any
) -> Variant:
    constants: dict[str, Any] = {"BLOCK": 64, "RUN": 64, "ROWS": tile.rows}
    constants |= {"FEATURES": tile.features, "ASM": True} | other
    if not nested:
        constants |= dict.fromkeys(("absmax_ptr", "offset_ptr", "scale_table_ptr"))
    signature = {"dy_ptr": f"*{dtype}", "codes_ptr": "*i32"}
    signature |= {"scales_ptr": "*u8" if nested else "*fp32", "absmax_ptr": "*fp32"}
    signature |= {"offset_ptr": "*fp32", "scale_table_ptr": "*fp32", "table_ptr": "*fp32"}
    signature |= {"dx_ptr": f"*{dtype}" if whole else "*fp32"}
    signature |= dict.fromkeys(("m", "n", "k", "dy_stride", "part"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    said = ["nested" if nested else "flat", "whole" if whole else "parts"]
    said += [f"{name} {value}" for name, value in other.items()]
    return Variant(
        f"matmul4_dx/{dtype}/{tile.rows} rows/{'/'.join(said)}",
        _multiply_dx,
        signature,
        constants,
        warps=tile.warps,
        fp_fusion=False,
        weights=constants["RUN"] * 4 * tile.features / (32 * tile.warps),
        asm=constants["ASM"],
        plain=not constants["ASM"],
        odd=frozenset(("m",)),
        max_instructions=4.5 if constants["ASM"] and not other else None,
    )
