"""One program (CTA) of compiled PTX, all threads in step, checked as it runs.

Triton's interpreter runs the kernel's Python. This runs what the compiler made of it, before ptxas:
layouts, vector widths, barriers, shuffles, the tensor cores' operand order and the inline assembly
are all there, so errors in them show without a GPU. Registers hold one 64-bit element a thread
(NumPy arrays), and an instruction is done for all threads at once, under its predicate.

Emulated: integer and float32 arithmetic and conversions as they round, `prmt` with its sign mode,
`f32x2`, shuffles, `redux`, `cp.async` (its bytes may not be read before `wait_group`), `ldmatrix`,
`stmatrix`, `mma.sync` on int8, bfloat16 and float16, `wgmma` with A in registers and B behind a
swizzled descriptor. Semantics are those of the PTX ISA, section 9.7, by the subsections that the
functions name (as version 9 numbers them). memory.py says which accesses are refused.

Not emulated: time; a thread's own path (a branch must be taken by all threads or by none, which
Triton's code does); the asynchronous proxy, so a missing `fence.proxy.async` or `wgmma.wait_group`
goes unnoticed; the rounding inside tensor cores, whose sums are formed in float64 and rounded once;
`ex2.approx` and `fma` to their last bit (fma is rounded to float64 first); TMA, mbarrier, clusters,
and tcgen05, for which sm_100 is no target here. An instruction that is not known raises and is
named; none is passed over.
"""

import re
from collections.abc import Sequence

import numpy as np

import benchmarks.ptx.instructions
import benchmarks.ptx.matrix
import benchmarks.ptx.movement  # noqa: F401 - all three register what they describe
from benchmarks.ptx.memory import Access, Fault, Global, Shared
from benchmarks.ptx.program import HANDLERS, Instruction, Program

__all__ = ["Machine"]

U = np.uint64
MOST = 10**6  # instructions of a program; more is a loop without an end
Array = np.ndarray
Place = tuple[int, int, int]


class Machine:
    """A program of a grid, its registers and its shared memory."""

    def __init__(
        self, program: Program, values: Sequence[int], memory: Global, threads: int, shared: int
    ) -> None:
        """Take the code and the arguments of a launch.

        Args:
            program: what `parse` returned.
            values: bits of each argument; Triton's own parameters behind them are 0.
            memory: where the tensors lie.
            threads: of a program, a multiple of 32.
            shared: bytes of shared memory.
        """
        hidden = len(program.parameters) - len(values)
        if not 0 <= hidden <= 2:
            names = len(program.parameters)
            raise ValueError(f"the entry has {names} parameters; got {len(values)} values")
        self.program, self.memory, self.threads = program, memory, threads
        self.parameters = dict(zip(program.parameters, [*values, 0, 0], strict=False))
        self.warps = threads // 32
        self.thread = np.arange(threads, dtype=U)
        self.lane = self.thread % U(32)
        self.all = np.ones(threads, bool)
        self._shared_size = shared

    def run(self, place: Place = (0, 0, 0), grid: Place = (1, 1, 1)) -> int:
        """Run one program; returns the number of its instructions."""
        self._reset(place, grid)
        code, steps = self.program.code, 0
        while code[self.counter].op != "ret" or code[self.counter].predicate:
            self.current = code[self.counter]
            self.counter += 1
            self.active = self._active(self.current)
            handler = HANDLERS.get(self.current.parts[0])
            if handler is None:
                raise self.current.unknown()
            handler(self, self.current)
            steps += 1
            if steps > MOST:
                raise Fault(f"{self.current}: no end after {MOST} instructions")
        return steps

    def _reset(self, place: Place, grid: Place) -> None:
        self.counter = 0
        self.shared = Shared(self._shared_size)
        self.copies: list[list[tuple[Access, list[Array]]]] = [[]]  # groups of cp.async
        self.registers: dict[str, Array] = {"%tid.x": self.thread, "%laneid": self.lane}
        self.registers["global_smem"] = np.zeros(self.threads, U)
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(self.threads, at, U)
            self.registers[f"%nctaid.{axis}"] = np.full(self.threads, size, U)
        self._constants: dict[str, Array] = {}

    def _active(self, i: Instruction) -> Array:
        if i.predicate is None:
            return self.all
        value = self.read(i.predicate.lstrip("!"))
        return ~value if i.predicate.startswith("!") else value

    def read(self, name: str) -> Array:
        """A register or a constant, one element a thread."""
        if name in self.registers:
            return self.registers[name]
        if name not in self._constants:
            self._constants[name] = np.full(self.threads, constant(name, self.current), U)
        return self._constants[name]

    def write(self, name: str, value: Array) -> None:
        """Set a register in the threads that are active."""
        value = np.asarray(value)
        if value.dtype != bool:
            value = value.astype(U)
        if self.active is not self.all:
            old = self.registers.get(name)
            old = np.zeros(self.threads, value.dtype) if old is None else old
            value = np.where(self.active, value, old)
        self.registers[name] = value

    def address(self, text: str) -> Array:
        """What `[register + offset]` points at."""
        name, _, offset = text.strip("[] ").partition("+")
        value = self.read(name.strip())
        return value + U(int(offset) & (2**64 - 1)) if offset else value

    def space(self, i: Instruction) -> Global | Shared:
        """The memory that a load or store names."""
        spaces = {"global": self.memory, "shared": self.shared}
        return spaces[next(part for part in i.parts if part in spaces)]

    def access(self, text: str, size: int, count: int, only: Array | None = None) -> Access:
        """The active threads' access at an address operand."""
        active = self.active if only is None else only
        at = self.address(text)[active].astype(np.int64)
        return Access(at, np.nonzero(active)[0] // 32, size, count, str(self.current))

    def together(self, i: Instruction) -> None:
        """Refuse a predicate on an instruction that all threads of a warp must reach."""
        if not self.active.all():
            raise Fault(f"{i}: not reached by all threads")


def constant(text: str, i: Instruction) -> int:
    """The bits of a number in the text."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0) & (2**64 - 1)
    raise Fault(f"{i}: register {text} was never written")
