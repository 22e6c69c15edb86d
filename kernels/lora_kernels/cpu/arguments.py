"""How tensors cross into C: dtypes by their numbers, a 4-bit weight by seven addresses."""

import ctypes

import torch
from torch import Tensor

__all__ = ["DTYPES", "WEIGHT", "addresses", "at_hand"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # weight4.h
WEIGHT = (ctypes.c_void_p,) * 7


def at_hand(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor | None, ...]:
    """A weight's tensors as C reads them: without gaps, tables on the CPU, the rest is there.

    Args:
        codes: uint8, on the CPU.
        scales: float32, or integers that `nested` decodes, on the CPU.
        table: float32 (16,).
        nested: absmax, offset, table of integer scales.

    Returns:
        codes, float32 scales, uint8 scales, absmax, offset, their table, table: the order of
        `weight4` in C, None for what the weight does not have. To be kept until the call is over.
    """
    codes, table = codes.contiguous(), table.cpu().contiguous()
    if scales.dtype == torch.float32:
        return codes, scales.contiguous(), None, None, None, None, table
    assert nested is not None
    absmax, offset, values = nested
    scales = scales.to(torch.uint8).contiguous()
    return codes, None, scales, absmax.contiguous(), offset, values.cpu().contiguous(), table


def addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    """What ctypes takes for `WEIGHT`.

    Args:
        tensors: as `at_hand` returns them.

    Returns:
        An address each, None for a tensor that is not there.
    """
    return tuple(None if t is None else t.data_ptr() for t in tensors)
