"""The operands of planes4's product: codes decoded to int8 tiles, and tiles of digits.

**The decode.** A byte permute (PRMT) looks 4 codes up in 8 bytes. For 16 entries the usual way is
two look-ups and a third permute that selects. Here both look-ups are operands of products of their
own: with tables made for it (digits4.py) a look-up outside its 8 entries gives the sign of an
unrelated entry, for which the other table makes up, and the tensor core does the addition. That is
2 permutes for 4 weights of a plane instead of 3, 3 instructions for the selectors of 8 codes
instead of 5, and 4 products instead of 2 from a unit that waits anyway.

**The layout.** No weight and no digit moves between lanes. A lane loads 8 bytes of a row, which are
16 columns; that `mma` deals columns out differently is a matter of names, since digits lie in
memory as the names demand. Rows, columns and warps are dimensions of the tensors below, and each
reshape and permute only renames registers. Loads are of two dimensions and reshaped afterwards, as
the order of lanes in more dimensions differs between versions of triton.

The product is batched over warps, each of which has a group of columns of its own. That also keeps
the compiler from `wgmma`, which needs four warps to wait for each other and for so few columns of
digits has no more to offer than `mma`.
"""

import triton
import triton.language as tl

from lora_kernels.gpu.digits4 import LOOKUP

__all__ = ["DECODE", "code_pointers", "decode", "digit_tiles", "load_tables", "weight_tile"]

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


@triton.jit
def load_tables(tables_ptr, ASM: tl.constexpr):
    """The 8 words of the tables in registers of each lane; for look-up where they are."""
    if ASM:
        tables = tl.inline_asm_elementwise(
            TABLES,
            TABLES_OPERANDS,
            [tables_ptr.to(tl.int64)],
            dtype=(tl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        tables = (tables_ptr + LOOKUP, tables_ptr + LOOKUP + 16)
    return tables


@triton.jit
def code_pointers(
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
def decode(words, tables, ASM: tl.constexpr):
    """Codes (I, J) to planes of int8 weights (I, J, 2, 2, 2): H and L, by permutes once more H, L.

    Of the permutes' planes the first two come from the lower 8 table entries and the others from
    the upper 8; the product adds them up.
    """
    # a word's bytes in their order; the compiler sees that nothing moves
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    codes = tl.join(even, odd)
    if ASM:
        t0, t1, t2, t3, t4, t5, t6, t7 = tables
        h_lower, h_upper, l_lower, l_upper = tl.inline_asm_elementwise(
            DECODE,
            DECODE_OPERANDS,
            [codes, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.int16,) * 4,
            is_pure=True,
            pack=4,
        )
        return _pair(h_lower), _pair(l_lower), _pair(h_upper), _pair(l_upper)
    else:
        at = tl.join(codes & 15, codes >> 4).to(tl.int32)
        return tl.load(tables[0] + at), tl.load(tables[1] + at)


@triton.jit
def _pair(both):
    """The two int8 of an int16, low one first, along a new last axis."""
    return tl.join((both & 255).to(tl.int8), (both >> 8).to(tl.int8))


@triton.jit
def weight_tile(low, high, BATCH: tl.constexpr, COLUMNS: tl.constexpr, ARRANGED: tl.constexpr):
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
def digit_tiles(
    digits_ptr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, WARPS: tl.constexpr
):
    """Digits a b c 0 and 0 a b c as right operands, renamed like the weights.

    Returns:
        Two int8 (STRIPS * WARPS, COLUMNS, 4 ROWS).
    """
    i = tl.arange(0, ROWS // 2 * WARPS * 8)  # eight of lines, warp, line
    at = (i // 8 % WARPS * (4 * ROWS + 1) + i // (8 * WARPS) * 8 + i % 8) * COLUMNS
    at = digits_ptr + at[:, None] + tl.arange(0, COLUMNS)[None, :]
    x = _digit_tile(tl.load(at + COLUMNS), COLUMNS, ROWS, STRIPS, WARPS)
    return x, _digit_tile(tl.load(at), COLUMNS, ROWS, STRIPS, WARPS)


@triton.jit
def _digit_tile(
    x, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, WARPS: tl.constexpr
):
    x = x.reshape(ROWS // 2, WARPS, 8, 4, COLUMNS // 32, 2, 4)  # eight, warp, line, j q p i
    x = x.permute(1, 5, 3, 4, 6, 0, 2).reshape(1, WARPS, COLUMNS, 4 * ROWS)
    x = tl.broadcast_to(x, (STRIPS, WARPS, COLUMNS, 4 * ROWS))
    return x.reshape(STRIPS * WARPS, COLUMNS, 4 * ROWS)
