"""4-bit codes to 16-bit weights in registers, in the very layout in which tensor cores want them.

The weight is the left operand of the product, whose 16 x 16 pieces a warp holds in registers: of
rows g and g + 8, lane 4 g + t has columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9. Stored codes reach that
layout without passing through shared memory, because two things are free:

* **Which column is which.** A dot product may take its terms in any order, so columns are renamed:
  lane t owns a run of 64 consecutive columns, 32 bytes, and x is read in the same order. One step
  of the loop covers 4 runs, 256 columns:

      column run t, word v, pair o, element e   ->   place ((v * 4 + o) * 4 + t) * 2 + e

* **Which row is which.** `own_rows` lists the rows of W in the order in which a plain load spreads
  them over warps and registers; after the reshape below they are in order for the tensor core.

A lane then has all 64 weights of a run, and a run has one scale (64 divides the block size, or is
the block; a block of 32 has runs of 32). So the *table* is scaled, once for 64 weights: 16 products
in float32, each rounded to 16 bits. Looking up then gives round(table[code] * scale), the same bits
that expanding the weight would give, for 0.5 instructions a weight; scaling each weight after the
lookup takes 2.5, and scaling the sums after the product needs a separate accumulator for each
block, registers that 128 rows of x do not leave.

A lookup is PRMT, which picks 4 bytes out of 8 by the low three bits of 4 selectors. Two of them and
a third that chooses between their results by the fourth bit look up one byte of 4 weights; low and
high bytes are two such lookups, and two more PRMT join them: 2 PRMT a weight, and 5 shifts and
masks for 8 weights.

AMD and Triton's interpreter have no PRMT and look up by loads instead. Same values, same order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import INTERPRETED, narrow
from lora_kernels.operands import Weight4

__all__ = [
    "aligned",
    "code_words",
    "decode",
    "dot16",
    "in_order",
    "left_operand",
    "load_codes",
    "load_table",
    "load_x",
    "own_rows",
    "pairs",
    "parts",
    "permute_x",
    "run_length",
    "scale_parts",
    "uses_assembly",
]


MULTIPROCESSORS = 132  # of the GPU the defaults are for
PROGRAMS = 3  # that one of them runs at a time


def run_length(block_size: int) -> int:
    """Columns in a row that one lane decodes with one scale."""
    return min(block_size, 64)


def parts(programs: int, steps: int, cost: float) -> int:
    """How many parts to cut a sum into: those with which the busiest multiprocessor ends first.

    Args:
        programs: that there are without cutting.
        steps: of each of them.
        cost: of writing a partial result and reading it again, in steps.

    Returns:
        A number from 1 to `steps`.
    """

    def work(count: int) -> float:
        each = -(-steps // count)
        share = -(-programs * -(-steps // each) // MULTIPROCESSORS)
        return max(share, PROGRAMS) * (each + (cost if count > 1 else 0))

    return min(range(1, min(steps, 64) + 1), key=work, default=1)


def uses_assembly() -> bool:
    """Whether this process launches the variants with NVIDIA assembly."""
    return not INTERPRETED.value and torch.version.hip is None


@functools.cache
def pairs(device: torch.device) -> int:
    """PAIRS of `left_operand` for a GPU.

    Args:
        device: where the product is computed.

    Returns:
        2 where Triton multiplies by `mma.sync`, for which it gives a lane of an operand made by
        `join` 4 neighbouring columns; 1 with `wgmma` (sm_90) and `tcgen05` (sm_100), where it gives
        2.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return 1
    return 1 if torch.cuda.get_device_capability(device)[0] in (9, 10, 11) else 2


