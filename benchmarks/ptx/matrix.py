"""Matrices: `ldmatrix`, `stmatrix`, `mma.sync`, `wgmma` (PTX ISA 9.7.14, 9.7.15).

A fragment is spread over the lanes of a warp: lane 4 g + t holds rows g and g + 8 and, in each
32-bit register, neighbouring columns from t on. The sums of a tensor core are formed in float64,
exact for int8, and rounded once: more exact than hardware, whose order and width of accumulation
NVIDIA does not state. So a comparison with PyTorch shows wrong operands, not wrong roundings.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.formats import TO_FLOAT, from_float32, signed, to_float32, unsigned
from benchmarks.ptx.memory import Access, Fault
from benchmarks.ptx.program import Instruction, instruction

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Machine

__all__: list[str] = []

U = np.uint64
Array = np.ndarray
GROUP, PLACE = np.arange(32) // 4, np.arange(32) % 4  # of a lane


def names(text: str) -> list[str]:
    """The registers of a vector operand."""
    return [name.strip() for name in text.strip("{} ").split(",")]


def _rows(m: "Machine", text: str, matrix: int) -> Access:
    """The eight rows of one 8 x 8 matrix a warp: lane 8 q + i holds the address of row i of q."""
    at = m.address(text).reshape(m.warps, 32)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)
    return Access(at.astype(np.int64), np.repeat(np.arange(m.warps), 8), 2, 8, str(m.current))


def _count(i: Instruction) -> int:
    if "b16" not in i.parts or "m8n8" not in i.parts:
        raise i.unknown()
    return next(int(part[1:]) for part in i.parts if re.fullmatch(r"x[124]", part))


@instruction("ldmatrix")
def ldmatrix(m: "Machine", i: Instruction) -> None:
    """Load 8 x 8 matrices of 16 bits; each lane gets two neighbours of a row (9.7.14)."""
    m.together(i)
    for q, name in zip(range(_count(i)), names(i.args[0]), strict=True):
        matrix = np.stack(m.shared.load(_rows(m, i.args[1], q)), -1).reshape(m.warps, 8, 8)
        if "trans" in i.parts:
            matrix = matrix.transpose(0, 2, 1)
        pairs = matrix.reshape(m.warps, 32, 2)
        m.write(name, (pairs[..., 0] | pairs[..., 1] << U(16)).reshape(-1))


@instruction("stmatrix")
def stmatrix(m: "Machine", i: Instruction) -> None:
    """Store 8 x 8 matrices of 16 bits (9.7.14)."""
    m.together(i)
    for q, name in zip(range(_count(i)), names(i.args[1]), strict=True):
        v = m.read(name)
        matrix = np.stack([v & U(0xFFFF), v >> U(16) & U(0xFFFF)], -1).reshape(m.warps, 8, 8)
        if "trans" in i.parts:
            matrix = matrix.transpose(0, 2, 1)
        m.shared.store(_rows(m, i.args[0], q), list(matrix.reshape(-1, 8).T))


@instruction("mma")
def mma(m: "Machine", i: Instruction) -> None:
    """D = A B + C, (16, 8) a warp, by the fragments of m16n8k32 and m16n8k16 (9.7.14)."""
    m.together(i)
    integers = "s8" in i.parts
    kind = next((p for p in ("s8", "bf16", "f16") if p in i.parts), None)
    shape = "m16n8k32" if integers else "m16n8k16"
    sums = "s32" if integers else "f32"
    if kind is None or i.parts[2:3] != ("aligned",) or shape not in i.parts or i.type != sums:
        raise i.unknown()
    a, b, c = ([m.read(n).reshape(m.warps, 32) for n in names(text)] for text in i.args[1:])
    k, each = (32, 4) if integers else (16, 2)
    left, right = np.zeros((m.warps, 16, k)), np.zeros((m.warps, k, 8))
    acc = np.zeros((m.warps, 16, 8))
    for e in range(each):
        for r in range(4):
            left[:, GROUP + 8 * (r & 1), PLACE * each + e + k // 2 * (r >> 1)] = part(a[r], e, kind)
        for r in range(2):
            right[:, PLACE * each + e + k // 2 * r, GROUP] = part(b[r], e, kind)
    for r in range(4):
        value = signed(c[r], 32) if integers else to_float32(c[r])
        acc[:, GROUP + 8 * (r >> 1), PLACE * 2 + (r & 1)] = value
    acc += left @ right
    for r, name in enumerate(names(i.args[0])):
        value = acc[:, GROUP + 8 * (r >> 1), PLACE * 2 + (r & 1)].reshape(-1)
        m.write(name, unsigned(value, 32) if integers else from_float32(value))


def part(v: Array, e: int, kind: str) -> Array:
    """Element e of a register of packed int8 or 16-bit floats, as float64."""
    if kind == "s8":
        return signed(v >> U(8 * e), 8).astype(np.float64)
    return TO_FLOAT[kind](v >> U(16 * e)).astype(np.float64)


@instruction("wgmma")
def wgmma(m: "Machine", i: Instruction) -> None:
    """D = A B + D, (64, N) by four warps; A in registers, B in shared memory (9.7.15)."""
    if i.parts[1] in ("fence", "commit_group", "wait_group"):
        return
    m.together(i)
    shape = re.fullmatch(r"m64n(\d+)k16", next(p for p in i.parts if p.startswith("m64")))
    kinds, rest = i.parts[-2:], i.args[4:]
    if not shape or kinds[0] not in TO_FLOAT or rest != ("1", "1", "0") or "{" not in i.args[1]:
        raise i.unknown()  # A in shared memory, negated or transposed operands
    a = [m.read(name) for name in names(i.args[1])]
    keep = m.read(i.args[3]).astype(bool)
    for first in range(0, m.threads, 128):
        lanes = slice(first, first + 128)
        right = _behind(m, m.read(i.args[2])[lanes], int(shape[1]), first // 32, kinds[0])
        left = np.zeros((4, 16, 16))
        for e in range(2):
            for r, v in enumerate(a):
                value = part(v[lanes].reshape(4, 32), e, kinds[0])
                left[:, GROUP + 8 * (r & 1), PLACE * 2 + e + 8 * (r >> 1)] = value
        _accumulate(m, names(i.args[0]), lanes, left @ right.T, keep[lanes])


def _accumulate(m: "Machine", into: list[str], lanes: slice, product: Array, keep: Array) -> None:
    """Add (4, 16, N) to the accumulators of a warp group, or replace them."""
    for i, name in enumerate(into):
        column, j = divmod(i, 4)
        register = m.registers.get(name, np.zeros(m.threads, U)).copy()
        old = np.where(keep, to_float32(register[lanes]), np.float32(0)).reshape(4, 32)
        new = product[:, GROUP + 8 * (j >> 1), 8 * column + PLACE * 2 + (j & 1)] + old
        register[lanes] = from_float32(new.reshape(-1))
        m.registers[name] = register


def _behind(m: "Machine", descriptors: Array, n: int, warp: int, kind: str) -> Array:
    """B, (N, 16), K contiguous: start, stride and swizzle as the descriptor says (9.7.15)."""
    if (descriptors != descriptors[0]).any():
        raise Fault(f"{m.current}: lanes disagree about the descriptor")
    word = int(descriptors[0])
    start, stride, mode = (word & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, word >> 62
    if mode == 0 or word >> 49 & 7:
        raise NotImplementedError(f"{m.current}: descriptor {word:#x} has no swizzle or an offset")
    width, swizzle = {1: (128, 7), 2: (64, 3), 3: (32, 1)}[mode]
    row, k = np.arange(n)[:, None], np.arange(16)[None, :]
    at = start + row // 8 * stride + row % 8 * width + 2 * k
    at ^= (at >> 7 & swizzle) << 4  # 16-byte units, by the row of 128 bytes that they lie in
    flat = at.reshape(-1)
    for w in range(warp, warp + 4):
        access = Access(flat, np.full(flat.size, w), 2, 1, str(m.current))
        values = m.shared.load(access)[0]
    return TO_FLOAT[kind](values).reshape(n, 16).astype(np.float64)
