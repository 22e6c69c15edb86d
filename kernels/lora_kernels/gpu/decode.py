"""What the kernels on 4-bit weights share: the code tables as machine words, scales, rounding.

A multiply decodes 16-entry tables by byte permute. PRMT picks 4 bytes out of 8 by the low three
bits of 4 selector nibbles; two of them and a third that chooses between their results by the
fourth bit look 4 codes up in a table of 16 bytes. A 16-bit value is two such tables, so a table is
8 words of 32 bits, which the kernel loads once and keeps in registers:

    words[ 0: 8]   the 16 codes in bfloat16: 16 low bytes, then 16 high bytes
    words[ 8:16]   the same in float16
    words[16:24]   two int8 planes: 16 low bytes L, then 16 high bytes H; code ~ 256 H + L
    words[24:27]   float32 bits of the factors that undo the scaling of the three tables

Why factors: the tables may hold code * c for any c, as a sum can be divided by c at its end, for
nothing. Among c in [1, 2) one is chosen for which the 16 entries happen to lie near numbers of the
format. NF4 in bfloat16 then has a relative error (root mean square) of 0.6e-3, where c = 1 has
1.1e-3 and rounding scaled weights one by one 1.7e-3.

The interpreter differs from a GPU in three ways that matter: it has no inline assembly, casts to
bfloat16 cut instead of rounding, and arithmetic on bfloat16 is wrong. Hence `INTERPRETED`, a
constant known when a kernel is compiled: it selects table lookups instead of PRMT and rounding by
integers instead of the cast.
"""

import functools
import os

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FACTORS", "HALVES", "INTERPRETED", "WORDS", "load_scales", "narrow", "table_words"]

# the same variable that triton.jit asks when a kernel is defined
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

WORDS = 32  # int32 words, of which 27 are used
HALVES = {torch.bfloat16: 0, torch.float16: 8}  # first word of a format's two byte planes
PLANES = 16
FACTORS = {torch.bfloat16: 24, torch.float16: 25, torch.int8: 26}
LARGEST_PLANES = 127 * 256 + 127  # of H = 127 and L = 127

_of_table = WeakTensorKeyDictionary()  # by identity


def table_words(table: Tensor) -> Tensor:
    """The machine words of a code table.

    Args:
        table: float32 (16,). Its values are read once in its lifetime, which waits for the device.

    Returns:
        int32 (32,) on the table's device, laid out as the module's docstring says.
    """
    words = _of_table.get(table)
    if words is None or words.device != table.device:
        words = _words(tuple(table.tolist())).to(table.device)
        _of_table[table] = words
    return words


@functools.lru_cache(maxsize=64)
def _words(values: tuple[float, ...]) -> Tensor:
    table = np.array(values, dtype=np.float64)
    largest = np.abs(table).max() or 1.0
    words = np.zeros(WORDS, dtype=np.uint32)
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        # a power of two brings the largest entry into [1, 2), far from float16's limits
        unit = 2.0 ** -np.floor(np.log2(largest))
        c = unit * _best_multiple(table * unit, bits)
        scaled = torch.from_numpy(table * c).to(dtype).view(torch.int16).numpy().view(np.uint16)
        first = HALVES[dtype]
        words[first : first + 8] = _byte_planes(scaled)
        words[FACTORS[dtype]] = np.float32(1 / c).view(np.uint32)
    step = LARGEST_PLANES / largest
    whole = np.rint(table * step).astype(np.int64)
    low = (whole + 128) % 256 - 128  # signed digits: -128 ... 127
    high = (whole - low) // 256
    words[PLANES : PLANES + 8] = _byte_planes(((high & 255) << 8 | (low & 255)).astype(np.uint16))
    words[FACTORS[torch.int8]] = np.float32(1 / step).view(np.uint32)
    return torch.from_numpy(words.view(np.int32))


def _byte_planes(codes: np.ndarray) -> np.ndarray:
    """16 values of 16 bits as 4 words of their low bytes and 4 of their high ones."""
    planes = np.concatenate((codes & 255, codes >> 8)).astype(np.uint8)
    return planes.view("<u4")


def _best_multiple(table: np.ndarray, bits: int) -> float:
    """The c in [1, 2) for which table * c, rounded to `bits` significant bits, errs least."""
    c = 1 + np.arange(1 << 14) / (1 << 14)
    scaled = table * c[:, None]  # (candidates, 16)
    mantissa, exponent = np.frexp(scaled)
    rounded = np.ldexp(np.rint(mantissa * 2.0**bits), exponent - bits)
    error = np.square((rounded - scaled) / c[:, None]).sum(1)
    return float(c[error.argmin()])


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to a 16-bit type, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, rounded, 0x7FC00000)  # a NaN must not carry over into the sign
        # not by a cast, which would make subnormal numbers 0
        return (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def load_scales(
    scales_ptr,
    absmax_ptr,
    offset_ptr,
    table_ptr,
    block,
    mask,
    NESTED: tl.constexpr,
    zero=0,
):
    """Scales of blocks, float32: stored so, or `table[q] * absmax[block // 256] + offset`.

    The definition rounds twice. A contracted sum is rounded once, which no product of a whole row
    can show. Where it would show, `enable_fp_fusion=False` is not enough: the ptxas of triton 3.6
    contracts pairs of scales on sm_100 all the same. A `zero` that the compiler does not know to be
    one keeps product and sum apart, for one bit operation.
    """
    if NESTED:
        q = tl.load(scales_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax = tl.load(absmax_ptr + block // 256, mask=mask, other=0.0)
        product = tl.load(table_ptr + q) * absmax
        product = (product.to(tl.int32, bitcast=True) | zero).to(tl.float32, bitcast=True)
        return product + tl.load(offset_ptr)
    else:
        return tl.load(scales_ptr + block, mask=mask, other=0.0)
