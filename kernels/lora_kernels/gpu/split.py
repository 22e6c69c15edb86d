"""Products of float32 numbers on tensor cores that take 16 bits.

Rounding h, A and B to 16 bits is most of what a 16-bit LoRA gets wrong. Here a number a enters as
hi + lo with hi = bfloat16(a) and lo = bfloat16(a - hi), and a product as hi hi + hi lo + lo hi,
exact to about 2^-16; a bfloat16 a is its own hi, and a float16 is hi + lo without error. It costs
two or three small products in kernels that wait for memory, works on every target, has float32's
range where float16's would overflow, and casts no copy of A and B.
"""

import triton
import triton.language as tl

from lora_kernels.gpu.decode import INTERPRETED, narrow

__all__ = ["split_dot"]


@triton.jit
def split_dot(a, b, acc):
    """acc + a b of 16-bit or float32 operands, each split into two bfloat16."""
    a_hi, a_lo = _split(a)
    b_hi, b_lo = _split(b)
    if a.dtype != tl.bfloat16:
        acc = _dot16(a_lo, b_hi, acc)
    if b.dtype != tl.bfloat16:
        acc = _dot16(a_hi, b_lo, acc)
    return _dot16(a_hi, b_hi, acc)


@triton.jit
def _split(a):
    if a.dtype == tl.bfloat16:
        return a, a
    else:
        wide = a.to(tl.float32)
        hi = narrow(wide, tl.bfloat16)
        return hi, narrow(wide - hi.to(tl.float32), tl.bfloat16)


@triton.jit
def _dot16(a, b, acc):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)
