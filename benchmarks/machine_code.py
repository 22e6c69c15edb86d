"""What machine code says of a kernel: its loops, its spills, its instructions, its divisions.

Triton compiles for a GPU that is not there, so the program that will run can be read anywhere:
SASS by the `cuobjdump` that comes with Triton, AMD's assembly as text. Both become one `Code`, a
list of instructions with their successors, and from the graph of these come the natural loops
(a back edge of a depth-first walk from the entry, and all that reaches it without passing its
header). Nothing depends on the order of addresses: ptxas moves the waits of a loop behind the end
of the program, whose jump back into the loop is no loop of its own.

**The hot loop** is one that holds no other loop. Loops that only wait (at most 16 instructions, one
of them on a barrier and none on a matrix, as sm_90 and later have inside their pipelines) do not
count. Of several, those with matrix instructions are preferred, then the longest: a product decodes
in one loop and multiplies dense rows of LoRA in another, shorter one, and should that ever be the
longer, the count errs towards failing. A kernel without a loop is counted whole; code that is only
called, such as the rare path of a division, is not part of it.

**Exactness**, for kernels that must give the definition's bits:

1. The launch forbids contraction (`enable_fp_fusion=False`), which Triton passes to LLVM and as
   `--fmad=false` to ptxas.
2. In the PTX, each statement on floats is in rounding what IEEE 754 says: no `.approx`, `.full`
   or `.ftz`, no rounding other than to nearest, no `fma` or `mad`. PTX is the last form in which a
   division is one instruction, so this cannot be mistaken: `div.rn` is the rounded quotient.
3. In SASS a rounded division is 5 FFMA and one FCHK that calls the rare path. So there are at most
   5 FFMA to an FCHK; more would be a contraction that ptxas made of its own accord. In AMD's
   assembly: at most 5 fused multiply-adds and one reciprocal to a `v_div_fixup`.

2 proves it as far as ptxas keeps its word, and 3 is the witness that it does. It is weaker alone:
divisions by one number share part of their FFMA, which leaves room for others. Neither sees whether
the launcher passes the options the variant states, and the order of operations is the tests' part.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = [
    "SPILL",
    "Code",
    "Instruction",
    "amd_usage",
    "disassemble",
    "inexact",
    "parse_amd",
    "parse_sass",
]

WAIT = ("SYNCS", "NANOSLEEP", "UTCATOMSWS")  # on barriers and allocations
LONGEST_WAIT = 16
SPILL = r"LDL|STL|scratch_(load|store)"  # local memory, which Triton's kernels use for nothing else
WIDE = {  # accesses of global memory by 128 bits a thread or more, asynchronous copies included
    "load": r"LDG(STS)?\b.*\.(128|256)\b|UTMALDG|UBLKCP|(global|buffer)_load(_lds)?_dwordx4",
    "store": r"STG\b.*\.(128|256)\b|UTMASTG|(global|buffer)_store_dwordx4",
}


@dataclass(frozen=True)
class Instruction:
    """One line of assembly; `following` holds the indices of those that may come next."""

    opcode: str
    operands: str
    following: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in order of address; the first is its entry."""

    instructions: list[Instruction]

    @cached_property
    def reached(self) -> list[int]:
        """Indices of what the entry leads to; padding and called subroutines are not among it."""
        return sorted(self._walk[0])

    @cached_property
    def _walk(self) -> tuple[set[int], list[tuple[int, int]]]:
        """What is reached from the entry, and the back edges (from, to a loop's header)."""
        path, seen, back = {0}, {0}, []
        stack = [(0, iter(self.instructions[0].following))]
        while stack:
            at, left = stack[-1]
            step = next(left, None)
            if step is None:
                stack.pop()
                path.discard(at)
            elif step in path:
                back.append((at, step))
            elif step not in seen:
                seen.add(step)
                path.add(step)
                stack.append((step, iter(self.instructions[step].following)))
        return seen, back

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Natural loops, header to body: all that reaches a back edge without the header."""
        reached, back = self._walk
        before: dict[int, list[int]] = {i: [] for i in reached}
        for i in reached:
            for step in self.instructions[i].following:
                before[step].append(i)
        loops: dict[int, set[int]] = {}
        for tail, header in back:
            body = loops.setdefault(header, {header})
            todo = [tail]
            while todo:
                i = todo.pop()
                if i not in body:
                    body.add(i)
                    todo += before[i]
        return loops

    @cached_property
    def hot(self) -> set[int] | None:
        """The hot loop's instructions, as the module's docstring defines it."""
        working = {h: body for h, body in self.loops.items() if not self._waits(body)}
        inner = [b for h, b in working.items() if not any(o in b for o in working if o != h)]
        return max(inner, key=self._rank, default=None)

    def _waits(self, body: set[int]) -> bool:
        opcodes = [self.instructions[i].opcode for i in body]
        waits = len(body) <= LONGEST_WAIT and any(o.startswith(WAIT) for o in opcodes)
        return waits and not any(map(is_matrix, opcodes))

    def _rank(self, body: set[int]) -> tuple[bool, int]:
        return any(is_matrix(self.instructions[i].opcode) for i in body), len(body)

    @property
    def counted(self) -> list[str]:
        """Opcodes of the hot loop, or of all that is reached where there is no loop."""
        return [self.instructions[i].opcode for i in sorted(self.hot or self.reached)]

    def count(self, pattern: str, where: Iterable[int] | None = None) -> int:
        """How many of the opcodes (of all that is reached, unless told) match from their start."""
        at = self.reached if where is None else where
        return sum(re.match(pattern, self.instructions[i].opcode) is not None for i in at)

    def count_in_loops(self, pattern: str) -> int:
        """How many opcodes match inside any loop, hot or not."""
        return self.count(pattern, set().union(*self.loops.values()))

    def matrix(self) -> str | None:
        """The kinds of matrix instructions, such as "HGMMA", or None."""
        opcodes = (self.instructions[i].opcode for i in self.reached)
        kinds = {re.split(r"[.]|_f|_i", o)[0] for o in opcodes if is_matrix(o)}
        return "+".join(sorted(kinds)) or None

    def wide(self) -> str:
        """Which accesses of global memory are 128 bits wide: "load", "store", both or ""."""
        return " ".join(kind for kind, pattern in WIDE.items() if self.count(pattern))

    def common(self, most: int = 12) -> str:
        """The most frequent opcodes of what is counted, as text."""
        counts = Counter(opcode.split(".")[0] for opcode in self.counted)
        return " ".join(f"{opcode}:{n}" for opcode, n in counts.most_common(most))


def is_matrix(opcode: str) -> bool:
    """Whether it multiplies tiles: HMMA, IGMMA, UTCHMMA ...; v_mfma on AMD."""
    base = opcode.split(".")[0]
    return base.endswith("MMA") or base.startswith("v_mfma")


SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_sass(text: str) -> Code:
    """The instructions of `cuobjdump -sass`, of one kernel."""
    if text.count("Function : ") > 1:
        raise ValueError("the binary holds several functions; a kernel must be one")
    lines = [(int(m[1], 16), m[2], m[3], m[4].strip()) for m in SASS.finditer(text)]
    index = {address: i for i, (address, *_) in enumerate(lines)}

    def following(i: int, guard: str | None, opcode: str, operands: str) -> tuple[int, ...]:
        base = opcode.split(".")[0]
        after = (i + 1,) if i + 1 < len(lines) else ()
        if base in ("EXIT", "RET"):
            return after if guard else ()
        if base != "BRA":
            return after  # a CALL comes back
        to = re.findall(r"0x([0-9a-f]+)", operands)
        if not to or int(to[-1], 16) not in index:
            raise ValueError(f"a branch whose target is unknown: {opcode} {operands}")
        conditional = guard or "," in operands  # BRA.U UP0, 0x1c0
        return (index[int(to[-1], 16)], *(after if conditional else ()))

    return _code([(o, a, following(i, g, o, a)) for i, (_, g, o, a) in enumerate(lines)])


def parse_amd(text: str) -> Code:
    """The instructions of AMD's assembly as LLVM prints it, of one kernel."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for raw in text.splitlines():
        line = raw.split(";")[0].strip()
        if line.startswith(".") and line.endswith(":"):
            labels[line[:-1]] = len(lines)
        elif re.match(r"[a-z]+_\w+(\s|$)", line):
            opcode, _, operands = line.partition(" ")
            lines.append((opcode, operands.strip()))

    def following(i: int, opcode: str, operands: str) -> tuple[int, ...]:
        after = (i + 1,) if i + 1 < len(lines) else ()
        if opcode == "s_endpgm":
            return ()
        if opcode == "s_branch":
            return (labels[operands],)
        if opcode.startswith("s_cbranch"):
            return (labels[operands], *after)
        return after

    return _code([(o, a, following(i, o, a)) for i, (o, a) in enumerate(lines)])


