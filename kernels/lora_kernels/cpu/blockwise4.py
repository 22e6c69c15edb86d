"""Hand 4-bit weights to expand4.c.

What the caller has checked is not checked again: shapes, dtypes, that a slice lies within the
weight. What C cannot take is put right here: tensors with gaps, tables on another device.

A call costs some microseconds beside the work, a third of it for reading addresses of tensors. A
struct kept with each weight would save that, and would have to be kept true when the tensors are
moved or replaced.
"""

import ctypes

from torch import Tensor

from lora_kernels.cpu import arguments, library
from lora_kernels.operands import Weight4

__all__ = ["BLOCK_STEP", "STREAM", "expand", "expand_slice"]

BLOCK_STEP = 32  # codes are looked up 32 at a time: block sizes are multiples
STREAM = 16 << 20  # bytes of a result from which on it is written past the caches
_ARGUMENTS = (
    *(ctypes.c_int, *arguments.WEIGHT, *[ctypes.c_int64] * 5),
    *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
)


def expand(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    stream: bool | None = None,
) -> None:
    """Expand flat codes into all of `out`.

    Args:
        codes: uint8.
        scales: float32 (blocks,), or uint8 indices with `nested`.
        table: float32 (16,).
        block_size: a multiple of 32.
        nested: what decodes uint8 scales: absmax, offset, table.
        out: contiguous, float16, bfloat16, float32 or float64.
        stream: write past the caches, if `out` is aligned to 64 bytes; None: if it is large.
    """
    _run(codes, scales, table, block_size, nested, (0, 0, 1, out.numel()), out, stream)


def expand_slice(
    weight: Weight4,
    row0: int,
    row1: int,
    col0: int,
    col1: int,
    out: Tensor,
    stream: bool | None = None,
) -> None:
    """Expand rows `row0 … row1`, columns `col0 … col1` of a weight into all of `out`.

    Args:
        weight: rows are whole blocks, of a multiple of 32.
        row0: first row.
        row1: one past the last.
        col0: first column, a multiple of the block size.
        col1: one past the last, likewise.
        out: contiguous, as many elements, as `expand`.
        stream: as `expand`.
    """
    w, block = weight, weight.block_size
    across = w.in_features // block  # blocks a row
    lines, width = row1 - row0, col1 - col0
    if width == w.in_features:  # rows follow each other without gaps: one line
        lines, width = 1, lines * width
    box = (row0 * across + col0 // block, across, lines, width)
    _run(w.codes, w.scales, w.table, block, w.nested, box, out, stream)


def _run(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    box: tuple[int, int, int, int],
    out: Tensor,
    stream: bool | None,
) -> None:
    """`box`: the first block, blocks from line to line, lines, elements a line."""
    held = arguments.at_hand(codes, scales, table, nested)  # until the call is over
    if stream is None:
        stream = out.nbytes >= STREAM
    library.function("lora_expand4", *_ARGUMENTS)(
        library.threads(),
        *arguments.addresses(held),
        *(block_size, *box),
        *(out.data_ptr(), arguments.DTYPES[out.dtype], stream),
    )
