"""RMS norm and its gradient in C: `rms_norm.c`, for float32, bfloat16 and float16."""

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lora_kernels.cpu import arguments, library

__all__ = ["backward", "forward"]

_ARGUMENTS = (
    *(c_int, c_int, c_int, c_int, c_void_p),  # threads, dtypes of x and y, round, dy
    *(c_void_p, c_int64, c_void_p, c_float),  # x and its stride, weight, eps
    *(c_int64, c_int64, c_int64, c_void_p, c_void_p),  # rows, columns, grain, out, dw
)
PIECE = 1 << 14  # elements that a thread claims at once
PIECES = 64  # of rows, whose gradients of the weight are summed apart


def forward(x: Tensor, weight: Tensor, eps: float, rounds: bool, dtype: torch.dtype) -> Tensor:
    """`weight * round(x / rms(x))`.

    Args:
        x: (M, H), rows without gaps inside.
        weight: (H,) float32.
        eps: added to the mean square.
        rounds: whether the quotient is rounded to the dtype of x before the product.
        dtype: of the result, that of x or float32.

    Returns:
        (M, H).
    """
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    grain = max(1, PIECE // max(1, x.shape[1]))
    _run(None, x, weight, eps, rounds, dtype, grain, y, None)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, rounds: bool, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x (M, H) and of the weight, float32 (H,); None for what is not wanted.

    Args:
        dy: (M, H) without gaps, of the dtype of the result of `forward`.
        x: as `forward`'s, like the next three.
        weight: see there.
        eps: see there.
        rounds: see there.
        wants: whether the gradient of x is wanted, and that of the weight.
    """
    rows, columns = x.shape
    grain, dx, dw = max(1, PIECE // max(1, columns)), None, None
    if wants[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if wants[1]:
        grain = max(1, -(-rows // PIECES))
        dw = torch.empty((-(-rows // grain), columns), dtype=torch.float32, device=x.device)
    _run(dy, x, weight, eps, rounds, dy.dtype, grain, dx, dw)
    return dx, None if dw is None else dw.sum(0)


def _run(
    dy: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    rounds: bool,
    dtype: torch.dtype,
    grain: int,
    out: Tensor | None,
    dw: Tensor | None,
) -> None:
    run = library.function("lora_rms_norm", *_ARGUMENTS)
    kinds = (arguments.DTYPES[x.dtype], arguments.DTYPES[dtype], int(rounds))
    read, to, sums = (None if t is None else t.data_ptr() for t in (dy, out, dw))
    given = (read, x.data_ptr(), x.stride(0), weight.data_ptr(), eps)
    run(library.threads(), *kinds, *given, *x.shape, grain, to, sums)
