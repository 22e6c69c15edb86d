"""What moves data and control: branches, barriers, loads, stores, copies, lanes of a warp.

Sections are those of the PTX ISA. All threads take one path, so the machine has one counter.
"""

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.formats import mask, unsigned
from benchmarks.ptx.instructions import number
from benchmarks.ptx.matrix import names
from benchmarks.ptx.memory import Fault
from benchmarks.ptx.program import Instruction, instruction

if TYPE_CHECKING:
    from benchmarks.ptx.machine import Machine

__all__: list[str] = []

U = np.uint64


@instruction("bra")
def bra(m: "Machine", i: Instruction) -> None:
    """Jump, all threads or none (9.7.12)."""
    if m.active.all():
        m.counter = m.program.labels[i.args[0]]
    elif m.active.any():
        raise NotImplementedError(f"threads of one program part ways: {i}")


@instruction("bar")
def bar(m: "Machine", i: Instruction) -> None:
    """A barrier of the program, or of a warp, whose threads are in step here (9.7.13)."""
    if i.op == "bar.sync" and i.args == ("0",):
        m.together(i)
        m.shared.barrier()
    elif i.op != "bar.warp.sync":
        raise i.unknown()


@instruction("fence", "membar")
def fence(m: "Machine", i: Instruction) -> None:
    """Order of memory; here everything is in order (9.7.13)."""


@instruction("ld")
def ld(m: "Machine", i: Instruction) -> None:
    """Load, also vectors (9.7.9)."""
    if i.parts[1] == "param":
        m.write(i.args[0], np.full(m.threads, m.parameters[i.args[1].strip("[]")] % 2**64, U))
        return
    into = names(i.args[0])
    for name, some in zip(
        into, m.space(i).load(m.access(i.args[1], i.bits // 8, len(into))), strict=True
    ):
        value = np.zeros(m.threads, U)
        value[m.active] = some
        m.write(name, value)


@instruction("st")
def st(m: "Machine", i: Instruction) -> None:
    """Store, also vectors (9.7.9)."""
    values = [m.read(name)[m.active] for name in names(i.args[1])]
    m.space(i).store(m.access(i.args[0], i.bits // 8, len(values)), values)


@instruction("cp")
def cp(m: "Machine", i: Instruction) -> None:
    """Copy 4 to 16 bytes to shared memory, or zeros; they land at the wait (9.7.9)."""
    if i.op == "cp.async.commit_group":
        m.copies.append([])
    elif i.op in ("cp.async.wait_group", "cp.async.wait_all"):
        pending = int(i.args[0], 0) if i.args else 0
        done = len(m.copies) if i.op.endswith("all") else len(m.copies) - 1 - pending
        for group in m.copies[: max(done, 0)]:
            for access, values in group:
                m.shared.store(access, values)
        m.copies = m.copies[max(done, 0) :] or [[]]
    elif i.parts[:2] == ("cp", "async") and "shared" in i.parts and i.type == "global":
        _copy(m, i)
    else:
        raise i.unknown()


def _copy(m: "Machine", i: Instruction) -> None:
    size = int(i.args[2], 0)
    taken = m.read(i.args[3]) & mask(32) if len(i.args) > 3 else np.full(m.threads, size, U)
    if not np.isin(taken[m.active], (0, size)).all():
        raise i.unknown()
    each = min(size, 8)
    source = m.active & (taken > 0)
    found = m.memory.load(m.access(i.args[1], each, size // each, source))
    values = [np.zeros(m.threads, U) for _ in found]
    for value, some in zip(values, found, strict=True):
        value[source] = some
    target = m.access(i.args[0], each, size // each)
    m.shared.begin_copy(target)
    m.copies[-1].append((target, [value[m.active] for value in values]))


@instruction("mov")
def mov(m: "Machine", i: Instruction) -> None:
    """Copy, and pack or unpack a vector of equal parts (9.7.9)."""
    into, source = i.args
    if into.startswith("{"):
        parts = names(into)
        width = i.bits // len(parts)
        value = m.read(source)
        for j, name in enumerate(parts):
            m.write(name, value >> U(j * width) & mask(width))
    elif source.startswith("{"):
        parts = names(source)
        width = i.bits // len(parts)
        value = np.zeros(m.threads, U)
        for j, name in enumerate(parts):
            value |= (m.read(name) & mask(width)) << U(j * width)
        m.write(into, value)
    elif i.type == "pred":
        m.write(into, m.read(source) != 0)
    else:
        m.write(into, m.read(source) & mask(i.bits))


@instruction("shfl")
def shfl(m: "Machine", i: Instruction) -> None:
    """A register of another lane of the warp (9.7.9)."""
    m.together(i)
    by, lane = m.read(i.args[2]).astype(np.int64), m.lane.astype(np.int64)
    sources = {"bfly": lane ^ by, "idx": by & 31}
    if i.parts[2] not in sources or i.args[3] not in ("31", "0x1f"):
        raise i.unknown()
    whole = np.arange(m.warps)[:, None], sources[i.parts[2]].reshape(m.warps, 32)
    value = m.read(i.args[1]).reshape(m.warps, 32)[whole].reshape(-1)
    into, _, valid = i.args[0].partition("|")
    m.write(into, value)
    if valid:
        m.write(valid, m.all)


@instruction("redux")
def redux(m: "Machine", i: Instruction) -> None:
    """The sum or an extreme over a warp (9.7.13)."""
    m.together(i)
    how = {"max": np.max, "min": np.min, "add": np.sum}.get(i.parts[2])
    if how is None or i.type not in ("s32", "u32"):
        raise i.unknown()
    over = how(number(m.read(i.args[1]), i.type).reshape(m.warps, 32), axis=1)
    m.write(i.args[0], unsigned(np.repeat(over, 32), 32))


@instruction("elect")
def elect(m: "Machine", i: Instruction) -> None:
    """One lane of each warp, the first (9.7.13)."""
    m.together(i)
    m.write(i.args[0].partition("|")[2], m.lane == 0)


@instruction("ret")
def ret(m: "Machine", i: Instruction) -> None:
    """The machine stops at a return of all threads; another kind must be taken by none."""
    if m.active.any():
        raise Fault(f"{i}: some threads return early")
