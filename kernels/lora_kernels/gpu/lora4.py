"""LoRA beside a product with many rows, where each row of x may have its own adapter.

With many rows the base product is the vendor's on an expanded W, so the update is three kernels of
its own. For adapter l = rows[i] of row i, and D either K or N:

    shrink   h_i = s_l x_i M_l^T        (M, D) x (L, r, D) -> (M, r)      x A^T, and dy B for dh
    add      y_i = y_i + s_l h_i M_l^T  (M, r) x (L, D, r) -> (M, D)      h B^T, and dh A for dx
    outer    G_l = s_l sum u_i^T v_i    (M, r) x (M, D) -> (L, r, D)      dA, and dB (outer4.py)

M_l is read by strides, so A serves `shrink` and `add`, and so does B. Each kernel is bound by
memory: it moves the (M, D) tensor once, 2 M D bytes (4 for `add`), against 2 M D r operations.

Mixed batches. A tile of rows runs through the adapters between the lowest and the highest index in
it and skips those that none of its rows has; the result is selected row by row. Usual grouped
kernels (S-LoRA's, Punica's) sort the rows first. A batch in which every sequence names its adapter
needs no sorting, as a tile seldom meets two of them, and a sort is several launches a layer and
direction. Nothing depends on values that only the device knows: no host round trip, a grid fixed by
the shapes, so that a CUDA graph can capture it. The price is paid when neighbouring rows alternate
between many adapters: a tile is then computed once for each of them, from the cache. Rows with
-1, and any beyond the adapters there are, get no update.

Dropout. Each kernel that reads x, and the one that writes dx, draws the mask of its tile again
(dropout.py): `shrink` and `outer` take zeros for what is dropped, `add` leaves it as it was.
Nothing is stored, and x is not copied. The mask is the batch's, whichever adapters its rows name.

Precision. h, A and B are float32 and are multiplied as pairs of bfloat16 (split.py).

`add` keeps a -0 of y under an update of zero, as finish4 does.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.dropout import kept
from lora_kernels.gpu.lora_rows import Dropout, Tile, bounds, fit, options, own_rows, parts, scaled
from lora_kernels.gpu.split import split_dot
from lora_kernels.gpu.variant import Variant

__all__ = ["add", "expand", "shrink", "variants"]


# for up to 16 ranks, and for more, 32 at a time; wider matrices would not fit the registers
SHRINK = (Tile(16, 64, 16, 4, 3), Tile(16, 64, 32, 2, 3))
ADD = (Tile(64, 64, 16, 4, 1), Tile(64, 64, 32, 4, 1))


@triton.jit(do_not_specialize=["m", "adapters", "threshold"])
def _shrink_kernel(
    x_ptr,  # (M, D)
    mats_ptr,  # (L, r, D) float32, by strides
    scaling_ptr,  # (L,) float32 or None
    rows_ptr,  # (M,) int32 or None
    seed_ptr,  # (1,) int64 or None
    h_ptr,  # (M, r) float32
    m,
    d,
    r,
    adapters,
    threshold,
    x_stride,
    l_stride,
    r_stride,
    d_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)  # (RANKS,)
    own = own_rows(rows_ptr, i, m, adapters)
    h = tl.zeros((ROWS, RANKS), tl.float32)
    if rows_ptr is None:
        h = _shrink_tile(
            x_ptr,
            mats_ptr,
            seed_ptr,
            threshold,
            i,
            j,
            m,
            d,
            r,
            x_stride,
            r_stride,
            d_stride,
            COLUMNS,
        )
        h = scaled(h, scaling_ptr, 0)
    else:
        lowest, highest = bounds(own, adapters)
        for adapter in range(lowest, highest + 1):
            chosen = own == adapter
            if tl.max(chosen.to(tl.int32), 0) > 0:
                mat_ptr = mats_ptr + tl.cast(adapter, tl.int64) * l_stride
                part = _shrink_tile(
                    x_ptr,
                    mat_ptr,
                    seed_ptr,
                    threshold,
                    i,
                    j,
                    m,
                    d,
                    r,
                    x_stride,
                    r_stride,
                    d_stride,
                    COLUMNS,
                )
                h = tl.where(chosen[:, None], scaled(part, scaling_ptr, adapter), h)
    at = h_ptr + i.to(tl.int64)[:, None] * r + j[None, :]
    tl.store(at, h, mask=(i < m)[:, None] & (j < r)[None, :])


@triton.jit
def _shrink_tile(
    x_ptr,
    mat_ptr,
    seed_ptr,
    threshold,
    i,
    j,
    m,
    d,
    r,
    x_stride,
    r_stride,
    d_stride,
    COLUMNS: tl.constexpr,
):
    """x M^T of one adapter for rows i and ranks j, along all of D."""
    h = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    k = tl.arange(0, COLUMNS)  # (COLUMNS,)
    x_at = x_ptr + i.to(tl.int64)[:, None] * x_stride + k[None, :]
    mat_at = mat_ptr + j.to(tl.int64)[None, :] * r_stride + k.to(tl.int64)[:, None] * d_stride
    step = COLUMNS * tl.cast(d_stride, tl.int64)
    for start in range(0, d, COLUMNS):
        inside = k < d - start
        x = tl.load(x_at, mask=(i < m)[:, None] & inside[None, :], other=0.0)
        if seed_ptr is not None:
            x = tl.where(kept(seed_ptr, i, start, threshold, COLUMNS), x, 0.0)
        mat = tl.load(mat_at, mask=(j < r)[None, :] & inside[:, None], other=0.0)
        h = split_dot(x, mat, h)
        x_at += COLUMNS
        mat_at += step
    return h


@triton.jit(do_not_specialize=["m", "adapters", "threshold"])
def _add_kernel(
    y_ptr,  # (M, D), or None for 0
    h_ptr,  # (M, r) float32
    mats_ptr,  # (L, D, r) float32, by strides
    scaling_ptr,  # (L,) float32 or None
    rows_ptr,  # (M,) int32 or None
    seed_ptr,  # (1,) int64 or None
    out_ptr,  # (M, D), may be y
    m,
    d,
    r,
    adapters,
    threshold,
    l_stride,
    d_stride,
    r_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    tiles = tl.cdiv(d, COLUMNS)
    i = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    first = tl.program_id(0) % tiles * COLUMNS
    j = first + tl.arange(0, COLUMNS)  # (COLUMNS,)
    own = own_rows(rows_ptr, i, m, adapters)
    mats_ptr += j.to(tl.int64)[None, :] * d_stride
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    if rows_ptr is None:
        update = _add_tile(h_ptr, mats_ptr, i, j, m, d, r, r_stride, RANKS)
        update = scaled(update, scaling_ptr, 0)
    else:
        lowest, highest = bounds(own, adapters)
        for adapter in range(lowest, highest + 1):
            chosen = own == adapter
            if tl.max(chosen.to(tl.int32), 0) > 0:
                mat_ptr = mats_ptr + tl.cast(adapter, tl.int64) * l_stride
                part = _add_tile(h_ptr, mat_ptr, i, j, m, d, r, r_stride, RANKS)
                update = tl.where(chosen[:, None], scaled(part, scaling_ptr, adapter), update)
    at = i.to(tl.int64)[:, None] * d + j[None, :]
    inside = (i < m)[:, None] & (j < d)[None, :]
    if seed_ptr is not None:
        update = tl.where(kept(seed_ptr, i, first, threshold, COLUMNS), update, 0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        update = y - (0.0 - update)
    tl.store(out_ptr + at, narrow(update, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_tile(h_ptr, mat_at, i, j, m, d, r, r_stride, RANKS: tl.constexpr):
    """h M^T of one adapter for rows i and columns j, along all ranks."""
    update = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, r, RANKS):
        k = start + tl.arange(0, RANKS)  # (RANKS,)
        h_at = h_ptr + i.to(tl.int64)[:, None] * r + k[None, :]
        h = tl.load(h_at, mask=(i < m)[:, None] & (k < r)[None, :], other=0.0)
        some = (k < r)[:, None] & (j < d)[None, :]
        mat = tl.load(mat_at + k.to(tl.int64)[:, None] * r_stride, mask=some, other=0.0)
        update = split_dot(h, mat, update)
    return update


def shrink(
    x: Tensor,
    mats: Tensor,
    rows: Tensor | None = None,
    scaling: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Each row by its adapter's matrix: `h_i = s D(x_i) M^T`.

    Args:
        x: (M, D), 16-bit.
        mats: (L, r, D) float32, any strides.
        rows: int32 (M,), -1 for none, or None: all rows by the first matrix.
        scaling: (L,) float32, or None for 1.
        dropout: what of x is taken as 0, or None.

    Returns:
        (M, r) float32, 0 where a row has no adapter.
    """
    (m, d), (adapters, r, _) = x.shape, mats.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    h = torch.empty((m, r), dtype=torch.float32, device=x.device)
    if m == 0:
        return h
    tile, (seed, threshold) = fit(SHRINK, r), parts(dropout)
    grid = (triton.cdiv(m, tile.rows), triton.cdiv(r, tile.ranks))
    tensors = (x, mats, scaling, rows, seed, h)
    sizes = (m, d, r, adapters, threshold, x.stride(0), *mats.stride())
    _shrink_kernel[grid](*tensors, *sizes, **options(tile))
    return h


