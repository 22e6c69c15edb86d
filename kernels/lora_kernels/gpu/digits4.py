"""Rows of x as integer digits, and a code table as int8 planes: what planes4's product reads.

x. A row is divided by its largest magnitude and rounded to a whole number of 24 bits, which is
written as three signed digits in base 256:

    x_k = largest / 8355711 (65536 a_k + 256 b_k + c_k),     a, b, c in [-128, 127]

The division is rounded correctly and comes first, so nothing overflows or underflows whatever the
size of x, and the largest entry becomes 8355711 = (127, 127, 127) exactly. An entry's error is half
a unit, 6e-8 of the row's largest. A row of zeros has digits 0. A row that holds an infinity or a
NaN has digits 0 and a largest of NaN: all its outputs are NaN, where PyTorch's would be a mixture
of infinities and NaN.

Digits are stored so that the product reads them in its own order, which costs nothing here: tiles
of `inputs` rows, in each the groups of columns that share a scale of W, in each one line of zeros
and then four lines a row,

    0 | a b c 0 | a b c 0 | …

Read from the second line this is the operand of the high plane, from the first that of the low
plane, shifted by one digit (planes4.py says why). In a line each two neighbours are exchanged, as
the second of two codes lies in the low nibble, which is decoded first.

The table. Each of the 16 entries is rounded to a whole number of 16 bits, 256 H + L with 32382 for
the largest, so H and L are two tables of 16 bytes. They are written once for plain look-up and once
for byte permutes, 32 times over: each lane of a warp loads its own copy. With one copy the compiler
knows that the words are the same in all lanes, keeps them in uniform registers, and spends an
instruction before every permute to bring them back.

A byte permute looks up 8 bytes by 3 bits, and where the fourth bit of a selector is set it gives
the sign of the byte instead, 0 or -1. With codes as selectors, entry n of the first 8 bytes is
therefore right for code n, and for code n + 8 it adds its sign. `_spread` chooses tables which are
right after this addition: two permutes look up 16 entries and no instruction selects between them.

    stored(n) + sign(stored(n + 8)) = entry(n),    stored(n + 8) + sign(stored(n)) = entry(n + 8)

can always be solved, at the price of one unit of room at the top, hence 126 and not 127.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.gpu.variant import Variant

__all__ = ["LOOKUP", "prepare", "variants"]

LARGEST = tl.constexpr(126 * 256 + 126)  # of the table
ROW = tl.constexpr(127 * 65536 + 127 * 256 + 127)  # of x
PART = 1024  # columns that one program writes
LOOKUP = tl.constexpr(32 * 32)  # where the tables for plain look-up begin: 16 H, 16 L
TABLES = LOOKUP.value + 32


def prepare(
    x: Tensor, table: Tensor, inputs: int, columns: int, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the product needs of x and of the code table, in one launch.

    Args:
        x: (M, K), bfloat16 or float16, its last dimension contiguous.
        table: float32 (16,).
        inputs: rows of x in a tile, even.
        columns: of a group, a multiple of 32.
        padded: K or more, a multiple of `columns`; digits from K on are 0.

    Returns:
        digits int8 (ceil(M / inputs), padded / columns, 4 inputs + 1, columns);
        largest float32 (ceil(M / inputs) inputs + 1,): of each row, then the value of one unit of
        (H + L / 256) (a + b / 256 + c / 65536) for a row whose largest is 1;
        tables int8 (1056,): 32 copies of H and L for permutes, then H and L for look-up.
    """
    m, k = x.shape
    tiles = triton.cdiv(m, inputs)
    shape = (tiles, padded // columns, 4 * inputs + 1, columns)
    digits = x.new_empty(shape, dtype=torch.int8)
    largest = x.new_empty(tiles * inputs + 1, dtype=torch.float32)
    tables = x.new_empty(TABLES, dtype=torch.int8)
    _digits_kernel[(tiles * inputs + 1, triton.cdiv(padded, PART))](
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
        enable_fp_fusion=False,
    )
    return digits, largest, tables


@triton.jit(do_not_specialize=["m", "stride", "padded"])
def _digits_kernel(
    x_ptr,  # (M, K)
    table_ptr,  # (16,) float32
    digits_ptr,
    largest_ptr,
    tables_ptr,
    m,
    k,
    stride,
    padded,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """One program a row and part of its columns, and a last one for the tables."""
    row = tl.program_id(0)
    if row < tl.num_programs(0) - 1:
        # rows up to a whole tile are rows of zeros
        _row_digits(
            x_ptr + row.to(tl.int64) * stride,
            tl.where(row < m, k, 0),
            digits_ptr,
            largest_ptr + row,
            row,
            padded,
            INPUTS,
            COLUMNS,
            PART,
        )
    elif tl.program_id(1) == 0:
        _write_tables(table_ptr, tables_ptr, largest_ptr + row)


@triton.jit
def _row_digits(
    x_ptr,
    length,
    digits_ptr,
    largest_ptr,
    row,
    padded,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    # as integers, magnitudes are ordered like numbers, and infinity and NaN come last
    top = tl.zeros((4 * PART,), tl.int32)
    for start in range(0, length, 4 * PART):
        i = start + tl.arange(0, 4 * PART)
        x = tl.load(x_ptr + i, mask=i < length, other=0.0).to(tl.float32)
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    top = tl.max(top, 0)
    finite = top < 0x7F800000
    largest = top.to(tl.float32, bitcast=True)
    if tl.program_id(1) == 0:
        tl.store(largest_ptr, tl.where(finite, largest, float("nan")))
    i = tl.program_id(1) * PART + tl.arange(0, PART)
    x = tl.load(x_ptr + (i ^ 1), mask=i < length, other=0.0).to(tl.float32)
    usable = finite & (top > 0)
    x = tl.where(usable, tl.div_rn(x, tl.where(usable, largest, 1.0)), 0.0)  # in [-1, 1]
    v, c = _last_digit(_round(x * ROW))
    a, b = _last_digit(v)
    LINES: tl.constexpr = 4 * INPUTS + 1
    tile = (row // INPUTS).to(tl.int64) * (padded // COLUMNS) * (LINES * COLUMNS)
    line = row % INPUTS * 4
    out = digits_ptr + tile + i // COLUMNS * (LINES * COLUMNS) + i % COLUMNS + line * COLUMNS
    inside = i < padded
    zero = tl.zeros((PART,), tl.int8)
    if line == 0:
        tl.store(out, zero, mask=inside)
    tl.store(out + COLUMNS, a.to(tl.int8), mask=inside)
    tl.store(out + 2 * COLUMNS, b.to(tl.int8), mask=inside)
    tl.store(out + 3 * COLUMNS, c.to(tl.int8), mask=inside)
    tl.store(out + 4 * COLUMNS, zero, mask=inside)


@triton.jit
def _write_tables(table_ptr, tables_ptr, unit_ptr):
    i = tl.arange(0, 16)
    largest = tl.max(tl.abs(tl.load(table_ptr + i)), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    high, low = _planes(tl.load(table_ptr + i), largest)
    other_high, other_low = _planes(tl.load(table_ptr + (i ^ 8)), largest)
    tl.store(tables_ptr + LOOKUP + i, high.to(tl.int8))
    tl.store(tables_ptr + LOOKUP + 16 + i, low.to(tl.int8))
    copies = tables_ptr + tl.arange(0, 32)[:, None] * 32 + i[None, :]  # (32, 16)
    high = _spread(high, other_high, i < 8).to(tl.int8)
    low = _spread(low, other_low, i < 8).to(tl.int8)
    tl.store(copies, tl.broadcast_to(high[None, :], (32, 16)))
    tl.store(copies + 16, tl.broadcast_to(low[None, :], (32, 16)))
    tl.store(unit_ptr, tl.div_rn(largest, 1.0 * LARGEST) * (16777216.0 / ROW))


@triton.jit
def _planes(value, largest):
    """H and L of an entry; L ends at 126, one unit off, to leave room for `_spread`."""
    high, low = _last_digit(_round(tl.div_rn(value, largest) * LARGEST))
    return high, tl.minimum(low, 126)


@triton.jit
def _spread(own, partner, first):
    a = tl.where(first, own, partner)  # entry n
    b = tl.where(first, partner, own)  # entry n + 8
    negative = (b < -1) | ((b == -1) & (a >= -1))  # whether b will be stored as a negative number
    a += negative.to(tl.int32)
    b += (a < 0).to(tl.int32)
    return tl.where(first, a, b)


@triton.jit
def _last_digit(v):
    """v = 256 u + d with d in [-128, 127]: u, d."""
    d = ((v + 128) & 255) - 128
    return (v - d) >> 8, d


@triton.jit
def _round(x):
    """To the nearest whole number, up when halfway; exact below 2^23."""
    return tl.floor(x + 0.5).to(tl.int32)


def variants() -> list[Variant]:
    """The forms that `prepare` launches for groups of 64 columns."""
    return [_variant("fp16", 2), *(_variant("bf16", inputs) for inputs in (2, 4, 8))]


def _variant(dtype: str, inputs: int) -> Variant:
    constants: dict[str, Any] = {"INPUTS": inputs, "COLUMNS": 64, "PART": PART}
    signature = {"x_ptr": f"*{dtype}", "table_ptr": "*fp32", "digits_ptr": "*i8"}
    signature |= {"largest_ptr": "*fp32", "tables_ptr": "*i8"}
    signature |= dict.fromkeys(("m", "k", "stride", "padded"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    return Variant(
        f"digits4/{dtype}/{inputs} rows",
        _digits_kernel,
        signature,
        constants,
        fp_fusion=False,
        odd=frozenset(("m", "stride", "padded")),
    )
