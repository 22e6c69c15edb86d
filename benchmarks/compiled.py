"""One variant of a kernel compiled for one target, and what its machine code says.

`discover` walks a package for modules with `variants()`; `examine` compiles one of these and
judges what needs no table: that it compiles, spills in loops, shared memory, the most instructions
a weight that the variant grants itself, and exactness. benchmarks/aot.py runs all and keeps the
table.

A launch finds out which pointers and integers are multiples of 16, and which integers are 1. Here
the first holds of all that the variant does not call `odd`, and the second of none.
"""

import contextlib
import functools
import importlib
import io
import pkgutil
from dataclasses import dataclass
from typing import Any

from benchmarks import machine_code

__all__ = ["TARGETS", "Facts", "Outcome", "Target", "discover", "examine"]

KB = 1024
RESERVED = 1024  # bytes of static shared memory that the system itself takes from sm_90 on


@dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    backend: str
    arch: int | str
    lanes: int
    """threads that execute together"""
    shared: int
    """bytes of shared memory that a program may have"""


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KB),
    "sm_86": Target("cuda", 86, 32, 99 * KB),
    "sm_89": Target("cuda", 89, 32, 99 * KB),
    "sm_90": Target("cuda", 90, 32, 227 * KB),
    "sm_100": Target("cuda", 100, 32, 227 * KB),
    "sm_120": Target("cuda", 120, 32, 99 * KB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KB),
}


@dataclass(frozen=True)
class Facts:
    """What is known of one variant on one target; a line of the table."""

    registers: int
    stack: int
    """bytes of local memory a thread"""
    spills: int
    """loads and stores of spilled registers (gfx942: spilled registers)"""
    shared: int
    """bytes of shared memory a program"""
    instructions: int
    """of the hot loop, or of the kernel if it has none"""
    loop: bool
    """whether it has a hot loop"""
    weights: float | None
    """4-bit weights that a thread handles in these instructions"""
    per_weight: float | None
    """instructions a weight"""
    matrix: str | None
    """kinds of matrix instructions"""
    wide: str
    """128-bit accesses of global memory: "load", "store", "load store" or "" """


@dataclass(frozen=True)
class Outcome:
    """A variant on a target: its facts, what fails whatever the table says, and its opcodes."""

    facts: Facts | None
    faults: tuple[str, ...]
    opcodes: str = ""


@functools.cache
def discover(package: str) -> dict[str, Any]:
    """Every Variant by name, of all modules of a package that have `variants()`."""
    root = importlib.import_module(package)
    found: dict[str, Any] = {}
    for info in pkgutil.walk_packages(root.__path__, package + "."):
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:
            raise ValueError(f"{info.name} cannot be imported: {error}") from error
        for variant in getattr(module, "variants", list)():
            if variant.name in found:
                raise ValueError(f"two variants are named {variant.name!r}; names must be unique")
            found[variant.name] = variant
    return found


def _source(variant: Any) -> Any:
    """The variant as triton compiles it, its multiples of 16 declared as a launch finds them."""
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    constants = {name for name, kind in variant.signature.items() if kind == "constexpr"}
    if set(variant.signature) != set(names) or constants != set(variant.constants):
        wrong = set(variant.signature) ^ set(names) | constants ^ set(variant.constants)
        raise ValueError(f"signature and constants do not fit the kernel at {sorted(wrong)}")
    if unknown := variant.odd - set(names):
        raise ValueError(f"odd names no argument: {sorted(unknown)}")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in variant.odd
        and (variant.signature[name].startswith("*") or variant.signature[name] in ("i32", "i64"))
    }
    signature = {name: variant.signature[name] for name in names}
    return ASTSource(variant.kernel, signature, variant.constants, attributes)


def _compile(variant: Any, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    with contextlib.redirect_stdout(io.StringIO()):  # a failed ptxas prints the whole program
        return triton.compile(_source(variant), target=gpu, options=options)


def _read(variant: Any, target: Target) -> tuple[Facts, machine_code.Code, str | None]:
    """Compile, and read the facts from the machine code."""
    kernel = _compile(variant, target)
    if target.backend == "cuda":
        text, usage = machine_code.disassemble(kernel.asm["cubin"])
        code, ptx = machine_code.parse_sass(text), kernel.asm["ptx"]
        registers, stack, spills = usage["REG"], usage["STACK"], code.count(machine_code.SPILL)
        static = max(0, usage["SHARED"] - (RESERVED if int(target.arch) >= 90 else 0))
    else:
        text, ptx = kernel.asm["amdgcn"], None
        code, usage = machine_code.parse_amd(text), machine_code.amd_usage(text)
        registers, spills = usage["vgpr_count"], usage["vgpr_spill_count"]
        stack, static = usage["private_segment_fixed_size"], usage["group_segment_fixed_size"]
    count = len(code.counted)
    facts = Facts(
        registers=registers,
        stack=stack,
        spills=spills,
        shared=kernel.metadata.shared + static,
        instructions=count,
        loop=code.hot is not None,
        weights=variant.weights,
        per_weight=round(count / variant.weights, 3) if variant.weights else None,
        matrix=code.matrix(),
        wide=code.wide(),
    )
    return facts, code, ptx


def examine(package: str, variant_name: str, target_name: str) -> Outcome:
    """Compile one variant for one target and judge it without the table."""
    variant, target = discover(package)[variant_name], TARGETS[target_name]
    try:
        facts, code, ptx = _read(variant, target)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything; it is reported
        line = (str(error).strip() or repr(error)).splitlines()[0]
        return Outcome(None, (f"does not compile: {type(error).__name__}: {line}",))
    faults = []
    if spills := code.count_in_loops(machine_code.SPILL):
        faults.append(f"{spills} spill instructions inside a loop; none is allowed")
    if facts.shared > target.shared:
        faults.append(f"{facts.shared} bytes of shared memory; {target.shared} at most")
    most = variant.max_instructions
    if target_name == "sm_90" and most is not None and not (facts.per_weight or 0) <= most:
        faults.append(f"{facts.per_weight} instructions a weight; {most} at most")
    if most is not None and not variant.weights:
        faults.append("max_instructions needs weights, the number that a thread handles")
    if variant.exact:
        faults += machine_code.inexact(ptx, code, variant.fp_fusion)
    return Outcome(facts, tuple(faults), code.common())
