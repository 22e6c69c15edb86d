"""Arithmetic, logic, comparison, conversion; one function a family, with PTX ISA sections.

Each takes the machine and the instruction, reads operands and writes the destination in the
threads that are active. A type or modifier that is not described raises `i.unknown()`.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.formats import (
    FROM_FLOAT,
    TO_FLOAT,
    bits_of,
    from_float32,
    mask,
    signed,
    to_float32,
    unsigned,
)
from benchmarks.ptx.program import Instruction, instruction

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Machine

__all__ = ["number", "prmt"]

U = np.uint64
Array = np.ndarray
FLOAT: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,  # NaN only if both are
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}
ROUNDED = {"rn", "f32", "f32x2", "ftz"}  # modifiers of float arithmetic that are described


@instruction("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs")
def arithmetic(m: "Machine", i: Instruction) -> None:
    """Integers (9.7.1), float32 and pairs of it (9.7.3), sign bits of 16-bit pairs (9.7.4)."""
    x = [m.read(name) for name in i.args[1:]]
    if i.type in ("bf16x2", "f16x2") and i.parts[0] == "abs":
        m.write(i.args[0], x[0] & U(0x7FFF7FFF))
    elif i.op in ("add.rn.f32.bf16", "add.f32.bf16"):  # mixed precision: the sum is in float32
        m.write(i.args[0], from_float32(TO_FLOAT["bf16"](x[0]) + to_float32(x[1])))
    elif i.type in ("f32", "f32x2"):
        if set(i.parts[1:]) - ROUNDED - ({"full"} if i.parts[0] == "div" else set()):
            raise i.unknown()
        m.write(i.args[0], _float(i, x))
    elif re.fullmatch(r"[usb]\d+", i.type):
        m.write(i.args[0], _integer(i, x))
    else:
        raise i.unknown()


def _float(i: Instruction, x: list[Array]) -> Array:
    low = from_float32(_float32(i, [to_float32(v) for v in x]))
    if i.type == "f32":
        return low
    return low | from_float32(_float32(i, [to_float32(v >> U(32)) for v in x])) << U(32)


def _float32(i: Instruction, x: list[Array]) -> Array:
    """Rounded to nearest; with ftz, subnormal operands and results are zeros of their sign."""
    flush = _flushed if "ftz" in i.parts else np.asarray
    return flush(FLOAT[i.parts[0]](*(flush(v) for v in x)))


def _flushed(f: Array) -> Array:
    return np.where(np.abs(f) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), f), f)


def _integer(i: Instruction, x: list[Array]) -> Array:
    name, bits = i.parts[0], i.bits
    if name in ("mul", "mad"):
        wide = "wide" in i.parts
        if not wide and "lo" not in i.parts:
            raise i.unknown()
        a, b = (number(v, i.type).view(U) for v in x[:2])
        product = a * b + (x[2] if name == "mad" else U(0))
        return product & mask(2 * bits if wide else bits)
    e = [number(v, i.type) for v in x]
    return unsigned(INTEGER[name](*e), bits)


def number(v: Array, kind: str) -> Array:
    """A register as an integer of its type; u64 wraps into int64."""
    bits = bits_of(kind)
    return signed(v, bits) if kind.startswith("s") else (v & mask(bits)).view(np.int64)


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero, as C does."""
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))


INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _quotient,
    "rem": lambda a, b: a - b * _quotient(a, b),
}


@instruction("and", "or", "xor", "not")
def logic(m: "Machine", i: Instruction) -> None:
    """Bits, and predicates (9.7.8)."""
    x = [m.read(name) for name in i.args[1:]]
    if i.type == "pred":
        x = [v.astype(bool) for v in x]
    whole = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    value = whole[i.parts[0]](*x)
    m.write(i.args[0], value if i.type == "pred" else value & mask(i.bits))


@instruction("shl", "shr")
def shift(m: "Machine", i: Instruction) -> None:
    """Shift; by the width or more gives 0, or the sign (9.7.8)."""
    value, by = m.read(i.args[1]) & mask(i.bits), m.read(i.args[2]) & mask(32)
    if i.parts[0] == "shr" and i.type.startswith("s"):
        small = np.minimum(by, U(i.bits - 1)).astype(np.int64)
        result = unsigned(signed(value, i.bits) >> small, i.bits)
    else:
        small = np.minimum(by, U(63))
        moved = value << small if i.parts[0] == "shl" else value >> small
        result = np.where(by < i.bits, moved & mask(i.bits), U(0))
    m.write(i.args[0], result)


