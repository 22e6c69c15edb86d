"""Quantize to 4-bit blocks, and scales to 8 bits, in C: `quantize4.c` and `scales8.c`.

A contiguous tensor is read where it lies, in one call. Another layout is copied into order a few
rows at a time, by the definition's own pieces, and each piece is a call.
"""

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from lora_kernels import blockwise4_reference as reference
from lora_kernels.cpu import arguments, library
from lora_kernels.scales4 import SCALE_GROUP

__all__ = ["encode_scales", "quantize"]

_QUANTIZE = (
    *(c_int, c_int, c_void_p, c_int64, c_int64, c_void_p),  # threads, dtype, x, n, block, table
    *(c_void_p, c_void_p, c_void_p),  # codes, scales, flag
)
_ENCODE = (c_int, c_void_p, c_int64, c_float, c_void_p, c_void_p, c_void_p)


def quantize(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x`, and `flag` set to 1 if it is not finite, as `quantize4` says.

    Args:
        x: on a CPU, any shape and layout, float16, bfloat16, float32 or float64.
        table: float32 (16,).
        block_size: elements that share a scale, a power of two from 32 to 4096.
        flag: int32 (1,), or None.

    Returns:
        codes uint8 (ceil(n / 2),) and scales float32 (ceil(n / block_size),).
    """
    n = x.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    run = library.function("lora_quantize4", *_QUANTIZE)
    table = table.to(x.device).contiguous()
    told = None if flag is None else flag.data_ptr()
    to_codes, to_scales = codes.data_ptr(), scales.data_ptr()
    start = 0
    for piece in (x,) if x.is_contiguous() else reference.pieces(x, block_size):
        here = piece.contiguous()
        run(
            *(
                library.threads(),
                arguments.DTYPES[x.dtype],
                here.data_ptr(),
                here.numel(),
                block_size,
            ),
            *(table.data_ptr(), to_codes + start // 2, to_scales + start // block_size * 4, told),
        )
        start += here.numel()
    return codes, scales


def encode_scales(scales: Tensor, offset: float, scale_table: Tensor) -> tuple[Tensor, Tensor]:
    """The scales in 8 bits, as `scales4.encode_scales` says, their mean being known.

    Args:
        scales: float32 (blocks,), on a CPU.
        offset: what is taken off them first.
        scale_table: float32 (256,), ascending.

    Returns:
        q uint8 (blocks,) and absmax float32 (ceil(blocks / 256),).
    """
    n = scales.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=scales.device)
    absmax = torch.empty(-(-n // SCALE_GROUP), dtype=torch.float32, device=scales.device)
    scales, table = scales.contiguous(), scale_table.to(scales.device).contiguous()
    run = library.function("lora_encode_scales", *_ENCODE)
    run(
        *(library.threads(), scales.data_ptr(), n, offset),
        *(table.data_ptr(), codes.data_ptr(), absmax.data_ptr()),
    )
    return codes, absmax
