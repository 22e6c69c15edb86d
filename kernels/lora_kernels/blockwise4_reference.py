"""The definition of 4-bit blocks in plain PyTorch: quantize, expand, expand a slice.

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
chunks, and they stay in the cache.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (equations 1-4).
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_kernels.scales4 import SCALE_GROUP, TINY, decode_scales

if TYPE_CHECKING:
    from lora_kernels.blockwise4 import Weight4

__all__ = ["CHUNK", "dequantize", "describe_non_finite", "expand_slice", "pieces", "quantize"]

CHUNK = 1 << 18  # elements; a multiple of every block size
MAX_CELLS = 1 << 16


def quantize(
    x: Tensor, table: Tensor, block_size: int, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x`, and `flag` set to 1 if it is not finite, as `quantize4` says."""
    n = x.numel()
    encode = _Encoder(table, x.device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-n // block_size), dtype=torch.float32, device=x.device)
    start = 0
    for values in pieces(x, block_size):
        quotients, absmax = _normalise(values.float(), block_size)
        finite = absmax.isfinite()
        if not bool(finite.all()):
            if flag is not None:
                flag.fill_(1)
            # NaN lies in no cell; any other value will do
            quotients.view(len(absmax), -1).masked_fill_(~finite[:, None], 0)
        stop = start + values.numel()
        if quotients.numel() % 2:  # the nibble left over
            quotients = torch.nn.functional.pad(quotients, (0, 1))
        codes[start // 2 : (stop + 1) // 2] = _pack(encode(quotients))
        scales[start // block_size : -(-stop // block_size)] = absmax
        start = stop
    return codes, scales


def dequantize(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    block_size: int,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """Expand flat codes into a flat `out`, as `dequantize4` says."""
    scales = decode_scales(scales, *(nested or ()))
    byte = torch.arange(256, device=codes.device)
    table = table.to(codes.device)
    pairs = torch.stack((table[byte >> 4], table[byte & 15]), dim=1)  # (256, 2)
    pairs = pairs.view(torch.int64).view(-1)  # (256,), one 8-byte load a lookup
    for start in range(0, out.numel(), CHUNK):
        stop = min(start + CHUNK, out.numel())
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


def expand_slice(
    weight: "Weight4", row0: int, row1: int, col0: int, col1: int, out: Tensor
) -> None:
    """Expand a slice of a weight, as `expand4_slice` says."""
    n, block = weight.out_features, weight.block_size
    across = weight.in_features // block  # blocks a row
    rows = torch.arange(row0, row1, device=weight.codes.device)
    columns = torch.arange(col0 // block, col1 // block, device=weight.codes.device)
    blocks = (rows[:, None] * across + columns).view(-1)
    scales = weight.scales.view(-1)[blocks]
    if weight.nested is not None:
        absmax, offset, scale_table = weight.nested
        # of the group that each block belongs to in the whole weight
        scales = scale_table.to(scales.device)[scales.int()] * absmax[blocks // SCALE_GROUP]
        scales += offset
    codes = weight.codes.view(n, -1)[row0:row1, col0 // 2 : col1 // 2].reshape(-1)
    dequantize(codes, scales, weight.table, block, None, out.view(-1))


def describe_non_finite(x: Tensor, name: str) -> str:
    """Where the first value is that is not finite; a slow search, for an error alone."""
    start = 0
    for piece in pieces(x, 1):
        values = piece.float()
        bad = values.isfinite().logical_not().nonzero()
        if len(bad):
            break
        start += values.numel()
    where = torch.unravel_index(torch.tensor(start + int(bad[0, 0]), device="cpu"), x.shape)
    index = ", ".join(str(int(i)) for i in where)
    return (
        f"{name}[{index}] is {float(values[bad[0, 0]])} in float32; 4-bit codes need finite "
        "values, so repair the weight or leave it out"
    )


class _Encoder:
    """Quotients to codes, by the cells that the module's docstring describes.

    `below[c]` counts the midpoints in cells under c and `own[c]` is the midpoint inside cell c
    (infinity if there is none), so `rank(x) = below[cell(x)] + (x > own[cell(x)])`.
    """

    def __init__(self, table: Tensor, device: torch.device) -> None:
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


def pieces(x: Tensor, block_size: int) -> Iterator[Tensor]:
    """Cut `x`, read row-major, into flat pieces of whole blocks and at most one partial block.

    Args:
        x: any shape and layout.
        block_size: elements of a block.

    Yields:
        (n,), of about `CHUNK` elements, or of as many rows as end on a block: views where `x` can
        be viewed flat, be it with gaps, else copies.
    """
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