def _code(lines: list[tuple[str, str, tuple[int, ...]]]) -> Code:
    if not lines:
        raise ValueError("no instructions in the disassembly")
    return Code([Instruction(*line) for line in lines])


def disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """SASS as text, and `-res-usage` as numbers: REG, STACK, SHARED (static) ... in bytes."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        command = [str(tool), "-sass", "-res-usage", file]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text, {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def amd_usage(text: str) -> dict[str, int]:
    """What AMD's assembly says of itself: vgpr_count, vgpr_spill_count ... (bytes for segments)."""
    return {name: int(n) for name, n in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}


FLOAT = re.compile(r"\.(f16|f16x2|bf16|bf16x2|f32|f32x2|f64)\b")
ROUNDED = ("add", "sub", "mul", "div", "rcp", "sqrt", "cvt")
STATEMENT = re.compile(r"^(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)+)\s")


def _fault(opcode: str) -> str | None:
    """What keeps a PTX opcode on floats from being the one rounding of the exact result."""
    name, *modifiers = opcode.split(".")
    checks: list[tuple[bool, str]] = [
        (name in ("fma", "mad"), "fused multiply-add"),
        ("approx" in modifiers or "full" in modifiers, "approximate"),
        ("ftz" in modifiers, "flushes subnormals"),
        (name in ROUNDED and not {"rz", "rm", "rp"}.isdisjoint(modifiers), "not to nearest"),
    ]
    return next((why for found, why in checks if found), None)


