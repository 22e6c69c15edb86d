"""`x Wᵀ` for the fewest rows: 4-bit codes as two int8 planes on the integer tensor cores.

(Design note follows.)
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.blockwise4 import Weight4
from lora_kernels.gpu.decode import INTERPRETED, load_scales, narrow
from lora_kernels.gpu.finish4 import Update, finish
from lora_kernels.gpu.variant import Variant

__all__ = ["Tile", "default_tile", "multiply", "variants"]

TABLE = tl.constexpr(126 * 256 + 126)  # the largest entry of the table, as 256 H + L
ROW = tl.constexpr(127 * 65536 + 127 * 256 + 127)  # the largest value of a row of x, in digits
PART = 1024  # columns whose digits one program writes
DOWN = tl.constexpr(4)  # rows of LoRA's A that one program takes

ASM = tl.constexpr(torch.version.hip is None and not INTERPRETED.value)
# $0…$7: 8 weights each of Ha, Hb, La, Lb (two registers a plane); $8: 8 codes; then, as every
# scalar operand comes once for each of the 4 bytes that are decoded together, the 8 table words
_PRMT = "{ .reg .b32 far, second, last; xor.b32 far, $8, 0x88888888; shr.b32 second, $8, 16; "
_PRMT += "shr.b32 last, far, 16; " + " ".join(
    f"prmt.b32 ${2 * i}, ${9 + 8 * i}, ${13 + 8 * i}, {low}; "
    f"prmt.b32 ${2 * i + 1}, ${9 + 8 * i}, ${13 + 8 * i}, {high};"
    for i, (low, high) in enumerate((("$8", "second"), ("far", "last")) * 2)
)
PRMT = tl.constexpr(_PRMT + " }")
OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 33))


@dataclass(frozen=True)
class Tile:
    """How the product is cut into programs."""

    inputs: int
    """rows of x that share a program's decoded weights: 2, 4 or 8"""
    rows: int
    """rows of W a program, a multiple of 16"""
    blocks: int
    """groups of 64 columns that a warp decodes in one step"""
    warps: int
    """warps a program, each with columns of its own"""
    splits: int
    """slices of K in programs of their own"""


