"""`x Wᵀ` and `dy W` on a GPU: which of three routes, and the one that expands.

    planes   few rows: codes to two int8 planes, exact sums on the integer tensor cores
    halves   to about 128 rows: codes to bfloat16 or float16 inside the product
    dense    more rows: expand, then the vendor's product

The first two read half a byte a weight and never write W. The third writes W in 16 bits, a slice at
a time: a slice of 32 MiB is still in the second-level cache when the product reads it, and the
workspace is 32 MiB instead of a whole weight. `x Wᵀ` cuts W into rows, `dy W` into columns, so that
either way each slice gives finished columns of the result and nothing is added up in 16 bits.

The workspace is a fresh tensor each time. The allocator hands the same block out again, it is right
on every stream, and a CUDA graph that captured a call keeps its own.

float32 and float64 take the dense route: there is no tensor-core product to fuse with. So do rows
of W that are no whole number of blocks.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels import expansions
from lora_kernels.gpu import matmul4, planes4
from lora_kernels.gpu.blockwise4 import expand4_slice
from lora_kernels.gpu.finish4 import Update
from lora_kernels.gpu.tuned import crossover, tile_fields
from lora_kernels.operands import Weight4

__all__ = ["dense_dx", "dense_multiply", "fused_multiply", "multiply", "multiply_dx", "route"]

SLICE_BYTES = 1 << 25  # of the expanded weight; an H200's second-level cache holds 60 MB
HALF = (torch.bfloat16, torch.float16)


def route(rows: int, weight: Weight4, dtype: torch.dtype, device: torch.device) -> str:
    """The way `x Wᵀ` is computed.

    Args:
        rows: of x.
        weight: the 4-bit weight.
        dtype: of x.
        device: of x.

    Returns:
        "planes", "halves" or "dense".
    """
    if not _fusable(weight, dtype):
        return "dense"
    limit = crossover(_name(device), weight.out_features, weight.in_features, dtype)
    if rows <= limit.planes:
        return "planes"
    return "halves" if rows <= limit.halves else "dense"


def multiply(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + bias` by the route that suits x.

    Args:
        x: (M, K).
        weight: codes and scales of W (N, K).
        bias: (N,) or None.

    Returns:
        (M, N) in the dtype of x.
    """
    way = route(len(x), weight, x.dtype, x.device)
    if way == "dense":
        return dense_multiply(x, weight, bias)
    return fused_multiply(way, x, weight, bias, None)[0]


def fused_multiply(
    way: str, x: Tensor, weight: Weight4, bias: Tensor | None, update: Update | None
) -> tuple[Tensor, Tensor | None]:
    """One of the two routes that never write W, with LoRA's update in the same pass.

    Args:
        way: "planes" or "halves".
        x: (M, K), 16-bit.
        weight: codes and scales of W (N, K).
        bias: (N,) or None.
        update: the low-rank update, or None.

    Returns:
        y (M, N) in the dtype of x, and with an update `x Aᵀ` (M, r) in float32.
    """
    module = {"planes": planes4, "halves": matmul4}[way]
    size = (weight.out_features, weight.in_features, x.dtype)
    tile = module.default_tile(len(x), *size)
    tile = replace(tile, **tile_fields(_name(x.device), *size, way, len(x)))
    bias = None if bias is None else bias.contiguous()
    return module.multiply(_rows(x), weight, bias, update, tile)


def multiply_dx(dy: Tensor, weight: Weight4) -> Tensor:
    """`dy W` by the route that suits dy.

    Args:
        dy: (M, N).
        weight: codes and scales of W (N, K).

    Returns:
        (M, K) in the dtype of dy.
    """
    size, name = (weight.out_features, weight.in_features, dy.dtype), _name(dy.device)
    if not _fusable(weight, dy.dtype) or len(dy) > crossover(name, *size).dx:
        return dense_dx(dy, weight)
    tile = matmul4.default_dx_tile(len(dy), *size)
    tile = replace(tile, **tile_fields(name, *size, "dx", len(dy)))
    return matmul4.multiply_dx(_rows(dy), weight, tile)


def dense_multiply(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + bias` over expanded slices of rows of W.

    Args:
        x: (M, K).
        weight: codes and scales of W (N, K).
        bias: (N,) or None.

    Returns:
        (M, N) in the dtype of x.
    """
    n, k = weight.out_features, weight.in_features
    bias = None if bias is None else bias.to(x.dtype)
    y = x
    for start, stop, w in _slices(weight, n, k, x, along=0):
        if (start, stop) == (0, n):
            return torch.nn.functional.linear(x, w, bias)
        y = x.new_empty(len(x), n) if start == 0 else y
        if bias is None:
            torch.mm(x, w.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, w.t(), out=y[:, start:stop])
    return y


def dense_dx(dy: Tensor, weight: Weight4) -> Tensor:
    """`dy W` over expanded slices of columns of W.

    Args:
        dy: (M, N).
        weight: codes and scales of W (N, K).

    Returns:
        (M, K) in the dtype of dy.
    """
    n, k = weight.out_features, weight.in_features
    kept = expansions.taken(weight, dy.dtype)
    if kept is not None:
        return dy @ kept
    dx = dy
    for start, stop, w in _slices(weight, k, n, dy, along=1):
        if (start, stop) == (0, k):
            return dy @ w
        dx = dy.new_empty(len(dy), k) if start == 0 else dx
        torch.mm(dy, w, out=dx[:, start:stop])
    return dx


def _slices(
    weight: Weight4, length: int, across: int, like: Tensor, along: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Cut W along its rows (0) or columns (1); each slice is overwritten by the next.

    Where a recomputation keeps W for its gradient, slices of rows are written beside one another.
    """
    n, k, dtype = weight.out_features, weight.in_features, like.dtype
    unit = weight.block_size if along else 1
    step = max(1, SLICE_BYTES // (across * dtype.itemsize or 1) // unit) * unit
    if step >= length or k % weight.block_size or dtype not in HALF:
        yield 0, length, expansions.expanded(weight, dtype)
        return
    whole = None if along else expansions.room(weight, dtype)
    workspace = like.new_empty(0 if whole is not None else step * across)
    for start in range(0, length, step):
        stop = min(start + step, length)
        box = (0, n, start, stop) if along else (start, stop, 0, k)
        if whole is None:
            out = workspace[: (stop - start) * across].view(box[1] - box[0], box[3] - box[2])
        else:
            out = whole[start:stop]
        yield start, stop, expand4_slice(weight, *box, dtype, out=out)


def _fusable(weight: Weight4, dtype: torch.dtype) -> bool:
    k = weight.in_features
    return dtype in HALF and k % weight.block_size == 0 and weight.out_features > 0 and k > 0


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
