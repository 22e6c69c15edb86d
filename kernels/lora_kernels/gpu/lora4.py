"""LoRA beside a product with many rows, where each row of x may have its own adapter.

With many rows the base product is the vendor's on an expanded W, so the update is three kernels of
its own. For adapter l = rows[i] of row i, and D either K or N:

    shrink   h_i = s_l x_i M_l^T        (M, D) x (L, r, D) -> (M, r)      x A^T, and dy B for dh
    add      y_i = y_i + s_l h_i M_l^T  (M, r) x (L, D, r) -> (M, D)      h B^T, and dh A for dx
    outer    G_l = s_l sum u_i^T v_i    (M, r) x (M, D) -> (L, r, D)      dA, and dB transposed

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

`outer` sums over rows, in SPLIT pieces that another launch adds in their order: no atomics.

Dropout. Each kernel that reads x, and the one that writes dx, draws the mask of its tile again
(dropout.py): `shrink` and `outer` take zeros for what is dropped, `add` leaves it as it was.
Nothing is stored, and x is not copied. The mask is the batch's, whichever adapters its rows name.

Precision. h, A and B are float32 and are multiplied as pairs of bfloat16 (split.py).

`add` keeps a -0 of y under an update of zero, as finish4 does.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.dropout import kept
from lora_kernels.gpu.split import split_dot
from lora_kernels.gpu.variant import Variant

__all__ = ["Dropout", "add", "expand", "outer", "shrink", "variants"]


class _Tile(NamedTuple):
    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


class Dropout(NamedTuple):
    """What is dropped: elements whose number of 65536 is below the threshold.

    Attributes:
        seed: int64 (1,), where x is.
        threshold: 0 to 65535.
    """

    seed: Tensor
    threshold: int


# for up to 16 ranks, and for more, 32 at a time; wider matrices would not fit the registers
SHRINK = (_Tile(16, 64, 16, 4, 3), _Tile(16, 64, 32, 2, 3))
ADD = (_Tile(64, 64, 16, 4, 1), _Tile(64, 64, 32, 4, 1))
OUTER = (_Tile(32, 64, 16, 4, 3), _Tile(32, 64, 32, 4, 3))
SPLIT = 1024  # rows that one program of `outer` sums


@triton.jit
def _own(rows_ptr, i, m, adapters):
    """Adapter of each row, -1 for none; without a list of them all rows have the first."""
    if rows_ptr is None:
        return tl.where(i < m, 0, -1)
    else:
        own = tl.load(rows_ptr + i, mask=i < m, other=-1)
        return tl.where(own < adapters, own, -1)


@triton.jit
def _bounds(own, adapters):
    """Lowest and highest adapter of a tile; nothing between them if no row has any."""
    return tl.min(tl.where(own >= 0, own, adapters), 0), tl.max(own, 0)


@triton.jit
def _times(value, scaling_ptr, adapter):
    if scaling_ptr is None:
        return value
    else:
        return value * tl.load(scaling_ptr + adapter)


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
    own = _own(rows_ptr, i, m, adapters)
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
        h = _times(h, scaling_ptr, 0)
    else:
        lowest, highest = _bounds(own, adapters)
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
                h = tl.where(chosen[:, None], _times(part, scaling_ptr, adapter), h)
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
    own = _own(rows_ptr, i, m, adapters)
    mats_ptr += j.to(tl.int64)[None, :] * d_stride
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    if rows_ptr is None:
        update = _add_tile(h_ptr, mats_ptr, i, j, m, d, r, r_stride, RANKS)
        update = _times(update, scaling_ptr, 0)
    else:
        lowest, highest = _bounds(own, adapters)
        for adapter in range(lowest, highest + 1):
            chosen = own == adapter
            if tl.max(chosen.to(tl.int32), 0) > 0:
                mat_ptr = mats_ptr + tl.cast(adapter, tl.int64) * l_stride
                part = _add_tile(h_ptr, mat_ptr, i, j, m, d, r, r_stride, RANKS)
                update = tl.where(chosen[:, None], _times(part, scaling_ptr, adapter), update)
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
            chosen = _own(rows_ptr, i, m, adapters) == adapter
            if tl.max(chosen.to(tl.int32), 0) > 0:
                v = _rows_of(v_ptr, seed_ptr, threshold, i, chosen, column, d, v_stride, COLUMNS)
                total = split_dot(_ranks_of(u_ptr, i, chosen, k, r), v, total)
    total = _times(total, scaling_ptr, adapter)
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
    tile, (seed, threshold) = _fit(SHRINK, r), _parts(dropout)
    grid = (triton.cdiv(m, tile.rows), triton.cdiv(r, tile.ranks))
    tensors = (x, mats, scaling, rows, seed, h)
    sizes = (m, d, r, adapters, threshold, x.stride(0), *mats.stride())
    _shrink_kernel[grid](*tensors, *sizes, **_options(tile))
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
    tile, (seed, threshold) = _fit(ADD, r), _parts(dropout)
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(d, tile.columns),)
    tensors = (y, h, mats, scaling, rows, seed, out)
    sizes = (m, d, r, adapters, threshold, *mats.stride())
    _add_kernel[grid](*tensors, *sizes, **_options(tile))
    return out


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
    tile, splits = _fit(OUTER, r), max(1, triton.cdiv(m, SPLIT))
    shape, strides = ((d, r), (1, r)) if transposed else ((r, d), (d, 1))
    out = torch.empty((splits, adapters, *shape), dtype=torch.float32, device=u.device)
    if out.numel() == 0:
        return out[0]
    seed, threshold = _parts(dropout)
    grid = (triton.cdiv(d, tile.columns) * triton.cdiv(r, tile.ranks), splits * adapters)
    sizes = (m, d, r, adapters, splits, threshold, v.stride(0), *strides)
    tensors = (u, v, scaling, rows, seed, out)
    _outer_kernel[grid](*tensors, *sizes, SPLIT=SPLIT, **_options(tile))
    return out[0] if splits == 1 else out.sum(0)


def _fit(tiles: tuple[_Tile, _Tile], r: int) -> _Tile:
    return tiles[0] if r <= tiles[0].ranks else tiles[1]


def _parts(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    return (None, 0) if dropout is None else dropout


def _options(tile: _Tile) -> dict[str, int]:
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANKS": tile.ranks}
    return {**constants, "num_warps": tile.warps, "num_stages": tile.stages}


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
    ("outer", False, "d", False),
    ("outer", False, "d", True),
    ("outer", True, "r", False),
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
        "outer": (_outer_kernel, OUTER),
    }[operator]
    tile = _fit(tiles, rank)
    types = {"rows_ptr": "*i32", "seed_ptr": "*i64"}
    types |= dict.fromkeys(("x_ptr", "y_ptr", "v_ptr"), f"*{dtype}")
    types["out_ptr"] = f"*{dtype}" if operator in ("add", "expand") else "*fp32"
    signature = {
        name: types.get(name, "*fp32") if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANKS": tile.ranks}
    constants[f"{axis}_stride"] = 1
    if operator == "outer":
        constants["SPLIT"] = SPLIT
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
        odd=frozenset(("m", "adapters", "splits", "threshold", "seed_ptr")) & frozenset(signature),
    )
