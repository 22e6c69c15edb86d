"""Dropout from a counter in C: `dropout.c`."""

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lora_kernels.cpu import library

__all__ = ["drop"]

_ARGUMENTS = (c_int, c_void_p, *[c_int64] * 4, c_void_p, c_int, c_void_p)


def drop(x: Tensor, seed: Tensor, threshold: int, in_place: bool = False) -> Tensor:
    """Copy rows with zeros where dropped.

    Args:
        x: (M, K) on a CPU, float16, bfloat16, float32 or float64.
        seed: int64 (1,), likewise.
        threshold: numbers of 65536 below which an element is dropped.
        in_place: write into x, which then must have no gaps.

    Returns:
        (M, K) without gaps.
    """
    m, k = x.shape
    x = x if x.stride(1) == 1 or in_place else x.contiguous()
    out = x if in_place else torch.empty((m, k), dtype=x.dtype, device=x.device)
    seed = seed.contiguous()
    library.function("lora_drop", *_ARGUMENTS)(
        *(library.threads(), x.data_ptr(), m, k, x.stride(0), x.element_size()),
        *(seed.data_ptr(), threshold, out.data_ptr()),
    )
    return out
