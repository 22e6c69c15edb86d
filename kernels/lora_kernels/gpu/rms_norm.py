"""RMS norm on a GPU: a program a row, or several short rows; bound by memory.

A row of up to 16384 channels stays in registers between its sum and its result, so that forward
moves 4 bytes a channel of 16 bits and backward 6. Longer rows are gone through twice, in pieces,
the second time from the L2 cache. Rows shorter than 2048 channels (the norms of single heads) share
a program.

The gradient of the weight is a sum over rows, so a kernel of its own: SPLIT rows a program, whose
sums another launch adds in their order, without atomics. It reads x and dy again, which only the
training of norms pays for, and takes r = 1 / rms from the first kernel, 4 bytes a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.variant import Variant

__all__ = ["backward", "forward", "variants"]

LONGEST = 16384  # channels that are held in registers
ELEMENTS = 2048  # of a program at least
SPLIT = 256  # rows that one program of the weight's gradient sums
ROWS, COLUMNS, WARPS = 16, 128, 4  # of its tiles


@triton.jit
def _widen(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _load(at, i, k, m, h, stride):
    """Rows i and channels k, 0 beyond the ends."""
    mask = (i < m)[:, None] & (k < h)[None, :]
    return _widen(tl.load(at + i[:, None] * stride + k[None, :], mask=mask, other=0.0))


@triton.jit
def _weight(w_ptr, k, h, x, OFFSET: tl.constexpr):
    w = _widen(tl.load(w_ptr + k, mask=k < h, other=0.0))[None, :]
    if x.dtype == tl.float64:
        w = w.to(tl.float64)
    if OFFSET:
        w += 1
    return w


@triton.jit
def _round(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """To the dtype of x, before the product with w."""
    if WIDE:
        return x
    else:
        return _widen(narrow(x, dtype))


@triton.jit
def _root(squares, h, EPS: tl.constexpr):
    return tl.rsqrt(squares / h + EPS)[:, None]  # (ROWS, 1)


@triton.jit(do_not_specialize=["m"])
def _forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    m,
    h,
    x_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    k = tl.arange(0, COLUMNS)  # (COLUMNS,)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = _load(x_ptr, i, k, m, h, x_stride)
    squares = tl.sum(x * x, axis=1)  # (ROWS,)
    if not WHOLE:
        for start in range(COLUMNS, h, COLUMNS):
            x = _load(x_ptr, i, start + k, m, h, x_stride)
            squares += tl.sum(x * x, axis=1)
    r = _root(squares, h, EPS)
    if WHOLE:
        y = _round(x * r, dtype, WIDE) * _weight(w_ptr, k, h, x, OFFSET)
        _store(y_ptr, y, i, k, m, h)
    else:
        for start in range(0, h, COLUMNS):
            x = _load(x_ptr, i, start + k, m, h, x_stride)
            y = _round(x * r, dtype, WIDE) * _weight(w_ptr, start + k, h, x, OFFSET)
            _store(y_ptr, y, i, start + k, m, h)


@triton.jit
def _store(to, value, i, k, m, h):
    mask = (i < m)[:, None] & (k < h)[None, :]
    at = to + i[:, None] * h + k[None, :]
    tl.store(at, narrow(value, to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m"])
def _dx_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    dx_ptr,
    r_ptr,  # (M,), or None
    m,
    h,
    x_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    k = tl.arange(0, COLUMNS)  # (COLUMNS,)
    x = _load(x_ptr, i, k, m, h, x_stride)
    g = _load(dy_ptr, i, k, m, h, h) * _weight(w_ptr, k, h, x, OFFSET)
    squares, products = tl.sum(x * x, axis=1), tl.sum(x * g, axis=1)  # (ROWS,)
    if not WHOLE:
        for start in range(COLUMNS, h, COLUMNS):
            x = _load(x_ptr, i, start + k, m, h, x_stride)
            g = _load(dy_ptr, i, start + k, m, h, h)
            g *= _weight(w_ptr, start + k, h, x, OFFSET)
            squares += tl.sum(x * x, axis=1)
            products += tl.sum(x * g, axis=1)
    r = _root(squares, h, EPS)
    share = products[:, None] * r / h
    if WHOLE:
        _store(dx_ptr, r * (g - x * r * share), i, k, m, h)
    else:
        for start in range(0, h, COLUMNS):
            x = _load(x_ptr, i, start + k, m, h, x_stride)
            g = _load(dy_ptr, i, start + k, m, h, h)
            g *= _weight(w_ptr, start + k, h, x, OFFSET)
            _store(dx_ptr, r * (g - x * r * share), i, start + k, m, h)
    if r_ptr is not None:
        tl.store(r_ptr + i[:, None], r, mask=(i < m)[:, None])


@triton.jit(do_not_specialize=["m"])
def _dw_kernel(
    dy_ptr,
    x_ptr,
    r_ptr,
    dw_ptr,  # (splits, H)
    m,
    h,
    x_stride,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(h, COLUMNS)
    split = tl.program_id(0).to(tl.int64) // tiles
    k = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)  # (COLUMNS,)
    total = tl.zeros((COLUMNS,), dw_ptr.dtype.element_ty)
    first = split * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, m), ROWS):
        i = start + tl.arange(0, ROWS)  # (ROWS,)
        r = tl.load(r_ptr + i, mask=i < m, other=0.0)[:, None]
        n = _round(_load(x_ptr, i, k, m, h, x_stride) * r, x_ptr.dtype.element_ty, WIDE)
        total += tl.sum(_load(dy_ptr, i, k, m, h, h) * n, axis=0)
    tl.store(dw_ptr + split * h + k, total, mask=k < h)


def forward(
    x: Tensor, weight: Tensor, eps: float, offset: bool, wide: bool, dtype: torch.dtype
) -> Tensor:
    """`weight * round(x / rms(x))`, with 1 + weight, or without the rounding.

    Args:
        x: (M, H), channels side by side.
        weight: (H,).
        eps: added to the mean square.
        offset: multiply by 1 + weight.
        wide: round once, at the end.
        dtype: of the result.

    Returns:
        (M, H).
    """
    (m, h), y = x.shape, torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        options = {**_options(h, eps, offset), "WIDE": wide}
        grid = (triton.cdiv(m, options["ROWS"]),)
        _forward_kernel[grid](x, weight, y, m, h, x.stride(0), **options)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: bool,
    wide: bool,
    wants: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x (M, H), and, if the second of `wants` says so, of the weight (H,).

    Args:
        dy: (M, H) without gaps.
        x: as `forward`'s, like the next four.
        weight: see there.
        eps: see there.
        offset: see there.
        wide: see there.
        wants: which are wanted; the first is given in any case.
    """
    (m, h), dx = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    r = torch.empty(m, dtype=dtype, device=x.device) if wants[1] else None
    if x.numel():
        options = _options(h, eps, offset)
        grid = (triton.cdiv(m, options["ROWS"]),)
        _dx_kernel[grid](dy, x, weight, dx, r, m, h, x.stride(0), **options)
    if r is None:
        return dx, None
    splits = triton.cdiv(m, SPLIT)
    sums = torch.empty((splits, h), dtype=dtype, device=x.device)
    if x.numel():
        grid = (splits * triton.cdiv(h, COLUMNS),)
        _dw_kernel[grid](dy, x, r, sums, m, h, x.stride(0), **_dw_constants(wide), num_warps=WARPS)
    return dx, sums.sum(0)


