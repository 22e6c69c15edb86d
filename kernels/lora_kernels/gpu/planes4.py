"""`x Wᵀ` for the fewest rows: 4-bit codes as two int8 planes on the integer tensor cores.

(The design note follows.)
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.blockwise4 import Weight4
from lora_kernels.gpu.decode import INTERPRETED, load_scales, narrow
from lora_kernels.gpu.digits4 import LOOKUP, prepare
from lora_kernels.gpu.finish4 import Update, finish
from lora_kernels.gpu.variant import Variant

__all__ = ["DECODE", "Tile", "default_tile", "multiply", "variants"]

PROGRAMS = 240  # that a large GPU should get, about two a multiprocessor
DOWN = tl.constexpr(4)  # rows of LoRA's A a program
ASM = torch.version.hip is None and not INTERPRETED.value

# $0…$7: 8 weights of each of 4 planes; $8: 8 codes; then the 8 words of the tables, of which each
# comes 4 times, as Triton repeats a scalar for each of the 4 bytes that are decoded at once
_STEPS = ["xor.b32 far, $8, 0x88888888", "shr.b32 upper, $8, 16", "shr.b32 last, far, 16"]
for _plane, _selectors in enumerate((("$8", "upper"), ("far", "last")) * 2):
    for _half, _selector in enumerate(_selectors):
        _words = f"${9 + 8 * _plane}, ${13 + 8 * _plane}"
        _STEPS.append(f"prmt.b32 ${2 * _plane + _half}, {_words}, {_selector}")
DECODE = tl.constexpr("{ .reg .b32 far, upper, last; " + "; ".join(_STEPS) + "; }")
DECODE_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 33))
# each lane's own copy of the tables
TABLES = tl.constexpr(
    "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; mad.wide.u32 at, lane, 32, $8; "
    "ld.global.v4.b32 {$0, $1, $2, $3}, [at]; ld.global.v4.b32 {$4, $5, $6, $7}, [at + 16]; }"
)
TABLES_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["l"]))


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
        arranged = weight.arranged is not None and columns == 64
        tiles = triton.cdiv(n, tile.features) + triton.cdiv(extra, DOWN.value)
        _planes_kernel[(tiles, splits, triton.cdiv(m, tile.rows))](
            *prepared,
            _aligned(weight.arranged if arranged else weight.codes),
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
            ARRANGED=arranged,
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
        tile = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * steps * WARPS + begin
        digits_ptr += tile * ((4 * ROWS + 1) * COLUMNS)
        tables = _tables(tables_ptr, ASM)
        low, high, warp = _code_pointers(
            codes_ptr, first, begin, n, k, COLUMNS, STRIPS, WARPS, ARRANGED
        )
        scale_row, scale_warp = _scale_rows(first, n, k // BLOCK, STRIPS, WARPS)
        total = tl.zeros((STRIPS * WARPS, 16, 4 * ROWS), tl.float32)
        # two steps are on their way: each buffer is filled again as soon as it has been used
        low0, high0, s0 = _fetch(
            low,
            high,
            warp,
            scale_row,
            scale_warp,
            scales_ptr,
            absmax_ptr,
            offset_ptr,
            scale_table_ptr,
            begin,
            0,
            k // COLUMNS,
            BLOCK // COLUMNS,
            COLUMNS,
            ARRANGED,
            EVEN,
        )
        low1, high1, s1 = _fetch(
            low,
            high,
            warp,
            scale_row,
            scale_warp,
            scales_ptr,
            absmax_ptr,
            offset_ptr,
            scale_table_ptr,
            begin,
            WARPS,
            k // COLUMNS,
            BLOCK // COLUMNS,
            COLUMNS,
            ARRANGED,
            EVEN,
        )
        for step in range(0, steps, 2):
            ahead = tl.minimum(step + 2, steps - 2) * WARPS  # the last ones come again
            total = _accumulate(
                total,
                low0,
                high0,
                s0,
                digits_ptr,
                tables_ptr,
                tables,
                COLUMNS,
                ROWS,
                STRIPS,
                WARPS,
                ARRANGED,
                ASM,
            )
            low0, high0, s0 = _fetch(
                low,
                high,
                warp,
                scale_row,
                scale_warp,
                scales_ptr,
                absmax_ptr,
                offset_ptr,
                scale_table_ptr,
                begin,
                ahead,
                k // COLUMNS,
                BLOCK // COLUMNS,
                COLUMNS,
                ARRANGED,
                EVEN,
            )
            digits_ptr += WARPS * (4 * ROWS + 1) * COLUMNS
            total = _accumulate(
                total,
                low1,
                high1,
                s1,
                digits_ptr,
                tables_ptr,
                tables,
                COLUMNS,
                ROWS,
                STRIPS,
                WARPS,
                ARRANGED,
                ASM,
            )
            low1, high1, s1 = _fetch(
                low,
                high,
                warp,
                scale_row,
                scale_warp,
                scales_ptr,
                absmax_ptr,
                offset_ptr,
                scale_table_ptr,
                begin,
                ahead + WARPS,
                k // COLUMNS,
                BLOCK // COLUMNS,
                COLUMNS,
                ARRANGED,
                EVEN,
            )
            digits_ptr += WARPS * (4 * ROWS + 1) * COLUMNS
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
def _tables(tables_ptr, ASM: tl.constexpr):
    """The 8 words of the tables, in registers of each lane."""
    if ASM:
        words = tl.inline_asm_elementwise(
            TABLES,
            TABLES_OPERANDS,
            [tables_ptr.to(tl.int64)],
            dtype=(tl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        words = (0, 0, 0, 0, 0, 0, 0, 0)
    return words


@triton.jit
def _code_pointers(
    codes_ptr,
    first,
    begin,
    n,
    k,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    WARPS: tl.constexpr,
    ARRANGED: tl.constexpr,
):
    """Where the codes of the first step are, and the warp of each line.

    Arranged, a line is the 4 words of a lane, which hold two rows. As stored it is a group of
    COLUMNS codes in one row, a quarter for each of 4 lanes, and rows g and g + 8 are two pointers.
    Both come out as 8 lines or 32 a warp, so that a warp has all lanes in groups of its own.
    """
    words = codes_ptr.to(tl.pointer_type(tl.int32))
    if ARRANGED:
        line = tl.arange(0, STRIPS * WARPS * 32)
        warp = line // 32 % WARPS
        strip = tl.minimum(first // 16 + line // (32 * WARPS), n // 16 - 1).to(tl.int64)
        words += (strip * (k // 64) + begin)[:, None] * 128
        low = words + (warp * 128 + line % 32 * 4)[:, None] + tl.arange(0, 4)[None, :]
        return low, low, warp
    else:
        line = tl.arange(0, STRIPS * WARPS * 8)
        warp = line // 8 % WARPS
        row = first + line // (8 * WARPS) * 16 + line % 8
        inner = warp[:, None] * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :]
        quarter: tl.constexpr = COLUMNS // 32  # words of a lane, one load
        inner = tl.max_contiguous(tl.multiple_of(inner, (1, quarter)), (1, quarter))
        words += begin.to(tl.int64) * (COLUMNS // 8)
        low = words + (tl.minimum(row, n - 1).to(tl.int64) * (k // 8))[:, None] + inner
        high = words + (tl.minimum(row + 8, n - 1).to(tl.int64) * (k // 8))[:, None] + inner
        return low, high, warp


@triton.jit
def _scale_rows(first, n, stride, STRIPS: tl.constexpr, WARPS: tl.constexpr):
    """Start of a row's scales, and the warp that needs them: one scale a lane, not one in four."""
    i = tl.arange(0, WARPS * STRIPS * 16)
    return tl.minimum(first + i % (16 * STRIPS), n - 1) * stride, i // (16 * STRIPS)


