"""Rotary embedding in C: `rotary.c`, for float32, bfloat16 and float16."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lora_kernels.cpu import arguments, library

__all__ = ["rotate"]

_ARGUMENTS = (
    *(c_int, c_int, c_int, c_void_p, c_void_p, c_void_p),  # threads, dtype, inverse; x, cos, sin
    *(c_int64, c_void_p, c_void_p),  # turned, layout, out
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """Turn x (B, H, T, D) by the angles, or back, into `out`.

    Args:
        x: channels side by side, other strides as they are.
        cos: (B, 1, T, R/2) float32, channels side by side, for the first R channels of x.
        sin: likewise.
        inverse: by the negative angles.
        out: (B, H, T, D) in the dtype of x, channels side by side.
    """
    run = library.function("lora_rotary", *_ARGUMENTS)
    strides = (*x.stride()[:3], *out.stride()[:3])
    tables = (cos.stride(0), cos.stride(2), sin.stride(0), sin.stride(2))
    layout = torch.tensor((*x.shape, *strides, *tables), dtype=torch.int64)
    given = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[3], layout.data_ptr())
    chosen = (library.threads(), arguments.DTYPES[x.dtype], int(inverse))
    run(*chosen, *given, out.data_ptr())