def default_tile(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """The tile where none was measured.

    Args:
        m: rows of x.
        n: rows of W.
        k: columns of both.
        dtype: of x.

    Returns:
        A tile that gives a large GPU two programs a multiprocessor where the weight is large enough.
    """
    del dtype  # decoding costs the same
    inputs = 2 if m <= 2 else 4 if m <= 4 else 8
    rows, blocks, warps = 16, 4 if inputs == 2 else 2, 4
    programs = -(-n // rows) * -(-max(m, 1) // inputs)
    steps = -(-k // (64 * blocks * warps))
    splits = min(steps, -(-PROGRAMS // programs))
    return Tile(inputs, rows, blocks, warps, splits)


PROGRAMS = 240


def multiply(
    x: Tensor, weight: Weight4, bias: Tensor | None, update: Update | None, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """`y = x Wᵀ + bias`, and LoRA's update in the same pass.

    Args:
        x: (M, K), bfloat16 or float16, its last dimension contiguous.
        weight: codes and scales of W (N, K), K a multiple of the block size.
        bias: (N,) or None.
        update: the low-rank update, or None.
        tile: block sizes.

    Returns:
        y (M, N) in the dtype of x; with an update `x Aᵀ` (M, r) in float32, else None.
    """
    m, k = x.shape
    n = weight.out_features
    y = x.new_empty(m, n)
    if update is None and m == 0:
        return y, None
    columns = min(weight.block_size, 64)
    step = columns * tile.blocks * tile.warps
    steps = triton.cdiv(triton.cdiv(k, step), tile.splits)
    splits = triton.cdiv(triton.cdiv(k, step), steps)
    extra = 0 if update is None else update.width
    direct = splits == 1 and update is None
    out = y if direct else x.new_empty(splits, m, n + extra, dtype=torch.float32)
    if m:
        prepared = _prepare(x, weight.table, tile.inputs, columns, splits * steps * step)
        grid = (
            triton.cdiv(n, tile.rows) + triton.cdiv(extra, DOWN.value),
            splits,
            triton.cdiv(m, tile.inputs),
        )
        arranged = weight.arranged is not None and columns == 64
        _planes_kernel[grid](
            *prepared,
            weight.arranged if arranged else weight.codes,
            weight.scales,
            weight.scale_absmax,
            weight.scale_offset,
            weight.scale_table,
            bias if direct else None,
            x,
            None if update is None else update.down,
            out,
            m,
            n,
            k,
            x.stride(0),
            extra,
            steps,
            BLOCK=weight.block_size,
            INPUTS=tile.inputs,
            GROUPS=tile.rows // 16,
            BLOCKS=tile.blocks,
            WARPS=tile.warps,
            ARRANGED=arranged,
            EVEN=k == splits * steps * step,
            ASM=ASM.value,
            num_warps=tile.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    if direct:
        return y, None
    return finish(out, n, bias, update, x.dtype)


def _prepare(
    x: Tensor, table: Tensor, inputs: int, columns: int, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Digits of x, the largest magnitude of each row, and the tables; see `_digits_kernel`."""
    m, k = x.shape
    rows = triton.cdiv(m, inputs) * inputs
    digits = x.new_empty(
        rows // inputs, padded // columns, 4 * inputs + 1, columns, dtype=torch.int8
    )
    largest = x.new_empty(rows + 1, dtype=torch.float32)
    tables = x.new_empty(64, dtype=torch.int8)
    _digits_kernel[(rows + 1, triton.cdiv(padded, PART))](
        x,
        table,
        digits,
        largest,
        tables,
        m,
        k,
        x.stride(0),
        padded,
        INPUTS=inputs,
        COLUMNS=columns,
        PART=PART,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return digits, largest, tables


@triton.jit
def _last_digit(v):
    """v = 256 a + b with b in [-128, 127]: (a, b)."""
    b = ((v + 128) & 255) - 128
    return (v - b) >> 8, b


@triton.jit
def _spread(own, partner, first):
    """The entry that leaves `own` when the sign of its partner is added; see the docstring."""
    a = tl.where(first, own, partner)
    b = tl.where(first, partner, own)
    below = (b < -1) | ((b == -1) & (a >= -1))  # whether b will be stored as a negative number
    a += below.to(tl.int32)
    b += (a < 0).to(tl.int32)
    return tl.where(first, a, b)


@triton.jit
def _write_tables(table_ptr, tables_ptr, unit_ptr):
    """(64,) int8: H and L for byte permutes, H and L for plain look-up, 16 each; and their unit."""
    i = tl.arange(0, 16)
    largest = tl.max(tl.abs(tl.load(table_ptr + i)), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    own = tl.floor(tl.div_rn(tl.load(table_ptr + i), largest) * TABLE + 0.5).to(tl.int32)
    partner = tl.floor(tl.div_rn(tl.load(table_ptr + (i ^ 8)), largest) * TABLE + 0.5).to(tl.int32)
    high, low = _last_digit(own)
    other_high, other_low = _last_digit(partner)
    low = tl.minimum(low, 126)  # room for the one that `_spread` may add
    other_low = tl.minimum(other_low, 126)
    tl.store(tables_ptr + i, _spread(high, other_high, i < 8).to(tl.int8))
    tl.store(tables_ptr + 16 + i, _spread(low, other_low, i < 8).to(tl.int8))
    tl.store(tables_ptr + 32 + i, high.to(tl.int8))
    tl.store(tables_ptr + 48 + i, low.to(tl.int8))
    # 2^24: the columns of digits are added as 1, 1 / 256, …, so that nothing grows
    tl.store(unit_ptr, tl.div_rn(largest, TABLE * 1.0) * tl.div_rn(16777216.0, ROW * 1.0))


@triton.jit(do_not_specialize=["m", "stride", "padded"])
def _digits_kernel(
    x_ptr,  # (M, K) 16-bit
    table_ptr,  # (16,) float32
    digits_ptr,  # (tiles of rows, groups of columns, 4 INPUTS + 1, COLUMNS) int8
    largest_ptr,  # (tiles * INPUTS + 1,) float32; the last one is the unit of the sums
    tables_ptr,  # (64,) int8
    m,
    k,
    stride,
    padded,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Each row of x as three signed digits in base 256, x = largest / ROW * (65536 a + 256 b + c).

    A row's four lines are a, b, c, 0, and a line of zeros comes before the first row, so that a
    tile that starts one line earlier holds 0, a, b, c.
    """
    row = tl.program_id(0)
    if row == tl.num_programs(0) - 1:
        if tl.program_id(1) == 0:
            _write_tables(table_ptr, tables_ptr, largest_ptr + row)
    else:
        x_ptr += row.to(tl.int64) * stride
        # as integers, magnitudes order like numbers, and infinity and NaN come last
        top = tl.zeros((4 * PART,), tl.int32)
        length = tl.where(row < m, k, 0)
        for start in range(0, length, 4 * PART):
            i = start + tl.arange(0, 4 * PART)
            x = tl.load(x_ptr + i, mask=i < length, other=0.0).to(tl.float32)
            top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        top = tl.max(top, 0)
        finite = top < 0x7F800000
        largest = top.to(tl.float32, bitcast=True)
        if tl.program_id(1) == 0:
            tl.store(largest_ptr + row, tl.where(finite, largest, float("nan")))
        i = tl.program_id(1) * PART + tl.arange(0, PART)
        # the low nibble of a byte, the odd column, is decoded first
        x = tl.load(x_ptr + (i ^ 1), mask=i < length, other=0.0).to(tl.float32)
        usable = finite & (top > 0)
        x = tl.where(usable, tl.div_rn(x, tl.where(usable, largest, 1.0)), 0.0)  # in [-1, 1]
        v, c = _last_digit(tl.floor(x * ROW + 0.5).to(tl.int32))
        a, b = _last_digit(v)
        lines: tl.constexpr = 4 * INPUTS + 1
        first = row // INPUTS * (padded // COLUMNS).to(tl.int64) * (lines * COLUMNS)
        out = digits_ptr + first + i // COLUMNS * (lines * COLUMNS) + i % COLUMNS
        line = row % INPUTS * 4
        inside = i < padded
        tl.store(out + (line + 1) * COLUMNS, a.to(tl.int8), mask=inside)
        tl.store(out + (line + 2) * COLUMNS, b.to(tl.int8), mask=inside)
        tl.store(out + (line + 3) * COLUMNS, c.to(tl.int8), mask=inside)
        tl.store(out + (line + 4) * COLUMNS, tl.zeros((PART,), tl.int8), mask=inside)
        if line == 0:
            tl.store(out, tl.zeros((PART,), tl.int8), mask=inside)


@triton.jit
def _bytes(words):
    """int32 (I, J) -> its bytes, uint8 (I, J, 2, 2)."""
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.join(even, odd)


@triton.jit
def _pair(both):
    """Two int8 weights in an int16 -> (..., 2), low nibble first."""
    return tl.join((both & 255).to(tl.int8), (both >> 8).to(tl.int8))


@triton.jit
def _decode(words, tables_ptr, t0, t1, t2, t3, t4, t5, t6, t7, ASM: tl.constexpr):
    """Codes to int8 weights (..., 2): the planes Ha, Hb, La, Lb, of which a plain look-up needs two."""
    codes = _bytes(words)
    if ASM:
        ha, hb, la, lb = tl.inline_asm_elementwise(
            PRMT,
            OPERANDS,
            [codes, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        return _pair(ha), _pair(hb), _pair(la), _pair(lb)
    else:
        at = tl.join(codes & 15, codes >> 4).to(tl.int32)
        high = tl.load(tables_ptr + 32 + at)
        low = tl.load(tables_ptr + 48 + at)
        return high, high, low, low


@triton.jit
def _operand(lower, upper, BATCH: tl.constexpr, COLUMNS: tl.constexpr, ARRANGED: tl.constexpr):
    """Decoded weights as the left operand (BATCH, 16, COLUMNS), a renaming of registers.

    A lane 4 g + j holds COLUMNS / 4 consecutive columns of rows g and g + 8. They are named so that
    they are what `mma` expects there: column (p, j, q, i) of the operand is column (j, q, p, i) of W.
    """
    if ARRANGED:
        w = lower.reshape(BATCH, 8, 4, 2, COLUMNS // 32, 2, 4)  # g j half q p i
        return w.permute(0, 3, 1, 5, 2, 4, 6).reshape(BATCH, 16, COLUMNS)
    else:
        w = tl.join(lower, upper).reshape(BATCH, 8, 4, COLUMNS // 32, 2, 4, 2)  # g j q p i half
        return w.permute(0, 6, 1, 4, 2, 3, 5).reshape(BATCH, 16, COLUMNS)


@triton.jit
def _digit_tile(
    digits_ptr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(BATCH, COLUMNS, 4 INPUTS) int8, columns named as in `_operand`."""
    i = tl.arange(0, INPUTS // 2 * BLOCKS * WARPS * 8)
    block = i // 8 % WARPS * BLOCKS + i // 8 // WARPS % BLOCKS
    line = i // 8 // (WARPS * BLOCKS) * 8 + i % 8
    at = (block * (4 * INPUTS + 1) + line) * COLUMNS
    x = tl.load(digits_ptr + at[:, None] + tl.arange(0, COLUMNS)[None, :])
    x = x.reshape(
        INPUTS // 2, BLOCKS * WARPS, 8, 4, COLUMNS // 32, 2, 4
    )  # line/8, block, line%8, j q p i
    x = x.permute(1, 5, 3, 4, 6, 0, 2).reshape(1, BLOCKS * WARPS, COLUMNS, 4 * INPUTS)
    x = x.broadcast_to(GROUPS, BLOCKS * WARPS, COLUMNS, 4 * INPUTS)
    return x.reshape(GROUPS * BLOCKS * WARPS, COLUMNS, 4 * INPUTS)


@triton.jit
def _down_rows(
    x_ptr,
    down_ptr,
    out_ptr,
    first,
    m,
    k,
    stride,
    extra,
    start,
    stop,
    row_stride,
    INPUTS: tl.constexpr,
):
    """x Aᵀ of a few rows of A, in float32 on the ordinary cores: (INPUTS, DOWN)."""
    WIDE: tl.constexpr = 1024 // INPUTS
    r = first + tl.arange(0, DOWN)
    i = tl.program_id(2) * INPUTS + tl.arange(0, INPUTS)
    a_at = down_ptr + r.to(tl.int64)[:, None] * k
    x_at = x_ptr + i.to(tl.int64)[:, None] * stride
    total = tl.zeros((INPUTS, DOWN, WIDE), tl.float32)
    for at in range(start, stop, WIDE):
        column = at + tl.arange(0, WIDE)
        inside = (column < stop)[None, :]
        a = tl.load(a_at + column[None, :], mask=(r < extra)[:, None] & inside, other=0.0)
        x = tl.load(x_at + column[None, :], mask=(i < m)[:, None] & inside, other=0.0)
        total += x.to(tl.float32)[:, None, :] * a[None, :, :]
    h = tl.sum(total, 2)
    keep = (i < m)[:, None] & (r < extra)[None, :]
    tl.store(out_ptr + i.to(tl.int64)[:, None] * row_stride + r[None, :], h, mask=keep)


@triton.jit(do_not_specialize=["m", "n", "stride", "extra", "steps"])
def _planes_kernel(
    digits_ptr,  # (tiles of x, groups, 4 INPUTS + 1, COLUMNS) int8
    largest_ptr,  # (tiles of x * INPUTS + 1,) float32
    tables_ptr,  # (64,) int8
    codes_ptr,  # (N K / 2,) uint8, stored or arranged
    scales_ptr,  # (N K / BLOCK,) uint8 or float32
    absmax_ptr,  # float32, with uint8 scales
    offset_ptr,
    scale_table_ptr,
    bias_ptr,  # (N,) or None
    x_ptr,  # (M, K), for LoRA
    down_ptr,  # (extra, K) float32, or None
    out_ptr,  # y (M, N), or partials (splits, M, N + extra) float32
    m,
    n,
    k,
    stride,
    extra,
    steps,
    BLOCK: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    ARRANGED: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    COLUMNS: tl.constexpr = min(BLOCK, 64)  # of a group, which shares a scale
    STEP: tl.constexpr = BLOCKS * WARPS  # groups
    BATCH: tl.constexpr = GROUPS * STEP
    LINES: tl.constexpr = 4 * INPUTS
    NESTED: tl.constexpr = scales_ptr.dtype.element_ty == tl.uint8
    tiles = tl.cdiv(n, 16 * GROUPS)
    out_ptr += tl.program_id(1).to(tl.int64) * m * (n + extra)
    groups = k // COLUMNS  # of a row
    begin = tl.program_id(1) * steps * STEP
    if tl.program_id(0) >= tiles:
        if down_ptr is not None:
            first = (tl.program_id(0) - tiles) * DOWN
            start = begin * COLUMNS
            stop = min(start + steps * STEP * COLUMNS, k)
            _down_rows(
                x_ptr,
                down_ptr,
                out_ptr + n,
                first,
                m,
                k,
                stride,
                extra,
                start,
                stop,
                n + extra,
                INPUTS,
            )
    else:
        row = tl.program_id(0) * (16 * GROUPS)
        # the tables stay in registers
        table = tables_ptr.to(tl.pointer_type(tl.int32))
        t0, t1, t2, t3 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
        t4, t5, t6, t7 = (
            tl.load(table + 4),
            tl.load(table + 5),
            tl.load(table + 6),
            tl.load(table + 7),
        )

        # codes: warp w decodes the BLOCKS groups from w BLOCKS on; the batch is (16 rows, block, w)
        words = codes_ptr.to(tl.pointer_type(tl.int32))
        if ARRANGED:
            i = tl.arange(0, BATCH * 32)
            LANES: tl.constexpr = 32
            WORDS: tl.constexpr = 4
            strip = (
                tl.minimum(row // 16 + i // (32 * STEP), tl.cdiv(n, 16) - 1).to(tl.int64) * groups
            )
            low = words + (strip + begin)[:, None] * 128
            JUMP: tl.constexpr = 128
        else:
            LANES: tl.constexpr = 8
            WORDS: tl.constexpr = COLUMNS // 8
            JUMP: tl.constexpr = COLUMNS // 8
            i = tl.arange(0, BATCH * 8)
            at = row + i // (8 * STEP) * 16 + i % 8
            low = words + (tl.minimum(at, n - 1).to(tl.int64) * (k // 8) + begin * JUMP)[:, None]
            high = (
                words + (tl.minimum(at + 8, n - 1).to(tl.int64) * (k // 8) + begin * JUMP)[:, None]
            )
        block = i // LANES % WARPS * BLOCKS + i // (LANES * WARPS) % BLOCKS
        inner = block[:, None] * JUMP + tl.arange(0, WORDS)[None, :]
        if ARRANGED:
            inner += (i % 32)[:, None] * 4
        else:
            inner = tl.max_contiguous(tl.multiple_of(inner, (1, WORDS // 4)), (1, WORDS // 4))
        low += inner
        low_words = tl.load(low, mask=EVEN or (begin + block < groups)[:, None], other=0)
        if not ARRANGED:
            high += inner
            high_words = tl.load(high, mask=EVEN or (begin + block < groups)[:, None], other=0)

        # scales: a lane loads neighbouring groups of one row
        i = tl.arange(0, WARPS * GROUPS * 16)
        scale_row = tl.minimum(row + i % (16 * GROUPS), n - 1) * (k // BLOCK)
        scale_group = (i // (16 * GROUPS) * BLOCKS)[:, None] + tl.arange(0, BLOCKS)[None, :]

        digits = digits_ptr + (
            tl.program_id(2).to(tl.int64) * tl.num_programs(1) * steps * STEP + begin
        ) * ((LINES + 1) * COLUMNS)
        total = tl.zeros((BATCH, 16, LINES), tl.float32)
        for step in range(steps):
            group = begin + step * STEP + scale_group
            s = load_scales(
                scales_ptr,
                absmax_ptr,
                offset_ptr,
                scale_table_ptr,
                scale_row[:, None] + group // (BLOCK // COLUMNS),
                EVEN or group < groups,
                NESTED,
            )
            s = s.reshape(WARPS, GROUPS, 16, BLOCKS).permute(1, 3, 0, 2).reshape(BATCH, 16)
            ha, hb, la, lb = _decode(low_words, tables_ptr, t0, t1, t2, t3, t4, t5, t6, t7, ASM)
            if ARRANGED:
                hc, hd, lc, ld = ha, hb, la, lb
            else:
                hc, hd, lc, ld = _decode(
                    high_words, tables_ptr, t0, t1, t2, t3, t4, t5, t6, t7, ASM
                )
            # the next step's codes are on their way while this one's are used
            ahead = (step + 1 < steps).to(tl.int32) * STEP
            low += ahead * JUMP
            inside = EVEN or (begin + step * STEP + ahead + block < groups)[:, None]
            low_words = tl.load(low, mask=inside, other=0)
            if not ARRANGED:
                high += ahead * JUMP
                high_words = tl.load(high, mask=inside, other=0)
            x = _digit_tile(digits + COLUMNS, GROUPS, BLOCKS, WARPS, INPUTS, COLUMNS)  # a b c 0
            z = _digit_tile(digits, GROUPS, BLOCKS, WARPS, INPUTS, COLUMNS)  # 0 a b c
            digits += STEP * (LINES + 1) * COLUMNS
            d = tl.dot(_operand(ha, hc, BATCH, COLUMNS, ARRANGED), x, out_dtype=tl.int32)
            if ASM:
                d = tl.dot(_operand(hb, hd, BATCH, COLUMNS, ARRANGED), x, d, out_dtype=tl.int32)
            d = tl.dot(_operand(la, lc, BATCH, COLUMNS, ARRANGED), z, d, out_dtype=tl.int32)
            if ASM:
                d = tl.dot(_operand(lb, ld, BATCH, COLUMNS, ARRANGED), z, d, out_dtype=tl.int32)
            s = tl.broadcast_to(s[:, :, None], (BATCH, 16, LINES))
            total = tl.fma(d.to(tl.float32), s, total)

        # add up blocks and warps, then the digits
        y = tl.sum(total.reshape(GROUPS, STEP, 16, LINES), 1).reshape(16 * GROUPS, INPUTS, 4)
        weights = tl.exp2(-8.0 * tl.arange(0, 4))
        y = tl.sum(y * weights[None, None, :], 2) * tl.load(
            largest_ptr + tl.num_programs(2) * INPUTS
        )
        i = tl.program_id(2) * INPUTS + tl.arange(0, INPUTS)
        y *= tl.load(largest_ptr + i)[None, :]  # (rows, INPUTS)
        r = row + tl.arange(0, 16 * GROUPS)
        keep = (r < n)[:, None] & (i < m)[None, :]
        out = out_ptr + i.to(tl.int64)[None, :] * (n + extra) + r[:, None]
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + r, mask=r < n, other=0.0).to(tl.float32)
            y += narrow(bias, dtype).to(tl.float32)[:, None]
        tl.store(out, narrow(y, dtype), mask=keep)


def variants() -> list[Variant]:
    """Every form that `multiply` launches where no tile was measured, for blocks of 64."""
    forms = [
        _variant(dtype, rows, scales, arranged)
        for dtype in ("bf16", "fp16")
        for rows in (1, 4, 8)
        for scales in ("u8", "fp32")
        for arranged in (False, True)
    ]
    forms.append(_variant("bf16", 1, "u8", False, asm=False))
    return forms


def _variant(
    dtype: str, m: int, scales: str, arranged: bool, asm: bool = True, **other: Any
) -> Variant:
    """`x` of M rows, a large weight, blocks of 64, slices of K, with LoRA's part."""
    tile = default_tile(m, 4096, 4096, torch.bfloat16)
    constants: dict[str, Any] = {
        "BLOCK": 64,
        "INPUTS": tile.inputs,
        "GROUPS": tile.rows // 16,
        "BLOCKS": tile.blocks,
        "WARPS": tile.warps,
        "ARRANGED": arranged,
        "EVEN": True,
        "ASM": asm,
        "bias_ptr": None,
    } | other
    if scales == "fp32":
        constants |= dict.fromkeys(("absmax_ptr", "offset_ptr", "scale_table_ptr"))
    signature = {"digits_ptr": "*i8", "largest_ptr": "*fp32", "tables_ptr": "*i8"}
    signature |= {"codes_ptr": "*u8", "scales_ptr": f"*{scales}", "absmax_ptr": "*fp32"}
    signature |= {"offset_ptr": "*fp32", "scale_table_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
    signature |= {"x_ptr": f"*{dtype}", "down_ptr": "*fp32", "out_ptr": "*fp32"}
    signature |= dict.fromkeys(("m", "n", "k", "stride", "extra", "steps"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    layout = "arranged" if arranged else "stored"
    nested = "nested" if scales == "u8" else "flat"
    return Variant(
        f"planes4/{dtype}/{tile.inputs} rows/{nested}/{layout}{'' if asm else '/look-up'}",
        _planes_kernel,
        signature,
        constants,
        warps=constants["WARPS"],
        fp_fusion=False,
        weights=32.0 * constants["GROUPS"] * constants["BLOCKS"],
        asm=asm,
        odd=frozenset(("m", "n", "stride", "extra", "steps")),
    )
