"""4-bit blockwise codes: quantize, decode the scales, dequantize.

A tensor is read flat, row-major, in blocks of `block_size`. Each block is divided by its largest
magnitude, the block's scale, and each quotient becomes the index of the nearest of 16 table
entries. Two indices share a byte, the first in the high nibble:

    elements  e0 e1 e2 e3 …            codes  c0 c1 c2 c3 …
    bytes     [c0 << 4 | c1] [c2 << 4 | c3] …           ceil(n / 2) of them
    scales    [max |e0 … e63|] [max |e64 … e127|] …     ceil(n / block_size), float32

The arithmetic is bitsandbytes' on a CPU, operation by operation, so codes and scales agree byte for
byte: float32, `x * (1 / scale)` in full blocks and `x / scale` in a partial last one, a code is the
number of midpoints strictly below the quotient (a tie goes to the lower entry). The scale of an
all-zero partial block is 0 here and 1e-38 there.

What differs is how a code is found. bitsandbytes searches the 15 midpoints for each element. Here
[-1, 1] is cut into equal cells, small enough that no cell holds two midpoints; the cell of an
element tells how many midpoints lie in cells below, and one comparison with the cell's own midpoint
settles the rest. Rounding keeps `x -> cell(x)` monotonic, so the answer is exactly the search's.
Dequantizing looks up both elements of a byte at once in a table of 256 pairs.

Everything runs in chunks of 2^18 elements: beside input and output there are never more than a few
chunks, and they stay in the cache. The 16-entry table and the 256-entry table of the scales are
arguments; this file knows no data type by name.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (equations 1-4).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for

__all__ = ["SCALE_GROUP", "Weight4", "decode_scales", "dequantize4", "quantize4"]

CHUNK = 1 << 18  # elements; a multiple of every block size
SCALE_GROUP = 256  # scales that share one scale of their own under double quantization
TINY = 1e-38  # scales below are taken as this much, so that the reciprocal stays finite
MAX_CELLS = 1 << 16
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Weight4(NamedTuple):
    """A 4-bit matrix as the operators take it: tensors and three integers.

    Attributes:
        codes: uint8, `out_features * in_features / 2` bytes rounded up, any shape.
        scales: float32 (blocks,), or uint8 indices into `scale_table` (double quantization).
        table: float32 (16,), the value of each code.
        out_features: rows, N.
        in_features: columns, K.
        block_size: elements that share a scale.
        scale_absmax: float32 (ceil(blocks / 256),) with double quantization, else None.
        scale_offset: float32 (), likewise.
        scale_table: float32 (256,), likewise.
        words: int32 (32,), the table as the multiply kernels read it (`gpu.decode.table_words`), or
            None, when it is made at the first use.
        arranged: uint8, a copy of the codes in the order in which tensor cores read them, or None.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    out_features: int
    in_features: int
    block_size: int
    scale_absmax: Tensor | None = None
    scale_offset: Tensor | None = None
    scale_table: Tensor | None = None
    words: Tensor | None = None
    arranged: Tensor | None = None


def quantize4(
    x: Tensor, table: Tensor, block_size: int, name: str = "tensor"
) -> tuple[Tensor, Tensor]:
    """Quantize to 4-bit codes with one float32 scale a block.

    `scale_b = max_{i in b} |x_i|`, `code_i = argmin_c |x_i / scale_b - table_c|`.

    Args:
        x: any shape and layout, float16, bfloat16, float32 or float64 (rounded to float32 first).
        table: float32 (16,), in the order of the codes; of equal entries the first is used.
        block_size: elements that share a scale, a power of two from 32 to 4096.
        name: what `x` is called in messages.

    Returns:
        codes uint8 (ceil(n / 2),) and scales float32 (ceil(n / block_size),). The low nibble that
        an odd n leaves over holds the code of 0.

    Raises:
        TypeError: `x` is not floating-point.
        ValueError: NaN or infinity in `x`, no data (meta), or a bad block size or table.
    """
    check_block_size(block_size)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
    if x.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values to quantize")
    run = {"reference": _quantize4_reference}[backend_for(x, ("reference",))]
    with torch.no_grad():
        return run(x.detach(), table, block_size, name)