@triton.jit
def _fetch(
    low,
    high,
    warp,
    scale_row,
    scale_warp,
    scales_ptr,
    absmax_ptr,
    offset_ptr,
    scale_table_ptr,
    begin,
    ahead,
    groups,
    RATIO: tl.constexpr,
    COLUMNS: tl.constexpr,
    ARRANGED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Codes of rows g and g + 8, and scales, `ahead` groups from `begin`.

    Groups from the end of K on have digits of 0, so that their codes may be anything.
    """
    inside = EVEN | (begin + ahead + warp < groups)[:, None]
    jump: tl.constexpr = 128 if ARRANGED else COLUMNS // 8
    low_words = tl.load(low + ahead * jump, mask=inside, other=0)
    high_words = low_words if ARRANGED else tl.load(high + ahead * jump, mask=inside, other=0)
    group = begin + ahead + scale_warp
    s = load_scales(
        scales_ptr,
        absmax_ptr,
        offset_ptr,
        scale_table_ptr,
        scale_row + group // RATIO,
        EVEN | (group < groups),
        scales_ptr.dtype.element_ty == tl.uint8,
    )
    return low_words, high_words, s


@triton.jit
def _accumulate(
    total,
    low_words,
    high_words,
    s,
    digits_ptr,
    tables_ptr,
    tables,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    WARPS: tl.constexpr,
    ARRANGED: tl.constexpr,
    ASM: tl.constexpr,
):
    """total + scale * (H . [a b c 0] + L . [0 a b c]), for a group of columns a warp."""
    BATCH: tl.constexpr = STRIPS * WARPS
    x = _digit_tile(digits_ptr + COLUMNS, COLUMNS, ROWS, STRIPS, WARPS)  # a b c 0
    z = _digit_tile(digits_ptr, COLUMNS, ROWS, STRIPS, WARPS)  # 0 a b c
    low = _decode(low_words, tables_ptr, tables, ASM)
    high = low if ARRANGED else _decode(high_words, tables_ptr, tables, ASM)
    d = tl.dot(_operand(low[0], high[0], BATCH, COLUMNS, ARRANGED), x, out_dtype=tl.int32)
    d = tl.dot(_operand(low[1], high[1], BATCH, COLUMNS, ARRANGED), z, d, out_dtype=tl.int32)
    if ASM:
        d = tl.dot(_operand(low[2], high[2], BATCH, COLUMNS, ARRANGED), x, d, out_dtype=tl.int32)
        d = tl.dot(_operand(low[3], high[3], BATCH, COLUMNS, ARRANGED), z, d, out_dtype=tl.int32)
    s = s.reshape(WARPS, STRIPS, 16).permute(1, 0, 2).reshape(BATCH, 16)
    s = tl.broadcast_to(s[:, :, None], (BATCH, 16, 4 * ROWS))
    return tl.fma(d.to(tl.float32), s, total)


@triton.jit
def _decode(words, tables_ptr, tables, ASM: tl.constexpr):
    """Codes (I, J) to planes of int8 weights (I, J, 2, 2, 2): H, L and, by permutes, H, L again.

    Of the permutes' planes the first two hold what the lower 8 table entries say and the other two
    the upper 8; both are added.
    """
    # a word's bytes in their order; the compiler sees that nothing moves
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    codes = tl.join(even, odd)
    if ASM:
        h, i, l, k = tl.inline_asm_elementwise(
            DECODE,
            DECODE_OPERANDS,
            [
                codes,
                tables[0],
                tables[1],
                tables[2],
                tables[3],
                tables[4],
                tables[5],
                tables[6],
                tables[7],
            ],
            dtype=(tl.int16,) * 4,
            is_pure=True,
            pack=4,
        )
        return _pair(h), _pair(l), _pair(i), _pair(k)
    else:
        at = tables_ptr + LOOKUP + tl.join(codes & 15, codes >> 4).to(tl.int32)
        return tl.load(at), tl.load(at + 16)


@triton.jit
def _pair(both):
    """The two int8 of an int16, low one first, along a new last axis."""
    return tl.join((both & 255).to(tl.int8), (both >> 8).to(tl.int8))


@triton.jit
def _operand(low, high, BATCH: tl.constexpr, COLUMNS: tl.constexpr, ARRANGED: tl.constexpr):
    """Weights as the left operand (BATCH, 16, COLUMNS): a renaming, no register moves.

    Lane 4 g + j has columns j COLUMNS / 4 on, of rows g and g + 8. `mma` wants 4 consecutive
    columns at 4 j and 4 at 16 + 4 j, so column (j, q, p, i) is called (p, j, q, i).
    """
    if ARRANGED:
        w = low.reshape(BATCH, 8, 4, 2, COLUMNS // 32, 2, 4)  # g j half q p i
        w = w.permute(0, 3, 1, 5, 2, 4, 6)
    else:
        w = tl.join(low, high).reshape(BATCH, 8, 4, COLUMNS // 32, 2, 4, 2)  # g j q p i half
        w = w.permute(0, 6, 1, 4, 2, 3, 5)
    return w.reshape(BATCH, 16, COLUMNS)


@triton.jit
def _digit_tile(
    digits_ptr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, WARPS: tl.constexpr
):
    """Digits as the right operand (STRIPS * WARPS, COLUMNS, 4 ROWS), renamed like the weights."""
    i = tl.arange(0, ROWS // 2 * WARPS * 8)  # eight of lines, warp, line
    at = (i // 8 % WARPS * (4 * ROWS + 1) + i // (8 * WARPS) * 8 + i % 8) * COLUMNS
    x = tl.load(digits_ptr + at[:, None] + tl.arange(0, COLUMNS)[None, :])
    x = x.reshape(ROWS // 2, WARPS, 8, 4, COLUMNS // 32, 2, 4)  # eight, warp, line, j q p i
    x = x.permute(1, 5, 3, 4, 6, 0, 2).reshape(1, WARPS, COLUMNS, 4 * ROWS)
    x = tl.broadcast_to(x, (STRIPS, WARPS, COLUMNS, 4 * ROWS))
    return x.reshape(STRIPS * WARPS, COLUMNS, 4 * ROWS)


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
    forms = [_variant("fp16", m, "u8", False, False) for m in (1, 4, 8)]
    for m in (1, 4, 8):
        forms += [
            _variant("bf16", m, scales, arranged, update)
            for scales in ("u8", "fp32")
            for arranged in (False, True)
            for update in (False, True)
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
        odd=frozenset(("m", "n", "stride", "extra", "steps")),
        max_instructions=4.0 if asm and tile.rows == 2 else None,
    )