def aligned(x: Tensor) -> Tensor:
    """x (M, K) as the kernels read it: rows that start at multiples of 16 bytes."""
    fits = x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    if fits:
        return x
    m, n = x.shape
    return x.new_empty(m, -(-n // 8) * 8)[:, :n].copy_(x)


def code_words(weight: Weight4) -> Tensor:
    """The codes as int32, 8 of them a word."""
    codes = weight.codes.reshape(-1)
    if codes.data_ptr() % 16:  # a slice of some file
        codes = codes.clone()
    return codes.view(torch.int32)


def scale_table(kind: str) -> str:
    """PTX: a scale and 16 table entries to 4 words of low and 4 of high bytes of the products."""
    lines = [".reg .b32 a, b; .reg .f32 u, v;"]
    for word in range(4):
        for register, entry in (("a", 4 * word), ("b", 4 * word + 2)):
            lines.append(f"mul.rn.f32 u, $8, ${9 + entry}; mul.rn.f32 v, $8, ${10 + entry};")
            lines.append(f"cvt.rn.{kind}x2.f32 {register}, v, u;")
        lines.append(f"prmt.b32 ${word}, a, b, 0x6420; prmt.b32 ${4 + word}, a, b, 0x7531;")
    return "{ " + " ".join(lines) + " }"


def look_up() -> str:
    """PTX: 8 codes and the 8 words of a scaled table to 4 words of 2 weights, high nibble first."""
    lines = [
        ".reg .b32 p, c, q, d, s, t, l, h;",
        "and.b32 p, $4, 0x77777777;",  # selectors among 8 entries
        "shr.b32 c, $4, 1; lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;",  # and between the halves
        "shr.b32 q, p, 16; shr.b32 d, c, 16;",
    ]
    for half, (pick, choose) in enumerate((("p", "c"), ("q", "d"))):
        for byte, first in (("l", 5), ("h", 9)):
            lines.append(f"prmt.b32 s, ${first}, ${first + 1}, {pick};")
            lines.append(f"prmt.b32 t, ${first + 2}, ${first + 3}, {pick};")
            lines.append(f"prmt.b32 {byte}, s, t, {choose};")
        lines.append(f"prmt.b32 ${2 * half}, l, h, 0x4051; prmt.b32 ${2 * half + 1}, l, h, 0x6273;")
    return "{ " + " ".join(lines) + " }"


SCALE_BF16 = tl.constexpr(scale_table("bf16"))
SCALE_FP16 = tl.constexpr(scale_table("f16"))
LOOK_UP = tl.constexpr(look_up())
# results are written before all inputs are read: & keeps them in registers of their own
SCALE_OPERANDS = tl.constexpr(",".join(["=&r"] * 8 + ["f"] * 17))
LOOK_UP_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 9))


@triton.jit
def load_table(table_ptr):
    """The 16 entries as scalars, which stay in registers."""
    p = table_ptr
    low = (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3))
    low += (tl.load(p + 4), tl.load(p + 5), tl.load(p + 6), tl.load(p + 7))
    high = (tl.load(p + 8), tl.load(p + 9), tl.load(p + 10), tl.load(p + 11))
    high += (tl.load(p + 12), tl.load(p + 13), tl.load(p + 14), tl.load(p + 15))
    return low + high


