"""The end of a split multiply: sum the slices, add bias and LoRA's update, round once.

A product with few rows has too few tiles to fill a GPU, so K is cut into S slices and every
(tile, slice) writes a float32 partial. LoRA's A is r more columns of the same product, so x is read
once and x A^T comes out of the same partials:

    partials (S, M, N + L r)    [ x W^T | x A_0^T | ... | x A_(L-1)^T ], each column summed over S
    h (M, r)                    the sum of the r columns of the row's own adapter, 0 without one
    y (M, N)                    round(sum + bias - (0 - s h B^T))

One launch. Each program owns a tile of y, adds its slices from the first to the last and computes
the h of its rows anew, which reads r columns beside the tile's 64 or 128. Usual split-K adds into
the output by floating-point atomics, which need a zeroed output, round in no fixed order, and leave
no place for an epilogue; here the same inputs give the same bits. The price is the partials:
8 S M (N + L r) bytes written and read, small for the few rows this is for.

h B^T is float32 multiply-adds, not a tensor-core product: 2 M N r operations are nothing beside the
memory traffic, any r will do, and h is not rounded on the way. Rows of a tile with several adapters
are handled one adapter at a time and each row takes its own result alone, so a row of the output
does not depend on what else is in the batch.

The order of operations makes B = 0 the same bits as no update. The slices' sum starts from the
first slice and not from zero, the bias is added before, and 0 - update is +0 for an update of
either zero, which leaves a -0 of the sum as it is. A multiply that finishes by itself when S = 1
and there is no update has to do the same: sum, then bias in y's dtype, then one rounding, without
contraction of a scaling before it and the bias (enable_fp_fusion=False).

Nor may the product here be contracted. Lanes add up h B^T in pairs, each its own term and its
partner's: with a fused multiply-add each would round only the other's, the two would differ in the
last bit, and which of them is stored would be a race.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.variant import Variant

__all__ = ["Update", "finish", "variants"]

RANKS = 16  # columns of h handled at a time


class Update(NamedTuple):
    """LoRA's part of a product, y += s (x A^T) B^T, by one adapter or by each row's own of L.

    Attributes:
        down: A, (L, r, K) float32, contiguous.
        up: B, (L, N, r) float32, contiguous.
        scaling: s, (L,) float32.
        rows: int32 (M,), the adapter of each row of x or -1 for none; None: all rows the only one.
    """

    down: Tensor
    up: Tensor
    scaling: Tensor
    rows: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[1]

    @property
    def width(self) -> int:
        """L r, the columns that the update adds to the partials."""
        return self.down.shape[0] * self.down.shape[1]


class _Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


TILES = (_Tile(1, 128, 4), _Tile(8, 64, 4))


def _tile(m: int) -> _Tile:
    """One row a program as long as that is the only one, else 8, which share their reads of B."""
    return TILES[0] if m == 1 else TILES[1]


@triton.jit(do_not_specialize=["slices", "m", "adapters"])
def _finish_kernel(
    partials_ptr,  # (S, M, N + L r) float32
    bias_ptr,  # (N,) or None
    up_ptr,  # (L, N, r) float32 or None
    scaling_ptr,  # (L,) float32 or None
    rows_ptr,  # (M,) int32 or None
    h_ptr,  # (M, r) float32 or None
    y_ptr,  # (M, N)
    slices,
    m,
    n,
    r,
    adapters,
    slice_stride,
    row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    tiles = tl.cdiv(n, COLUMNS)
    first_row = tl.program_id(0) // tiles * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    i = first_row + tl.arange(0, ROWS)  # (ROWS,)
    j = first_column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    in_rows, in_columns = i < m, j < n
    lines = partials_ptr + i.to(tl.int64)[:, None] * row_stride  # (ROWS, 1)
    inside = in_rows[:, None] & in_columns[None, :]
    y = _sum_slices(lines + j[None, :], slices, slice_stride, inside)  # (ROWS, COLUMNS)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + j, mask=in_columns, other=0.0).to(tl.float32)
        y += narrow(bias, dtype).to(tl.float32)[None, :]
    if up_ptr is not None:
        if rows_ptr is None:
            own = tl.where(in_rows, 0, -1)  # (ROWS,)
        else:
            own = tl.load(rows_ptr + i, mask=in_rows, other=-1)
            own = tl.where(own < adapters, own, -1)
        lowest = tl.min(tl.where(own >= 0, own, adapters), 0)
        highest = tl.max(own, 0)
        update = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, r, RANKS):
            k = start + tl.arange(0, RANKS)  # (RANKS,)
            mine = (own >= 0)[:, None] & (k < r)[None, :]
            at = n + own.to(tl.int64)[:, None] * r + k[None, :]
            h = _sum_slices(lines + at, slices, slice_stride, mine)  # (ROWS, RANKS)
            if first_column == 0:
                kept = in_rows[:, None] & (k < r)[None, :]
                tl.store(h_ptr + i.to(tl.int64)[:, None] * r + k[None, :], h, mask=kept)
            some = in_columns[:, None] & (k < r)[None, :]
            line = up_ptr + j.to(tl.int64)[:, None] * r + k[None, :]  # (COLUMNS, RANKS)
            if rows_ptr is None:
                update += _up(h, line, some, scaling_ptr)
            else:
                for adapter in range(lowest, highest + 1):
                    chosen = own == adapter
                    if tl.max(chosen.to(tl.int32), 0) > 0:
                        there = line + tl.cast(adapter, tl.int64) * n * r
                        part = _up(h, there, some, scaling_ptr + adapter)
                        # selected, as 0 times infinity of another row's adapter would be NaN
                        update += tl.where(chosen[:, None], part, 0.0)
        y = y - (0.0 - update)
    tl.store(y_ptr + i.to(tl.int64)[:, None] * n + j[None, :], narrow(y, dtype), mask=inside)


@triton.jit
def _sum_slices(at, slices, slice_stride, mask):
    """Add what lies at `at` in every slice, from the first to the last."""
    total = tl.load(at, mask=mask, other=0.0)
    for _ in range(1, slices):
        at += slice_stride
        total += tl.load(at, mask=mask, other=0.0)
    return total


@triton.jit
def _up(h, at, mask, scaling_ptr):
    """s h B^T of one adapter, (ROWS, COLUMNS), for some of its ranks."""
    up = tl.load(at, mask=mask, other=0.0)  # (COLUMNS, RANKS)
    return tl.sum(h[:, None, :] * up[None, :, :], 2) * tl.load(scaling_ptr)


def finish(
    partials: Tensor,
    out_features: int,
    bias: Tensor | None,
    update: Update | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Sum the slices of a product, add bias and update, and round once.

    Args:
        partials: float32 (S, M, N + L r), S at least 1, the last dimension contiguous.
        out_features: N.
        bias: (N,) or None; rounded to `dtype` first.
        update: LoRA, whose x A^T of every adapter are the last L r columns; None: there are none.
        dtype: of y.

    Returns:
        y (M, N) in `dtype`, and h (M, r) float32 or None without an update.
    """
    slices, m, _ = partials.shape
    y = torch.empty((m, out_features), dtype=dtype, device=partials.device)
    up = scaling = rows = h = None
    r = adapters = 0
    if update is not None:
        adapters, r, up = update.up.shape[0], update.rank, update.up.contiguous()
        scaling, rows = update.scaling, update.rows
        h = torch.empty((m, r), dtype=torch.float32, device=partials.device)
    if m == 0 or out_features == 0:
        return y, h
    tile = _tile(m)
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(out_features, tile.columns),)
    _finish_kernel[grid](
        partials,
        bias,
        up,
        scaling,
        rows,
        h,
        y,
        slices,
        m,
        out_features,
        r,
        adapters,
        partials.stride(0),
        partials.stride(1),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        RANKS=RANKS,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
    return y, h


def variants() -> list[Variant]:
    """Every form that `finish` launches: dtype, bias, and no update, one adapter or many."""
    return [
        _variant(tile, dtype, bias, update)
        for tile in TILES
        for dtype in ("bf16", "fp16")
        for bias in (False, True)
        for update in ("none", "one", "rows")
    ]


def _variant(tile: _Tile, dtype: str, bias: bool, update: str) -> Variant:
    signature = {"partials_ptr": "*fp32", "bias_ptr": f"*{dtype}", "up_ptr": "*fp32"}
    signature |= {"scaling_ptr": "*fp32", "rows_ptr": "*i32", "h_ptr": "*fp32"}
    signature |= {"y_ptr": f"*{dtype}", "slices": "i32", "m": "i32", "n": "i32", "r": "i32"}
    signature |= {"adapters": "i32", "slice_stride": "i32", "row_stride": "i32"}
    absent = [] if bias else ["bias_ptr"]
    if update != "rows":
        absent.append("rows_ptr")
    if update == "none":
        absent += ["up_ptr", "scaling_ptr", "h_ptr"]
    constants: dict[str, Any] = dict.fromkeys(absent)
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANKS": RANKS}
    signature |= dict.fromkeys(constants, "constexpr")
    name = f"finish4/{dtype}/{tile.rows} rows/{'bias' if bias else 'no bias'}/update {update}"
    return Variant(
        name,
        _finish_kernel,
        signature,
        constants,
        warps=tile.warps,
        fp_fusion=False,
        odd=frozenset(("slices", "m", "adapters")),
    )