def inexact(ptx: str | None, code: Code, fusion: bool) -> list[str]:
    """Why a kernel may not be bit-equal to its definition; empty when it may.

    Args:
        ptx: the PTX, or None for AMD.
        code: its machine code.
        fusion: whether it was compiled with contraction allowed.
    """
    faults = ["contraction is allowed (fp_fusion=True)"] if fusion else []
    statements = re.split(r"[;{}\n]", re.sub(r"//.*", "", ptx or ""))
    found: Counter[tuple[str, str]] = Counter()
    for statement in statements:
        match = STATEMENT.match(statement.strip() + " ")
        if match and FLOAT.search(match[1]) and (why := _fault(match[1])):
            found[match[1], why] += 1
    faults += [f"{n} {opcode} in the PTX ({why})" for (opcode, why), n in sorted(found.items())]
    return faults + (_extra_amd(code) if ptx is None else _extra_sass(code))


def _extra(what: str, found: int, allowed: int) -> list[str]:
    return [f"{found} {what} where its divisions explain {allowed}"] if found > allowed else []


def _extra_sass(code: Code) -> list[str]:
    allowed = 5 * code.count("FCHK") + 2 * code.count(r"MUFU\.RSQ")  # quotients, square roots
    return _extra("fused multiply-adds", code.count(r"[FD]FMA"), allowed)


def _extra_amd(code: Code) -> list[str]:
    divisions = code.count("v_div_fixup_f32")
    fused = code.count(r"v_(fma|fmac|mad|mac)_f32") + 2 * code.count("v_pk_fma_f32")
    reciprocals = code.count("v_rcp_f32")
    # a square root begins with one of two estimates, the second where no number is subnormal
    allowed = 5 * divisions + 2 * code.count("v_sqrt_f32") + 5 * code.count("v_rsq_f32")
    return _extra("fused multiply-adds", fused, allowed) + _extra(
        "approximate reciprocals", reciprocals, divisions
    )
