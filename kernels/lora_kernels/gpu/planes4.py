"""`x Wᵀ` for the fewest rows: 4-bit codes as two int8 planes on the integer tensor cores.

Reading a weight's half byte takes an H200 less time than any known kernel takes to decode it:
bitsandbytes issues 8.7 instructions a weight at one row of x and more with every row, and the
memory is busy throughout only below about 3.6. So what this kernel saves is instructions.

**The sum.** With code ~ 256 H + L, a row of x as digits a, b, c in base 256 (digits4.py), and the
sum over a group of 64 columns, which share a scale,

    sum code x ~ 2^24 H·a + 2^16 (H·b + L·a) + 2^8 (H·c + L·b) + L·c

Each bracket is a column of an int8 product with int32 sums, which are exact: 64 terms stay below
2^22. H meets the columns a b c 0 and L the columns 0 a b c, so both add into one accumulator of 4
columns a row of x. It is multiplied by the scale once a group, and at the end by the powers of 256,
the size of the row and the unit of the table. Of the result's error this leaves some 1e-5, where
16-bit weights have 1.7e-3; the rounding of the result to 16 bits is nearly all there is.

Decoding and the layout of the operands are in operands4.py. Scales are the only thing that moves
between lanes: each lane loads and decodes one and they pass through shared memory, where the four
lanes that need the same one would otherwise each decode it, a fifth of all instructions.

**The loop.** A program has 32 rows of W. Each of its warps has groups of its own, every fourth, so
a row is read 128 bytes at a time, and warps are added up at the end. Codes and scales of two steps
are on their way while two are used: 2 KB a warp, 40 KB a multiprocessor with five programs. Rows
of LoRA's A are further programs, which multiply in float32. Where W has too few rows to fill a GPU,
K is split, and finish4.py adds the parts in a fixed order. Digits cost a launch of their own.

Instructions a weight in the loop for sm_90, scales included, triton 3.6 and 3.7 alike:

    rows of x                    1, 2    3, 4    5 to 8     registers
    stored, nested scales        2.4     3.0     4.0        100, 138, 176
    stored, float32 scales       2.2     2.8     3.8        100, 128, 176
    arranged, nested scales      2.4     2.9     3.9         98, 128, 174

About 250 more come before and after the loop. Arranging saves 4 loads of 311 instructions; what it
saves in cache lines a GPU has to tell.

What was tried, in instructions a weight at one row. Selecting among 16 entries with a third permute
instead of a product: 3.6 to 4.0. Codes carried through the loop as bytes: 5.3, as the compiler
loses sight of the words. One copy of the tables for all lanes: up to 3.5, as ptxas keeps what lanes
share in uniform registers and moves it back before each use. Both buffers in one batch of twice the
size: 2.5, but 168 registers. Four lanes that decode the same scale: 0.3 more. An accumulator that
starts at 1.5 * 2^23, so that its bits are a float and a subtraction on a less busy unit converts
it: the same count, at times with moves.

Blocks of 32 take the same way at more than twice the cost, as lanes exchange columns there.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.decode import INTERPRETED, load_scales, narrow
from lora_kernels.gpu.digits4 import prepare
from lora_kernels.gpu.finish4 import Update, finish
from lora_kernels.gpu.operands4 import code_pointers, decode, digit_tiles, load_tables, weight_tile
from lora_kernels.gpu.variant import Variant
from lora_kernels.operands import Weight4

__all__ = ["Tile", "default_tile", "multiply", "variants"]

PROGRAMS = 400  # that a large GPU should get, three a multiprocessor
DOWN = tl.constexpr(4)  # rows of LoRA's A a program
ASM = torch.version.hip is None and not INTERPRETED.value


@dataclass(frozen=True)
class Tile:
    """How the product is cut into programs."""

    rows: int
    """rows of x a program: 2, 4 or 8"""
    features: int
    """rows of W a program: 16, 32 or 64"""
    warps: int
    """warps a program, each with groups of columns of its own"""
    splits: int
    """parts into which K is cut, each in programs of its own"""


def default_tile(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """The tile where none was measured.

    Args:
        m: rows of x.
        n: rows of W.
        k: columns of both.
        dtype: of x.

    Returns:
        A tile of few registers, and as many splits as give a large GPU enough programs.
    """
    del dtype  # digits are the same for both
    rows = 2 if m <= 2 else 4 if m <= 4 else 8
    features, warps = 32, 4
    programs = triton.cdiv(n, features) * triton.cdiv(max(m, 1), rows)
    most = triton.cdiv(k, 2 * 64 * warps)
    return Tile(rows, features, warps, min(most, triton.cdiv(PROGRAMS, programs)))


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

    Raises:
        ValueError: block sizes that the kernel does not have.
    """
    _check(tile)
    (m, k), n = x.shape, weight.out_features
    columns = min(weight.block_size, 64)
    step = columns * tile.warps
    # whole pairs of steps in every split, and no split without any
    steps = 2 * triton.cdiv(triton.cdiv(k, 2 * step), tile.splits)
    splits = triton.cdiv(k, steps * step)
    extra = 0 if update is None else update.width
    direct = splits == 1 and update is None
    y = x.new_empty(m, n) if direct else x.new_empty(splits, m, n + extra, dtype=torch.float32)
    if m:
        padded = splits * steps * step
        prepared = prepare(x, weight.table, tile.rows, columns, padded)
        codes = weight.codes if weight.arranged is None or columns < 64 else weight.arranged
        tiles = triton.cdiv(n, tile.features) + triton.cdiv(extra, DOWN.value)
        _planes_kernel[(tiles, splits, triton.cdiv(m, tile.rows))](
            *prepared,
            _aligned(codes),
            weight.scales,
            weight.scale_absmax,
            weight.scale_offset,
            weight.scale_table,
            bias if direct else None,
            x,
            None if update is None else update.down,
            y,
            m,
            n,
            k,
            x.stride(0),
            extra,
            steps,
            BLOCK=weight.block_size,
            ROWS=tile.rows,
            STRIPS=tile.features // 16,
            WARPS=tile.warps,
            ARRANGED=codes is weight.arranged,
            EVEN=k == padded,
            ASM=ASM,
            num_warps=tile.warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
    if direct:
        return y, None
    return finish(y, n, bias, update, x.dtype)


def _aligned(codes: Tensor) -> Tensor:
    """The codes at an address that 16-byte loads take; a view into a file may have another."""
    return codes.clone() if codes.data_ptr() % 16 else codes


def _check(tile: Tile) -> None:
    if tile.rows not in (2, 4, 8) or tile.features not in (16, 32, 64) or tile.splits < 1:
        raise ValueError(
            "a tile has 2, 4 or 8 rows, 16, 32 or 64 features and at least 1 split; "
            f"got rows {tile.rows}, features {tile.features}, splits {tile.splits}"
        )


@triton.jit(do_not_specialize=["m", "n", "stride", "extra", "steps"])
def _planes_kernel(
    digits_ptr,  # (tiles of x, groups, 4 ROWS + 1, COLUMNS) int8
    largest_ptr,  # (tiles of x * ROWS + 1,) float32
    tables_ptr,
    codes_ptr,  # (N K / 2,) uint8, as they are stored or arranged
    scales_ptr,  # (N K / BLOCK,) uint8 or float32
    absmax_ptr,  # what decodes uint8 scales
    offset_ptr,
    scale_table_ptr,
    bias_ptr,  # (N,) or None
    x_ptr,  # (M, K), for LoRA's part
    down_ptr,  # (extra, K) float32 or None
    y_ptr,  # (M, N), or partials (splits, M, N + extra) float32
    m,
    n,
    k,
    stride,
    extra,
    steps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    WARPS: tl.constexpr,
    ARRANGED: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """One program: 16 STRIPS rows of W, or DOWN rows of A, times ROWS rows of x, over one split."""
    COLUMNS: tl.constexpr = min(BLOCK, 64)  # of a group; a step is a group a warp
    tiles = tl.cdiv(n, 16 * STRIPS)
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * steps * WARPS  # group
    y_ptr += tl.program_id(1).to(tl.int64) * m * (n + extra)
    y_at = y_ptr + i.to(tl.int64)[None, :] * (n + extra)  # (1, ROWS)
    if tl.program_id(0) < tiles:
        first = tl.program_id(0) * (16 * STRIPS)
        part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * steps * WARPS + begin
        digits_ptr += part * ((4 * ROWS + 1) * COLUMNS)
        NEXT: tl.constexpr = WARPS * (4 * ROWS + 1) * COLUMNS  # digits of a step
        tables = load_tables(tables_ptr, ASM)
        codes = code_pointers(codes_ptr, first, begin, n, k, COLUMNS, STRIPS, WARPS, ARRANGED)
        # one scale a lane, and the warp that needs it
        i_scale = tl.arange(0, WARPS * STRIPS * 16)
        scale_row = tl.minimum(first + i_scale % (16 * STRIPS), n - 1) * (k // BLOCK)
        at = (scale_row, i_scale // (16 * STRIPS), begin, k // COLUMNS)
        scales = (scales_ptr, absmax_ptr, offset_ptr, scale_table_ptr)
        total = tl.zeros((STRIPS * WARPS, 16, 4 * ROWS), tl.float32)
        # two steps are on their way: a buffer is filled again as soon as it has been used
        low0, high0, s0 = _fetch(codes, scales, at, 0, BLOCK, ARRANGED, EVEN)
        low1, high1, s1 = _fetch(codes, scales, at, WARPS, BLOCK, ARRANGED, EVEN)
        for step in range(0, steps, 2):
            ahead = tl.minimum(step + 2, steps - 2) * WARPS  # the last ones come again
            x, z = digit_tiles(digits_ptr, COLUMNS, ROWS, STRIPS, WARPS)
            d = _multiply(low0, high0, x, z, tables, COLUMNS, ARRANGED, ASM)
            total = _add(total, d, s0, STRIPS, WARPS)
            low0, high0, s0 = _fetch(codes, scales, at, ahead, BLOCK, ARRANGED, EVEN)
            x, z = digit_tiles(digits_ptr + NEXT, COLUMNS, ROWS, STRIPS, WARPS)
            d = _multiply(low1, high1, x, z, tables, COLUMNS, ARRANGED, ASM)
            total = _add(total, d, s1, STRIPS, WARPS)
            low1, high1, s1 = _fetch(codes, scales, at, ahead + WARPS, BLOCK, ARRANGED, EVEN)
            digits_ptr += 2 * NEXT
        y = _combine(total, STRIPS, WARPS, ROWS)  # (16 STRIPS, ROWS)
        y *= tl.load(largest_ptr + tl.num_programs(2) * ROWS)
        y *= tl.load(largest_ptr + i)[None, :]
        j = first + tl.arange(0, 16 * STRIPS)
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + j, mask=j < n, other=0.0).to(tl.float32)
            y += narrow(bias, dtype).to(tl.float32)[:, None]
        keep = (j < n)[:, None] & (i < m)[None, :]
        tl.store(y_at + j[:, None], narrow(y, dtype), mask=keep)
    elif down_ptr is not None:
        start = begin * COLUMNS
        stop = min(start + steps * WARPS * COLUMNS, k)
        first_down = (tl.program_id(0) - tiles) * DOWN
        _down(x_ptr, down_ptr, y_at + n, i, first_down, m, k, stride, extra, start, stop, ROWS)


@triton.jit
def _fetch(
    codes, scales, at, ahead, BLOCK: tl.constexpr, ARRANGED: tl.constexpr, EVEN: tl.constexpr
):
    """Codes of rows g and g + 8, and scales, `ahead` groups from the first.

    Groups from the end of K on have digits of 0, so that their codes may be anything.
    """
    low, high, warp = codes
    scale_row, scale_warp, begin, groups = at
    COLUMNS: tl.constexpr = min(BLOCK, 64)
    jump: tl.constexpr = 128 if ARRANGED else COLUMNS // 8
    inside = EVEN | (begin + ahead + warp < groups)[:, None]
    low_words = tl.load(low + ahead * jump, mask=inside, other=0)
    high_words = low_words if ARRANGED else tl.load(high + ahead * jump, mask=inside, other=0)
    group = begin + ahead + scale_warp
    s = load_scales(
        scales[0],
        scales[1],
        scales[2],
        scales[3],
        scale_row + group // (BLOCK // COLUMNS),
        EVEN | (group < groups),
        scales[0].dtype.element_ty == tl.uint8,
    )
    return low_words, high_words, s


@triton.jit
def _multiply(
    low_words,
    high_words,
    x,
    z,
    tables,
    COLUMNS: tl.constexpr,
    ARRANGED: tl.constexpr,
    ASM: tl.constexpr,
):
    """H [a b c 0] + L [0 a b c], a group of columns a warp: int32 (STRIPS * WARPS, 16, 4 ROWS)."""
    B: tl.constexpr = x.shape[0]
    low = decode(low_words, tables, ASM)
    high = low if ARRANGED else decode(high_words, tables, ASM)
    d = tl.dot(weight_tile(low[0], high[0], B, COLUMNS, ARRANGED), x, out_dtype=tl.int32)
    d = tl.dot(weight_tile(low[1], high[1], B, COLUMNS, ARRANGED), z, d, out_dtype=tl.int32)
    if ASM:
        d = tl.dot(weight_tile(low[2], high[2], B, COLUMNS, ARRANGED), x, d, out_dtype=tl.int32)
        d = tl.dot(weight_tile(low[3], high[3], B, COLUMNS, ARRANGED), z, d, out_dtype=tl.int32)
    return d


@triton.jit
def _add(total, d, s, STRIPS: tl.constexpr, WARPS: tl.constexpr):
    """total + s * d, the scales handed to the lanes that hold their rows."""
    s = s.reshape(WARPS, STRIPS, 16).permute(1, 0, 2).reshape(STRIPS * WARPS, 16)
    return tl.fma(d.to(tl.float32), tl.broadcast_to(s[:, :, None], total.shape), total)


@triton.jit
def _combine(total, STRIPS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """Add up the warps, then the digits, a + b / 256 + c / 65536: (16 STRIPS, ROWS)."""
    y = tl.sum(total.reshape(STRIPS, WARPS, 16, 4 * ROWS), 1).reshape(16 * STRIPS, ROWS, 4)
    # the columns are H a, H b + L a, H c + L b, L c
    return tl.sum(y * tl.exp2(-8.0 * tl.arange(0, 4))[None, None, :], 2)


@triton.jit
def _down(x_ptr, down_ptr, h_at, i, first, m, k, stride, extra, start, stop, ROWS: tl.constexpr):
    """x Aᵀ for DOWN rows of A, stored at h_at (1, ROWS): float32, A is not rounded."""
    WIDE: tl.constexpr = 1024 // ROWS
    j = first + tl.arange(0, DOWN)
    x_at = x_ptr + i.to(tl.int64)[None, :, None] * stride
    a_at = down_ptr + j.to(tl.int64)[:, None, None] * k
    total = tl.zeros((DOWN, ROWS, WIDE), tl.float32)
    for at in range(start, stop, WIDE):
        column = (at + tl.arange(0, WIDE))[None, None, :]
        x = tl.load(x_at + column, mask=(i < m)[None, :, None] & (column < stop), other=0.0)
        a = tl.load(a_at + column, mask=(j < extra)[:, None, None] & (column < stop), other=0.0)
        total += a * x.to(tl.float32)
    keep = (j < extra)[:, None] & (i < m)[None, :]
    tl.store(h_at + j[:, None], tl.sum(total, 2), mask=keep)


def variants() -> list[Variant]:
    """What `multiply` launches by default for blocks of 64, and the look-up of other GPUs.

    In one launch, and with LoRA as partials; float16 changes only how the result is stored.
    """
    forms = [_variant("fp16", 1, "u8", False, False)]
    for m in (1, 4, 8):
        forms += [
            _variant("bf16", m, "u8", False, False),
            _variant("bf16", m, "u8", False, True),
            _variant("bf16", m, "u8", True, False),
            _variant("bf16", m, "fp32", False, False),
        ]
    return [*forms, _variant("bf16", 1, "u8", False, False, asm=False)]


def _variant(
    dtype: str, m: int, scales: str, arranged: bool, update: bool, *, asm: bool = True
) -> Variant:
    tile = default_tile(m, 4096, 4096, torch.bfloat16)
    constants: dict[str, Any] = {
        "BLOCK": 64,
        "ROWS": tile.rows,
        "STRIPS": tile.features // 16,
        "WARPS": tile.warps,
        "ARRANGED": arranged,
        "EVEN": True,
        "ASM": asm,
    }
    constants["bias_ptr" if update else "down_ptr"] = None
    if scales == "fp32":
        constants |= dict.fromkeys(("absmax_ptr", "offset_ptr", "scale_table_ptr"))
    signature = {"digits_ptr": "*i8", "largest_ptr": "*fp32", "tables_ptr": "*i8"}
    signature |= {"codes_ptr": "*u8", "scales_ptr": f"*{scales}", "absmax_ptr": "*fp32"}
    signature |= {"offset_ptr": "*fp32", "scale_table_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
    signature |= {"x_ptr": f"*{dtype}", "down_ptr": "*fp32"}
    signature |= {"y_ptr": "*fp32" if update else f"*{dtype}"}
    signature |= dict.fromkeys(("m", "n", "k", "stride", "extra", "steps"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    parts = (
        f"planes4/{dtype}/{tile.rows} rows",
        "nested" if scales == "u8" else "flat",
        "arranged" if arranged else "stored",
        *(["update"] if update else []),
        *([] if asm else ["look-up"]),
    )
    return Variant(
        "/".join(parts),
        _planes_kernel,
        signature,
        constants,
        warps=tile.warps,
        fp_fusion=False,
        weights=2 * 32.0 * constants["STRIPS"],  # two steps a trip
        asm=asm,
        plain=not asm,
        odd=frozenset(("m", "n", "stride", "extra", "steps")),
        max_instructions=4.0 if asm and tile.rows == 2 else None,
    )
