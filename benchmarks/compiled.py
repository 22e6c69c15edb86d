"""One variant of a kernel compiled for one target, and what its machine code says.

`discover` walks a package for modules with `variants()`; `examine` compiles one of these and
judges what needs no table: that it compiles, spills in loops, shared memory, the most instructions
a weight that the variant grants itself, and exactness. benchmarks/aot.py runs all and keeps the
table.

A launch finds out which pointers and integers are multiples of 16, and which integers are 1. Here
the first holds of all that the variant does not call `odd`, and the second of none. Line numbers
are left out of the machine code (TRITON_DISABLE_LINE_INFO): its instructions are the same, and its
bytes change only with them.
"""

import contextlib
import functools
import hashlib
import importlib
import io
import pkgutil
from collections.abc import Mapping
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
    exact: bool
    """whether it was judged to round as its definition does"""
    source: str
    """a hash of all that decides the machine code, the compiler aside"""
    code: str
    """a hash of the machine code"""


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
        except (ImportError, SyntaxError) as error:
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


def _options(variant: Any) -> dict[str, Any]:
    return {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": variant.fp_fusion,
    }


def _key(source: Any, variant: Any, target: Target) -> str:
    """A hash of what the compiler is given: its own key of a kernel, options and target."""
    text = f"{source.hash()} {_options(variant)} {target.backend} {target.arch}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compile(source: Any, variant: Any, target: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    with contextlib.redirect_stdout(io.StringIO()):  # a failed ptxas prints the whole program
        return triton.compile(source, target=gpu, options=_options(variant))


def _read_nvidia(kernel: Any, target: Target) -> tuple[machine_code.Code, dict[str, int]]:
    text, usage = machine_code.disassemble(kernel.asm["cubin"])
    code = machine_code.parse_sass(text)
    system = RESERVED if int(target.arch) >= 90 else 0
    return code, {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spills": code.count(machine_code.SPILL),
        "shared": kernel.metadata.shared + max(0, usage["SHARED"] - system),
    }


def _read_amd(kernel: Any) -> tuple[machine_code.Code, dict[str, int]]:
    usage = machine_code.amd_usage(kernel.asm["amdgcn"])
    return machine_code.parse_amd(kernel.asm["amdgcn"]), {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "spills": usage["vgpr_spill_count"],
        "shared": kernel.metadata.shared + usage["group_segment_fixed_size"],
    }


def _each(variant: Any, target: Target, instructions: int) -> dict[str, Any]:
    """Weights that a thread handles, half as many where warps are twice as wide; and the ratio."""
    weights = variant.weights and variant.weights * 32 / target.lanes
    return {"weights": weights, "per_weight": weights and round(instructions / weights, 3)}


def _known(known: Mapping[str, Any], variant: Any, target: Target, key: str) -> Facts:
    each = _each(variant, target, known["instructions"])
    return Facts(**{**known, **each, "source": key})


def _measure(
    variant: Any, target: Target, known: Mapping[str, Any] | None
) -> tuple[Facts, list[str], str]:
    """Facts, faults that only the code shows, and opcodes; of `known` code nothing is read."""
    source = _source(variant)
    key = _key(source, variant, target)
    if known and (known["exact"] != variant.exact or (variant.exact and variant.fp_fusion)):
        known = None  # it was judged as another
    if known and known["source"] == key:
        return _known(known, variant, target, key), [], ""
    kernel = _compile(source, variant, target)
    nvidia = target.backend == "cuda"
    binary = kernel.asm["cubin"] if nvidia else kernel.asm["amdgcn"].encode()
    digest = hashlib.sha256(binary).hexdigest()[:16]
    if known and known["code"] == digest:
        return _known(known, variant, target, key), [], ""
    code, counts = _read_nvidia(kernel, target) if nvidia else _read_amd(kernel)
    facts = Facts(
        **counts,
        instructions=len(code.counted),
        loop=code.hot is not None,
        **_each(variant, target, len(code.counted)),
        matrix=code.matrix(),
        wide=code.wide(),
        exact=variant.exact,
        source=key,
        code=digest,
    )
    faults = []
    if spills := code.count_in_loops(machine_code.SPILL):
        faults.append(f"{spills} spill instructions inside a loop; none is allowed")
    if variant.exact:
        ptx = kernel.asm["ptx"] if nvidia else None
        faults += machine_code.inexact(ptx, code, variant.fp_fusion)
    return facts, faults, code.common()


def examine(
    package: str, name: str, target_name: str, known: Mapping[str, Any] | None = None
) -> Outcome:
    """Compile one variant for one target and judge it without the table.

    Args:
        package: the package to look for variants in.
        name: of the variant.
        target_name: a key of TARGETS.
        known: the table's entry, to be believed without compiling if kernel, options and target
            are those it was written for, and without disassembling if the compiled bytes are.

    Returns:
        Its facts, or None where it does not compile, and what fails.
    """
    variant, target = discover(package)[name], TARGETS[target_name]
    try:
        facts, faults, opcodes = _measure(variant, target, known)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything; it is reported
        lines = (str(error).strip() or repr(error)).splitlines()
        said = " ... ".join(lines[:1] + lines[1:][-1:])  # triton says where first, and why last
        return Outcome(None, (f"does not compile: {type(error).__name__}: {said}",))
    if facts.shared > target.shared:
        faults.append(f"{facts.shared} bytes of shared memory; {target.shared} at most")
    most = variant.max_instructions
    if most is not None and facts.per_weight is None:
        faults.append("max_instructions needs weights, the number that a thread handles")
    elif most is not None and target_name == "sm_90" and facts.per_weight > most:
        faults.append(f"{facts.per_weight} instructions a weight; {most} at most")
    return Outcome(facts, tuple(faults), opcodes)