def _quantize4_reference(
    x: Tensor, table: Tensor, block_size: int, name: str
) -> tuple[Tensor, Tensor]:
    n = x.numel()
    encode = _Encoder(table, x.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    start = 0
    for values in _pieces(x, block_size):
        quotients, absmax = _normalise(values.float(), block_size)
        if not bool(absmax.isfinite().all()):
            raise ValueError(_not_finite(values, start, x.shape, name))
        stop = start + values.numel()
        if quotients.numel() % 2:  # the nibble left over
            quotients = torch.nn.functional.pad(quotients, (0, 1))
        codes[start // 2 : (stop + 1) // 2] = _pack(encode(quotients))
        scales[start // block_size : -(-stop // block_size)] = absmax
        start = stop
    return codes, scales


def dequantize4(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    numel: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Expand 4-bit codes: `x_i = round(table[code_i] * scale_b)`, the product in float32.

    Args:
        codes: uint8, ceil(numel / 2) bytes, any shape.
        scales: float32 (ceil(numel / block_size),), decoded.
        table: float32 (16,).
        block_size: elements that share a scale.
        numel: elements, which tells an even count from an odd one.
        dtype: of the result; the product is rounded to it once.

    Returns:
        (numel,) of `dtype`.

    Raises:
        ValueError: too many or too few codes or scales for `numel`.
    """
    if codes.numel() != (numel + 1) // 2:
        raise ValueError(
            f"codes must have ceil(n / 2) = {(numel + 1) // 2} bytes for n = {numel}; "
            f"got {codes.numel()}"
        )
    if scales.numel() != -(-numel // block_size):
        raise ValueError(
            f"scales must have ceil(n / block) = {-(-numel // block_size)} entries for "
            f"n = {numel}, block = {block_size}; got {scales.numel()}"
        )
    run = {"reference": _dequantize4_reference}[backend_for(codes, ("reference",))]
    with torch.no_grad():
        return run(codes.reshape(-1), scales, table, block_size, numel, dtype)


def _dequantize4_reference(
    codes: Tensor, scales: Tensor, table: Tensor, block_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    byte = torch.arange(256, device=codes.device)
    table = table.to(codes.device)
    pairs = torch.stack((table[byte >> 4], table[byte & 15]), dim=1)  # (256, 2)
    pairs = pairs.view(torch.int64).view(-1)  # (256,), one 8-byte load a lookup
    out = torch.empty(numel, dtype=dtype, device=codes.device)
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        index = codes[start // 2 : (stop + 1) // 2].int()
        values = pairs.index_select(0, index).view(torch.float32)[: stop - start]
        full = start + (stop - start) // block_size * block_size
        torch.mul(
            values[: full - start].view(-1, block_size),
            scales[start // block_size : full // block_size, None],
            out=out[start:full].view(-1, block_size),
        )
        if full < stop:
            torch.mul(values[full - start :], scales[-1], out=out[full:stop])
    return out


def decode_scales(
    scales: Tensor,
    scale_absmax: Tensor | None = None,
    scale_offset: Tensor | None = None,
    scale_table: Tensor | None = None,
) -> Tensor:
    """Decode double-quantized scales: `table[q_b] * absmax[b // 256] + offset`, rounded twice.

    Args:
        scales: float32 (blocks,), returned as it is, or uint8 indices.
        scale_absmax: float32 (ceil(blocks / 256),), with uint8 scales.
        scale_offset: float32 (), with uint8 scales.
        scale_table: float32 (256,), with uint8 scales.

    Returns:
        float32 (blocks,).

    Raises:
        ValueError: uint8 scales without what decodes them.
    """
    if scales.dtype == torch.float32:
        return scales
    if scale_absmax is None or scale_offset is None or scale_table is None:
        raise ValueError(
            f"scales of {scales.dtype} need scale_absmax, scale_offset and scale_table to decode"
        )
    with torch.no_grad():
        values = scale_table.to(scales.device).index_select(0, scales.int())
        return values * scale_absmax.repeat_interleave(SCALE_GROUP)[: values.numel()] + scale_offset


def check_block_size(block_size: int) -> None:
    """Refuse a block size that is not a power of two from 32 to 4096.

    Raises:
        ValueError: with the value.
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"block_size must be a power of two from 32 to 4096; got {block_size!r}")


class _Encoder:
    """Quotients to codes, by the cells that the module's docstring describes.

    `below[c]` counts the midpoints in cells under c and `own[c]` is the midpoint inside cell c
    (infinity if there is none), so `rank(x) = below[cell(x)] + (x > own[cell(x)])`.
    """

    def __init__(self, table: Tensor, device: torch.device) -> None:
        if table.shape != (16,) or table.dtype != torch.float32:
            raise ValueError(
                f"the code table must be float32 (16,); got {table.dtype} {tuple(table.shape)}"
            )
        values, order = table.cpu().sort(stable=True)
        first = torch.cat((values.new_ones(1, dtype=torch.bool), values[1:] != values[:-1]))
        values, order = values[first], order[first].to(torch.uint8)
        middle = (values[:-1] + values[1:]) / 2
        self.middle = middle.to(device)
        self.order = None if bool((order.int().diff() == 1).all()) else order
        if self.order is not None:
            self.order = self.order.to(device)
        self.cells = 16
        while self.cells <= MAX_CELLS and bool(self._cell(middle).diff().eq(0).any()):
            self.cells *= 2
        if self.cells > MAX_CELLS:  # entries too near each other: search instead
            return
        cell, own = self._cell(middle), middle.new_full((self.cells + 2,), math.inf)
        every = torch.arange(self.cells + 2, device=middle.device)
        inside = (cell >= 0) & (cell < len(own))
        own[cell[inside].long()] = middle[inside]
        self.below = (cell < every[:, None]).sum(1).to(torch.uint8).to(device)
        # looked up as integers: index_select is several times slower on floats
        self.own = own.view(torch.int32).to(device)

    def _cell(self, x: Tensor) -> Tensor:
        # clamped, as midpoints of a user's table may lie anywhere
        return torch.add(x, 1).clamp_(-1, 3).mul_(self.cells / 2).int()

    def __call__(self, x: Tensor) -> Tensor:
        if self.cells > MAX_CELLS:
            rank = torch.bucketize(x, self.middle, out_int32=True).to(torch.uint8)
        else:
            cell = torch.add(x, 1).mul_(self.cells / 2).int()
            own = self.own.index_select(0, cell).view(torch.float32)
            rank = self.below.index_select(0, cell).add_((x > own).view(torch.uint8))
        return rank if self.order is None else self.order.index_select(0, rank.int())


def _pieces(x: Tensor, block_size: int) -> Iterator[Tensor]:
    """Cut `x`, read row-major, into flat pieces of whole blocks and at most one partial block."""
    n = x.numel()
    full = n - n % block_size
    if x.is_contiguous():
        flat = x.view(-1)
        for start in range(0, full, CHUNK):
            yield flat[start : min(start + CHUNK, full)]
        if full < n:
            yield flat[full:]
        return
    # another layout: a few rows at a time are copied into order, as many as end on a block
    row = n // x.shape[0]
    step = block_size // math.gcd(row, block_size)
    step *= max(1, CHUNK // (row * step))
    for start in range(0, x.shape[0], step):
        flat = x[start : start + step].reshape(-1)
        whole = flat.numel() - flat.numel() % block_size
        yield from (piece for piece in (flat[:whole], flat[whole:]) if piece.numel())


def _normalise(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quotients (n,) and scales (blocks,) of one piece, float32."""
    partial = values.numel() < block_size
    blocks = values.view(1, -1) if partial else values.view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    bound = absmax.clamp(min=TINY)
    if partial:  # bitsandbytes divides here, and stores the clamped scale
        return values / bound, torch.where(absmax == 0, absmax, bound)
    return blocks.mul((1.0 / bound)[:, None]).view(-1), absmax


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble."""
    pair = codes.view(torch.int16)  # little-endian: the first code is the low byte
    return ((pair << 4) | (pair >> 8)).to(torch.uint8)


def _not_finite(values: Tensor, start: int, shape: torch.Size, name: str) -> str:
    values = values.float()
    bad = int(values.isfinite().logical_not().nonzero()[0, 0])
    where = torch.unravel_index(torch.tensor(start + bad, device="cpu"), shape)
    index = ", ".join(str(int(i)) for i in where)
    return (
        f"{name}[{index}] is {float(values[bad])} in float32; 4-bit codes need finite values, "
        "so repair the weight or leave it out"
    )