def add(
    y: Tensor,
    h: Tensor,
    mats: Tensor,
    rows: Tensor | None = None,
    scaling: Tensor | None = None,
    dropout: Dropout | None = None,
    in_place: bool = False,
) -> Tensor:
    """Add each row's update: `y_i + D(s h_i M^T)`, rounded once.

    Args:
        y: (M, D), 16-bit, contiguous.
        h: (M, r) float32, contiguous.
        mats: (L, D, r) float32, any strides.
        rows: as in `shrink`.
        scaling: as in `shrink`.
        dropout: which elements get no update, or None.
        in_place: write into y, which must be the caller's own and saved by nobody.

    Returns:
        (M, D) in the dtype of y; y itself if in place.
    """
    out = y if in_place else torch.empty_like(y)
    return _add(y, out, h, mats, rows, scaling, dropout)


def expand(
    h: Tensor,
    mats: Tensor,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    scaling: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Each row's update alone: `D(s h_i M^T)`, rounded once.

    Args:
        h: as in `add`, and likewise what follows.
        mats: (L, D, r) float32.
        dtype: of the result, 16-bit.
        rows: as in `shrink`.
        scaling: as in `shrink`.
        dropout: which elements are 0, or None.

    Returns:
        (M, D) in `dtype`, 0 where a row has no adapter.
    """
    out = torch.empty((len(h), mats.shape[1]), dtype=dtype, device=h.device)
    return _add(None, out, h, mats, rows, scaling, dropout)


def _add(
    y: Tensor | None,
    out: Tensor,
    h: Tensor,
    mats: Tensor,
    rows: Tensor | None,
    scaling: Tensor | None,
    dropout: Dropout | None,
) -> Tensor:
    (m, d), (adapters, _, r) = out.shape, mats.shape
    if out.numel() == 0:
        return out
    tile, (seed, threshold) = fit(ADD, r), parts(dropout)
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(d, tile.columns),)
    tensors = (y, h, mats, scaling, rows, seed, out)
    sizes = (m, d, r, adapters, threshold, *mats.stride())
    _add_kernel[grid](*tensors, *sizes, **options(tile))
    return out


# what is launched: operator, whether it is scaled, the axis along which the matrix is stored, and
# whether it drops; `shrink` by A and `add` by B are forward, by the other one backward
_LAUNCHED = (
    ("shrink", False, "d", False),
    ("shrink", False, "d", True),
    ("shrink", True, "r", False),
    ("add", True, "r", False),
    ("add", False, "d", False),
    ("add", False, "d", True),
    ("expand", True, "r", False),
    ("expand", False, "d", False),
    ("expand", False, "d", True),
)


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


def _variant(
    operator: str, scaled: bool, axis: str, drops: bool, dtype: str, rank: int, rows: bool
) -> Variant:
    kernel, tiles = {
        "shrink": (_shrink_kernel, SHRINK),
        "add": (_add_kernel, ADD),
        "expand": (_add_kernel, ADD),
    }[operator]
    tile = fit(tiles, rank)
    types = {"rows_ptr": "*i32", "seed_ptr": "*i64"}
    types |= dict.fromkeys(("x_ptr", "y_ptr", "v_ptr"), f"*{dtype}")
    types["out_ptr"] = f"*{dtype}" if operator in ("add", "expand") else "*fp32"
    signature = {
        name: types.get(name, "*fp32") if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANKS": tile.ranks}
    constants[f"{axis}_stride"] = 1
    present = {
        "rows_ptr": rows,
        "scaling_ptr": scaled,
        "seed_ptr": drops,
        "y_ptr": operator == "add",
    }
    absent = [name for name, here in present.items() if name in signature and not here]
    constants |= dict.fromkeys(absent)
    signature |= dict.fromkeys(constants, "constexpr")
    what = f"{operator} {'dropped ' if drops else ''}along {axis}"
    return Variant(
        f"lora4/{what}/{dtype}/r {rank}/{'rows' if rows else 'one'}",
        kernel,
        signature,
        constants,
        warps=tile.warps,
        stages=tile.stages,
        odd=frozenset(("m", "adapters", "threshold", "seed_ptr")) & frozenset(signature),
    )