@instruction("bfe")
def bfe(m: "Machine", i: Instruction) -> None:
    """Extract a field at a constant place (9.7.1)."""
    first, length = int(i.args[2], 0), int(i.args[3], 0)
    field = m.read(i.args[1]) >> U(first) & mask(length)
    m.write(i.args[0], unsigned(signed(field, length), i.bits) if i.type[0] == "s" else field)


@instruction("lop3")
def lop3(m: "Machine", i: Instruction) -> None:
    """Any function of three bits, as a table of 8 (9.7.8)."""
    a, b, c = (m.read(name) for name in i.args[1:4])
    table, value = int(i.args[4], 0), np.zeros(m.threads, U)
    for j in range(8):
        if table >> j & 1:
            value |= (a if j & 4 else ~a) & (b if j & 2 else ~b) & (c if j & 1 else ~c)
    m.write(i.args[0], value & mask(32))


@instruction("prmt")
def permute(m: "Machine", i: Instruction) -> None:
    """A byte permute (9.7.9)."""
    if i.op != "prmt.b32":
        raise i.unknown()
    m.write(i.args[0], prmt(*(m.read(name) for name in i.args[1:])))


def prmt(low: Array, high: Array, selector: Array) -> Array:
    """Each nibble of the selector picks a byte of eight, or with its high bit that byte's sign."""
    eight = low & mask(32) | (high & mask(32)) << U(32)
    result = np.zeros_like(eight)
    for j in range(4):
        pick = selector >> U(4 * j) & U(15)
        byte = eight >> (pick & U(7)) * U(8) & U(255)
        sign = np.where(byte & U(128), U(255), U(0))
        result |= np.where(pick & U(8), sign, byte) << U(8 * j)
    return result


@instruction("selp")
def selp(m: "Machine", i: Instruction) -> None:
    """The first if the predicate holds, else the second (9.7.6)."""
    a, b, p = (m.read(name) for name in i.args[1:])
    m.write(i.args[0], np.where(p, a, b) & mask(i.bits))


@instruction("setp")
def setp(m: "Machine", i: Instruction) -> None:
    """Compare; of floats with NaN only `ne` of the unordered forms holds (9.7.6)."""
    if len(i.parts) != 3 or (i.type.startswith("f") and i.type != "f32"):
        raise i.unknown()
    how, floats = i.parts[1], i.type == "f32"
    convert = to_float32 if floats else (lambda v: _compared(v, i.type))
    a, b = (convert(m.read(name)) for name in i.args[1:])
    nan = np.isnan(a) | np.isnan(b) if floats else np.zeros(m.threads, bool)
    if how in ("nan", "num"):
        m.write(i.args[0], nan if how == "nan" else ~nan)
        return
    unordered = floats and how.endswith("u")
    how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)[:2]
    table = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b}
    m.write(i.args[0], table[how] | nan if unordered else table[how] & ~nan)


def _compared(v: Array, kind: str) -> Array:
    return signed(v, bits_of(kind)) if kind.startswith("s") else v & mask(bits_of(kind))


@instruction("cvt")
def cvt(m: "Machine", i: Instruction) -> None:
    """Convert; to 16 bits to nearest, to integers towards zero, pairs high first (9.7.9)."""
    if set(i.parts[1:-2]) - {"rn", "rzi", "rmi", "ftz"}:
        raise i.unknown()
    into, source = i.parts[-2:]
    if into in ("bf16x2", "f16x2") and source == "f32":
        high, low = (FROM_FLOAT[into[:-2]](to_float32(m.read(name))) for name in i.args[1:])
        m.write(i.args[0], high << U(16) | low)
        return
    v = m.read(i.args[1])
    value = TO_FLOAT[source](v) if source in TO_FLOAT else number(v, source)
    if into in FROM_FLOAT:
        f = value.astype(np.float32)
        f = _flushed(f) if "ftz" in i.parts else f
        m.write(i.args[0], FROM_FLOAT[into](np.floor(f) if "rmi" in i.parts else f))
    elif source in TO_FLOAT:
        m.write(i.args[0], _truncated(value, into, i))
    else:
        m.write(i.args[0], unsigned(value, bits_of(into)))


def _truncated(f: Array, into: str, i: Instruction) -> Array:
    """Towards zero, held to the range of 32 bits; NaN gives 0."""
    if into not in ("s32", "u32") or "rzi" not in i.parts:
        raise i.unknown()
    low, high = (-(2**31), 2**31 - 1) if into == "s32" else (0, 2**32 - 1)
    whole = np.trunc(np.clip(np.nan_to_num(f.astype(np.float64)), low, high))
    return unsigned(whole, 32)


@instruction("ex2")
def ex2(m: "Machine", i: Instruction) -> None:
    """2^x (9.7.3)."""
    m.write(i.args[0], from_float32(np.exp2(to_float32(m.read(i.args[1])))))