@triton.jit
def own_rows(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Row of the tile that the i-th loaded run is part of, (4 ROWS,)."""
    i = tl.arange(0, 4 * ROWS) // 4
    g, warp = i % 8, i // 8 % WARPS
    half, piece = i // (8 * WARPS) % 2, i // (16 * WARPS)
    return ((piece * WARPS + warp) * 2 + half) * 8 + g


@triton.jit
def load_codes(words, mask, RUN: tl.constexpr):
    """Runs of codes; `words` points at the first 4 words of each, (4 ROWS, 4).

    Rows and runs are one dimension, so that consecutive lanes load the 4 runs of a row. With two,
    whether they do depends on the version of Triton.
    """
    q = tl.load(words, mask=mask[:, None])
    if RUN == 64:
        return tl.join(q, tl.load(words + 4, mask=mask[:, None]))  # (4 ROWS, 4, 2)
    else:
        return q[:, :, None]


@triton.jit
def scale_parts(scales_ptr, absmax_ptr, block, mask, NESTED: tl.constexpr):
    """What of scales must come from memory, so that it can be asked for a step ahead."""
    scale = tl.load(scales_ptr + block, mask=mask, other=0)
    absmax = tl.load(absmax_ptr + block // 256, mask=mask, other=0.0) if NESTED else scale
    return scale, absmax


@triton.jit
def decode(
    q,  # (4 ROWS, 4, RUN / 32) words of 8 codes
    scale,  # (4 ROWS,) as `scale_parts` loaded them
    absmax,  # (4 ROWS,) likewise
    offset,
    scale_table_ptr,
    table,  # 16 scalars
    table_ptr,
    dtype: tl.constexpr,
    NESTED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Weights in `dtype`, (4 ROWS, 4 words, RUN / 32, 4 pairs, 2)."""
    if NESTED:
        scale = tl.load(scale_table_ptr + scale.to(tl.int32)) * absmax + offset
    if ASM:
        assembly: tl.constexpr = SCALE_BF16 if dtype == tl.bfloat16 else SCALE_FP16
        words = tl.inline_asm_elementwise(
            assembly,
            SCALE_OPERANDS,
            (scale,) + table,  # noqa: RUF005 - Triton's language has no star
            dtype=(tl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
        a, b, c, d = tl.inline_asm_elementwise(
            LOOK_UP,
            LOOK_UP_OPERANDS,
            (
                q,
                words[0][:, None, None],
                words[1][:, None, None],
                words[2][:, None, None],
                words[3][:, None, None],
                words[4][:, None, None],
                words[5][:, None, None],
                words[6][:, None, None],
                words[7][:, None, None],
            ),
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
        w = halves(tl.join(tl.join(a, c), tl.join(b, d)), dtype)
    else:
        # the first of two elements lies in the high nibble
        shift = (tl.arange(0, 8) ^ 1) * 4
        code = (q[:, :, :, None] >> shift) & 15  # (4 ROWS, 4, RUN / 32, 8)
        w = narrow(tl.load(table_ptr + code) * scale[:, None, None, None], dtype)
    return w.reshape(q.shape[0], 4, q.shape[2], 4, 2)


@triton.jit
def left_operand(w, WARPS: tl.constexpr, PAIRS: tl.constexpr):
    """Decoded weights of `own_rows` as (ROWS, 4 RUN), columns in the order of `permute_x`."""
    ROWS: tl.constexpr = w.shape[0] // 4
    GROUPS: tl.constexpr = w.shape[2]
    w = w.reshape(ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, GROUPS, 4 // PAIRS, PAIRS, 2)
    w = w.permute(0, 2, 1, 3, 6, 5, 7, 4, 8, 9)
    return w.reshape(ROWS, 128 * GROUPS)


@triton.jit
def in_order(w):
    """Decoded weights as (ROWS, 4 RUN), rows as loaded, columns as in W."""
    ROWS: tl.constexpr = w.shape[0] // 4
    GROUPS: tl.constexpr = w.shape[2]
    w = w.reshape(ROWS, 4, 4, GROUPS, 4, 2).permute(0, 1, 3, 2, 4, 5)
    return w.reshape(ROWS, 128 * GROUPS)


@triton.jit
def halves(words, dtype: tl.constexpr):
    """Words of two 16-bit numbers to a last dimension of 2, the low one first."""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def load_x(words, k, end, RUN: tl.constexpr, EVEN: tl.constexpr):
    """4 runs of rows of x as words of two numbers; `words` points at the first, (M, RUN / 2)."""
    half: tl.constexpr = RUN // 2
    x0 = tl.load(words, mask=(k < end) | EVEN, other=0)
    x1 = tl.load(words + half, mask=(k + RUN < end) | EVEN, other=0)
    x2 = tl.load(words + 2 * half, mask=(k + 2 * RUN < end) | EVEN, other=0)
    x3 = tl.load(words + 3 * half, mask=(k + 3 * RUN < end) | EVEN, other=0)
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))  # (M, RUN / 2, 2, 2)


@triton.jit
def permute_x(words, dtype: tl.constexpr, PAIRS: tl.constexpr):
    """What `load_x` loaded as (M, 4 RUN) in the order of `left_operand`."""
    words = words.reshape(words.shape[0], words.shape[1] // PAIRS, PAIRS, 4).permute(0, 1, 3, 2)
    x = halves(words, dtype)  # (M, RUN / 2 / PAIRS, 4, PAIRS, 2)
    return x.reshape(words.shape[0], words.shape[1] * 8 * PAIRS)


@triton.jit
def dot16(a, b, acc):
    """tl.dot of 16-bit operands; the interpreter's is wrong for bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)
