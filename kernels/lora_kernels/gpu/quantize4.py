"""Quantize to 4-bit blocks on a GPU.

A weight is read once and its codes and scales written once, 2.6 bytes a weight of bfloat16, in one
launch. The largest magnitude of a block is found among the bits, as integers: they order like the
magnitudes, and a NaN is larger than infinity, so that the maximum also tells whether all is finite.
That goes to a flag on the device; nothing here waits for the host.

A code is found by a binary search over the 15 midpoints of the table: four lookups with
`tl.gather`, which keeps 16 entries in shared memory, and a fifth for the code, as tables need not
be ascending. That is 33 instructions a weight on sm_90, twice what the speed of a copy would leave
room for. Cells as in the reference take 26 to 30 but tables of their own, and a model is quantized
once, as fast as its weights arrive from a disk.

Bit-equal to the definition: quotients are rounded correctly (`div_rn`), and nothing is contracted
(`enable_fp_fusion=False`). A partial last block divides where others multiply by the reciprocal:
sizes that have one compile a second form (`PARTIAL`), which also masks each element.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch import device_of
from lora_kernels.gpu.decode import INTERPRETED
from lora_kernels.gpu.variant import Variant

__all__ = ["quantize", "variants"]

TILE = 4096  # weights a program; the largest block
WARPS = 4


@triton.jit
def _widen(x):
    """To float32. The interpreter's cast makes subnormal bfloat16 numbers 0."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit(do_not_specialize=["numel"])
def _kernel(
    x_ptr,
    middle_ptr,
    order_ptr,
    codes_ptr,
    scales_ptr,
    flag_ptr,
    numel: tl.int64,  # a 1 is a number like any other
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks a program
    PARTIAL: tl.constexpr,
    CHECK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # block
    left = tl.minimum(numel - first * BLOCK, BLOCKS * BLOCK).to(tl.int32)  # elements
    each = tl.arange(0, BLOCKS)
    live = each * BLOCK < left  # (BLOCKS,)
    element = each[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = element < left if PARTIAL else live[:, None]
    x = _widen(tl.load(x_ptr + first * BLOCK + element, mask=mask, other=0.0))

    # as integers magnitudes order alike, and a NaN is larger than infinity
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)  # (BLOCKS,)
    if CHECK:
        tl.store(flag_ptr + each * 0, 1, mask=bits >= 0x7F800000)
    absmax = bits.to(tl.float32, bitcast=True)
    bound = tl.maximum(absmax, tl.full(absmax.shape, TINY, tl.float32))
    x_over_bound = x * tl.div_rn(1.0, bound)[:, None]
    if PARTIAL:
        partial = each * BLOCK + BLOCK > left
        x_over_bound = tl.where(partial[:, None], tl.div_rn(x, bound[:, None]), x_over_bound)
        absmax = tl.where(partial & (absmax > 0), bound, absmax)
    tl.store(scales_ptr + first + each, absmax, mask=live)

    # rank = number of midpoints below: 8, then 4, 2, 1 more of them
    quotient = x_over_bound.reshape(BLOCKS * BLOCK)
    middle = tl.load(middle_ptr + tl.arange(0, 16))
    rank = tl.where(quotient > tl.load(middle_ptr + 7), 8, 0)
    rank += tl.where(quotient > tl.gather(middle, rank + 3, 0), 4, 0)
    rank += tl.where(quotient > tl.gather(middle, rank + 1, 0), 2, 0)
    rank += tl.where(quotient > tl.gather(middle, rank, 0), 1, 0)
    code = tl.gather(tl.load(order_ptr + tl.arange(0, 16)), rank, 0)
    high, low = tl.split(code.reshape(BLOCKS, BLOCK // 2, 2))
    byte = each[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    mask = byte * 2 < left if PARTIAL else live[:, None]
    tl.store(codes_ptr + first * (BLOCK // 2) + byte, (high << 4 | low).to(tl.uint8), mask=mask)


def quantize(
    x: Tensor, middle: Tensor, order: Tensor, block_size: int, tiny: float, flag: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantize a tensor in one launch.

    Args:
        x: any shape and layout, bfloat16, float16, float32 or float64.
        middle: float32 (16,), the ascending midpoints of the code table, and infinity.
        order: int32 (16,), the code of each rank among them.
        block_size: elements that share a scale.
        tiny: the least divisor.
        flag: int32 (1,), set to 1 if a value is not finite; or None.

    Returns:
        codes uint8 (ceil(n / 2),) and scales float32 (ceil(n / block_size),).
    """
    numel = x.numel()
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-numel // block_size), dtype=torch.float32, device=x.device)
    if numel:
        with device_of(x):
            _kernel[(triton.cdiv(numel, TILE),)](
                x.contiguous(),
                middle,
                order,
                codes,
                scales,
                scales if flag is None else flag,
                numel,
                **_constants(block_size, tiny, numel % block_size != 0, flag is not None),
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return codes, scales


def _constants(block_size: int, tiny: float, partial: bool, check: bool) -> dict[str, Any]:
    blocks = TILE // block_size
    return {"TINY": tiny, "BLOCK": block_size, "BLOCKS": blocks, "PARTIAL": partial, "CHECK": check}


def variants() -> list[Variant]:
    """What the launcher compiles: block 64 in every type, other blocks and a partial one once."""
    found = [_variant(dtype, 64) for dtype in ("bf16", "fp16", "fp32", "fp64")]
    found += [_variant("bf16", block) for block in (32, 4096)]
    return [*found, _variant("bf16", 64, partial=True)]


def _variant(dtype: str, block_size: int, partial: bool = False) -> Variant:
    constants = _constants(block_size, 1e-38, partial, True)
    return Variant(
        name=f"quantize4/{dtype}/{block_size}{'/partial' if partial else ''}",
        kernel=_kernel,
        signature={
            "x_ptr": f"*{dtype}",
            "middle_ptr": "*fp32",
            "order_ptr": "*i32",
            "codes_ptr": "*u8",
            "scales_ptr": "*fp32",
            "flag_ptr": "*i32",
            "numel": "i64",
            **dict.fromkeys(constants, "constexpr"),
        },
        constants=constants,
        warps=WARPS,
        fp_fusion=False,
        weights=TILE / (WARPS * 32),
        exact=True,
        odd=frozenset(("flag_ptr", "numel")),
    )
