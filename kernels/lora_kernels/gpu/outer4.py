"""The gradient of each adapter's matrix: `outer`, the third kernel of LoRA beside many rows.

    outer    G_l = s_l sum u_i^T D(v_i)    (M, r) x (M, D) -> (L, r, D)    dA, and dB transposed

It sums over the rows i of adapter l, in SPLIT pieces that another launch adds in their order: no
atomics, so that the same inputs give the same bits. Each piece reads its rows of v once. What holds
for the other two kernels (lora4.py), mixed batches, dropout and precision, holds here.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.dropout import kept
from lora_kernels.gpu.lora_rows import Dropout, Tile, fit, options, own_rows, parts, scaled
from lora_kernels.gpu.split import split_dot
from lora_kernels.gpu.variant import Variant

__all__ = ["outer", "variants"]

# for up to 16 ranks, and for more, 32 at a time; wider matrices would not fit the registers
OUTER = (Tile(32, 64, 16, 4, 3), Tile(32, 64, 32, 4, 3))
SPLIT = 1024  # rows that one program of `outer` sums


@triton.jit(do_not_specialize=["m", "adapters", "splits", "threshold"])
def _outer_kernel(
    u_ptr,  # (M, r) float32
    v_ptr,  # (M, D)
    scaling_ptr,  # (L,) float32 or None
    rows_ptr,  # (M,) int32 or None
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (splits, L, r, D) float32, the last two by strides
    m,
    d,
    r,
    adapters,
    splits,
    threshold,
    v_stride,
    r_stride,
    d_stride,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    tiles = tl.cdiv(d, COLUMNS)
    column = tl.program_id(0) % tiles * COLUMNS
    j = column + tl.arange(0, COLUMNS)  # (COLUMNS,)
    k = tl.program_id(0) // tiles * RANKS + tl.arange(0, RANKS)  # (RANKS,)
    split, adapter = tl.program_id(1) // adapters, tl.program_id(1) % adapters
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    first = split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, m), ROWS):
        i = start + tl.arange(0, ROWS)  # (ROWS,)
        if rows_ptr is None:
            v = _rows_of(v_ptr, seed_ptr, threshold, i, i < m, column, d, v_stride, COLUMNS)
            total = split_dot(_ranks_of(u_ptr, i, i < m, k, r), v, total)
        else:
            chosen = own_rows(rows_ptr, i, m, adapters) == adapter
            if tl.max(chosen.to(tl.int32), 0) > 0:
                v = _rows_of(v_ptr, seed_ptr, threshold, i, chosen, column, d, v_stride, COLUMNS)
                total = split_dot(_ranks_of(u_ptr, i, chosen, k, r), v, total)
    total = scaled(total, scaling_ptr, adapter)
    at = out_ptr + tl.program_id(1).to(tl.int64) * r * d
    at += k.to(tl.int64)[:, None] * r_stride + j.to(tl.int64)[None, :] * d_stride
    tl.store(at, total, mask=(k < r)[:, None] & (j < d)[None, :])


@triton.jit
def _ranks_of(u_ptr, i, chosen, k, r):
    """u^T of the chosen rows, (RANKS, ROWS)."""
    u_at = u_ptr + i.to(tl.int64)[None, :] * r + k[:, None]
    return tl.load(u_at, mask=chosen[None, :] & (k < r)[:, None], other=0.0)


@triton.jit
def _rows_of(v_ptr, seed_ptr, threshold, i, chosen, first, d, v_stride, COLUMNS: tl.constexpr):
    """v of the chosen rows after dropout, (ROWS, COLUMNS)."""
    j = first + tl.arange(0, COLUMNS)  # (COLUMNS,)
    v_at = v_ptr + i.to(tl.int64)[:, None] * v_stride + j[None, :]
    v = tl.load(v_at, mask=chosen[:, None] & (j < d)[None, :], other=0.0)
    if seed_ptr is not None:
        v = tl.where(kept(seed_ptr, i, first, threshold, COLUMNS), v, 0.0)
    return v


def outer(
    u: Tensor,
    v: Tensor,
    rows: Tensor | None,
    adapters: int,
    scaling: Tensor | None = None,
    dropout: Dropout | None = None,
    transposed: bool = False,
) -> Tensor:
    """The gradient of each adapter's matrix: `G_l = s_l sum of u_i^T D(v_i) over its rows`.

    Args:
        u: (M, r) float32, contiguous.
        v: (M, D), 16-bit.
        rows: as in `shrink`.
        adapters: L, 1 if `rows` is None.
        scaling: as in `shrink`.
        dropout: what of v is taken as 0, or None.
        transposed: lay the result out as (L, D, r).

    Returns:
        (L, r, D) float32, or (L, D, r) if transposed; 0 for an adapter without rows.
    """
    (m, r), d = u.shape, v.shape[1]
    v = v if v.stride(1) == 1 else v.contiguous()
    tile, splits = fit(OUTER, r), max(1, triton.cdiv(m, SPLIT))
    shape, strides = ((d, r), (1, r)) if transposed else ((r, d), (d, 1))
    out = torch.empty((splits, adapters, *shape), dtype=torch.float32, device=u.device)
    if out.numel() == 0:
        return out[0]
    seed, threshold = parts(dropout)
    grid = (triton.cdiv(d, tile.columns) * triton.cdiv(r, tile.ranks), splits * adapters)
    sizes = (m, d, r, adapters, splits, threshold, v.stride(0), *strides)
    tensors = (u, v, scaling, rows, seed, out)
    _outer_kernel[grid](*tensors, *sizes, SPLIT=SPLIT, **options(tile))
    return out[0] if splits == 1 else out.sum(0)


# scaled, the axis along which the result is stored, whether v is dropped: dA, dA and dB
_LAUNCHED = ((False, "d", False), (False, "d", True), (True, "r", False))


def variants() -> list[Variant]:
    """Every form that is launched: what `_LAUNCHED` has, dtype, ranks a tile, one adapter or many.

    Triton makes a stride of 1 a constant, so the axis along which a matrix is stored is a form too.
    """
    return [
        _variant(*launched, dtype, rank, rows)
        for launched in _LAUNCHED
        for dtype in ("bf16", "fp16")
        for rank in (16, 32)
        for rows in (False, True)
    ]


def _variant(scaled: bool, axis: str, drops: bool, dtype: str, rank: int, rows: bool) -> Variant:
    tile = fit(OUTER, rank)
    types = {"rows_ptr": "*i32", "seed_ptr": "*i64", "v_ptr": f"*{dtype}"}
    signature = {
        name: types.get(name, "*fp32") if name.endswith("_ptr") else "i32"
        for name in _outer_kernel.arg_names
    }
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANKS": tile.ranks}
    constants |= {f"{axis}_stride": 1, "SPLIT": SPLIT}
    present = {"rows_ptr": rows, "scaling_ptr": scaled, "seed_ptr": drops}
    constants |= dict.fromkeys(name for name, here in present.items() if not here)
    signature |= dict.fromkeys(constants, "constexpr")
    what = f"outer {'dropped ' if drops else ''}along {axis}"
    return Variant(
        f"lora4/{what}/{dtype}/r {rank}/{'rows' if rows else 'one'}",
        _outer_kernel,
        signature,
        constants,
        warps=tile.warps,
        stages=tile.stages,
        odd=frozenset(("m", "adapters", "splits", "threshold", "seed_ptr")) & frozenset(signature),
    )