def _options(h: int, eps: float, offset: bool) -> dict[str, Any]:
    constants = _constants(h, eps, offset)
    elements = constants["ROWS"] * constants["COLUMNS"]
    return {**constants, "num_warps": max(4, min(16, elements // 1024))}


def _constants(h: int, eps: float, offset: bool) -> dict[str, Any]:
    whole = h <= LONGEST
    columns = triton.next_power_of_2(h) if whole else LONGEST // 4
    rows = max(1, ELEMENTS // columns)
    return {"EPS": eps, "OFFSET": offset, "ROWS": rows, "COLUMNS": columns, "WHOLE": whole}


def _dw_constants(wide: bool) -> dict[str, Any]:
    return {"WIDE": wide, "SPLIT": SPLIT, "ROWS": ROWS, "COLUMNS": COLUMNS}


def variants() -> list[Variant]:
    """Rows of 4096 in every dtype; short, long and longest rows, each form, a trained weight."""
    kernels = (_forward_kernel, _dx_kernel)
    found = [_variant(k, d, 4096) for k in kernels for d in ("bf16", "fp16", "fp32")]
    found += [_variant(k, "bf16", h) for k in kernels for h in (128, 2048, 8192, 16384, 32768)]
    found += [_variant(k, "bf16", 4096, offset=True) for k in kernels]
    found.append(_variant(_forward_kernel, "bf16", 4096, wide=True))
    found.append(_variant(_dx_kernel, "bf16", 4096, keeps_r=True))
    found += [_variant(_dw_kernel, dtype, 4096) for dtype in ("bf16", "fp16", "fp32")]
    return [*found, _variant(_dw_kernel, "bf16", 4096, wide=True)]


def _variant(
    kernel: Any,
    dtype: str,
    h: int,
    offset: bool = False,
    wide: bool = False,
    keeps_r: bool = False,
) -> Variant:
    options = _options(h, 1e-5, offset)
    warps, constants = options.pop("num_warps"), options
    if kernel is _forward_kernel:
        constants = {**constants, "WIDE": wide or offset}
    if kernel is _dw_kernel:
        warps, constants = WARPS, _dw_constants(wide)
    if kernel is _dx_kernel and not keeps_r:
        constants = {**constants, "r_ptr": None}
    types = {"r_ptr": "*fp32", "dw_ptr": "*fp32"}
    signature = {
        name: types.get(name, f"*{dtype}") if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    way = {_forward_kernel: "forward", _dx_kernel: "dx", _dw_kernel: "dw"}[kernel]
    said = {"offset": offset, "wide": wide, "and r": keeps_r}
    return Variant(
        "/".join(["rms_norm", way, dtype, str(h), *(name for name, on in said.items() if on)]),
        kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        warps=warps,
        odd=frozenset(("m",)),
    )
