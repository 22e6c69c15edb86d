"""Dropout from a counter on a GPU: what a kernel that reads x calls, and one that does only that.

`kept` draws for a tile of whole groups of eight columns, one Philox a group and so, with bfloat16
and 16-byte loads, one a thread for what the thread has loaded. The eight numbers of a draw are put
side by side by three joins, which move nothing between threads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.variant import Variant

__all__ = ["drop", "kept", "variants"]

ROWS, COLUMNS, WARPS = 16, 128, 4


@triton.jit
def kept(seed_ptr, i, first, threshold, COLUMNS: tl.constexpr):
    """Which elements of rows i and COLUMNS columns from `first`, a multiple of 8, stay.

    (ROWS, COLUMNS), true where the element's 16-bit number is not below the threshold.
    """
    group = first // 8 + tl.arange(0, COLUMNS // 8)  # (COLUMNS / 8,)
    row = i.to(tl.int64)[:, None]  # (ROWS, 1)
    zero = tl.zeros((i.shape[0], COLUMNS // 8), tl.uint32)
    c0 = zero + group.to(tl.uint32)[None, :]
    c1 = zero + (row & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, zero)
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    numbers = tl.reshape(tl.join(even, odd), (i.shape[0], COLUMNS))
    return numbers.to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["m", "threshold"])
def _drop_kernel(
    x_ptr,  # (M, K)
    seed_ptr,  # (1,) int64
    out_ptr,  # (M, K), may be x
    m,
    k,
    x_stride,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(k, COLUMNS)
    first = tl.program_id(0) % tiles * COLUMNS
    i = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    j = first + tl.arange(0, COLUMNS)  # (COLUMNS,)
    inside = (i < m)[:, None] & (j < k)[None, :]
    row = i.to(tl.int64)[:, None]
    # as bits: nothing is computed with them
    x = tl.load(x_ptr + row * x_stride + j[None, :], mask=inside, other=0)
    x = tl.where(kept(seed_ptr, i, first, threshold, COLUMNS), x, 0)
    tl.store(out_ptr + row * k + j[None, :], x, mask=inside)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop(x: Tensor, seed: Tensor, threshold: int, in_place: bool = False) -> Tensor:
    """Copy rows with zeros where dropped.

    Args:
        x: (M, K), of 2, 4 or 8 bytes an element.
        seed: int64 (1,).
        threshold: numbers of 65536 below which an element is dropped.
        in_place: write into x, which then must be contiguous.

    Returns:
        (M, K) contiguous.
    """
    (m, k), dtype = x.shape, x.dtype
    x = x if x.stride(1) == 1 or in_place else x.contiguous()
    out = x if in_place else torch.empty((m, k), dtype=dtype, device=x.device)
    if not out.numel():
        return out
    bits = _BITS[x.element_size()]
    grid = (triton.cdiv(m, ROWS) * triton.cdiv(k, COLUMNS),)
    options: dict[str, Any] = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS}
    tensors = (x.view(bits), seed, out.view(bits))
    _drop_kernel[grid](*tensors, m, k, x.stride(0), threshold, **options)
    return out


def variants() -> list[Variant]:
    """Every form that `drop` launches: bytes an element."""
    return [_variant(8 * size) for size in _BITS]


def _variant(bits: int) -> Variant:
    signature = {"x_ptr": f"*i{bits}", "seed_ptr": "*i64", "out_ptr": f"*i{bits}"}
    signature |= dict.fromkeys(("m", "k", "x_stride", "threshold"), "i32")
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    signature |= dict.fromkeys(constants, "constexpr")
    return Variant(
        f"dropout/{bits} bits",
        _drop_kernel,
        signature,
        constants,
        warps=WARPS,
        odd=frozenset(("m", "threshold", "seed_ptr")),
    )
