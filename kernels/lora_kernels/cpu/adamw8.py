"""A step of AdamW with 8-bit moments in C: `adamw8.c`, over a table of addresses."""

import itertools
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from lora_kernels.adamw8 import BLOCK, Factors, Moments8
from lora_kernels.cpu import library

__all__ = ["step"]

_STEP = (c_int, c_void_p, c_int64, c_int64, c_void_p, c_uint32)


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments8],
    factors: Factors,
    seed: int,
) -> None:
    """Update all tensors in one call, as `adamw8_` says.

    Args:
        params: float32, contiguous, on a CPU.
        grads: likewise.
        moments: theirs.
        factors: of the step.
        seed: the step's number.
    """
    sizes = [p.numel() for p in params]
    ends = list(itertools.accumulate(-(-size // BLOCK) for size in sizes))
    rows = [
        [*(t.data_ptr() for t in (p, g, *state)), size, before]
        for p, g, state, size, before in zip(
            params, grads, moments, sizes, [0, *ends], strict=False
        )
    ]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    numbers = torch.tensor(list(factors), dtype=torch.float32, device="cpu")
    run = library.function("lora_adamw8", *_STEP)
    run(
        *(library.threads(), table.data_ptr(), len(rows), ends[-1]),
        *(numbers.data_ptr(), seed * 0x9E3779B9 & 0xFFFFFFFF),
    )
