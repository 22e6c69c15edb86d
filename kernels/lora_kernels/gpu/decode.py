"""What the kernels on 4-bit weights share: scales, and rounding.

Triton's interpreter differs from a GPU in three ways that matter: it has no inline assembly, casts
to bfloat16 cut instead of rounding, and arithmetic on bfloat16 is wrong. Hence `INTERPRETED`, a
constant known when a kernel is compiled: it selects table lookups instead of byte permutes, and
rounding by integers instead of the cast.
"""

import os

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "load_scales", "narrow"]

# the same variable that triton.jit asks when a kernel is defined
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
