"""The ahead-of-time gate: on the kernels as they stand, and on kernels with planted faults.

Nothing is compiled in the suite's own process, where Triton interprets: the gate is run as a user
runs it. `make test` compiles for sm_90, `make test-all` for every target.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    """The repository's root on the path, which a test run leaves off."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def machine_code(benchmarks: None) -> ModuleType:
    return importlib.import_module("benchmarks.machine_code")


@pytest.fixture(scope="module")
def aot(benchmarks: None) -> ModuleType:
    return importlib.import_module("benchmarks.aot")


def run(*command: str, path: Path = ROOT, **env: str) -> tuple[int, str]:
    """The gate in a process of its own: its exit status and all that it printed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env = kept | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"} | env
    if command[:1] != ("-c",):
        command = ("-m", "benchmarks.aot", *command)
    done = subprocess.run(
        [sys.executable, *command], env=env, text=True, capture_output=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


SEVERAL = """
import json, sys
from benchmarks import aot

def main():
    pin = sys.argv[1]
    if pin:
        aot.pinned = lambda: pin
    for arguments in json.loads(sys.argv[2]):
        try:
            status = aot.main(arguments)
        except SystemExit as error:
            status = error
        print("status", status, end="\\f", flush=True)

if __name__ == "__main__":
    main()
"""


def run_all(*runs: list[str], path: Path, pin: str = "") -> list[str]:
    """What each run prints and then its status, all in one process, which imports triton once."""
    script = path / "several.py"  # a file: a pool's processes import it
    script.write_text(SEVERAL)
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    _, printed = run("-c", code, pin, json.dumps(runs), path=path)
    assert printed.count("\f") == len(runs), printed
    return printed.split("\f")[:-1]


def test_no_kernel_is_worse_than_the_table_says(full_run: bool) -> None:
    options = [] if full_run else ["--targets", "sm_90", "--quick", "--jobs", "1"]
    status, printed = run(*options)
    assert status == 0, "\n".join(l for l in printed.splitlines() if not l.startswith("ok"))


# ---- planted faults

TOYS = """
import triton
import triton.language as tl
from lora_kernels.gpu.variant import Variant

@triton.jit
def elementwise(a_ptr, b_ptr, c_ptr, KIND: tl.constexpr):
    at = tl.program_id(0) * 256 + tl.arange(0, 256)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if KIND == "rounded":
        c = tl.div_rn(a, b) * b + a
    elif KIND == "approximate":
        c = a / b
    elif KIND == "contracted":
        c = a * b + a
    elif KIND == "fused":
        c = tl.fma(a, b, a)
    elif KIND == "assembly":
        c = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x3210;", "=r,r,r", [a.to(tl.int32), b.to(tl.int32)],
            dtype=tl.int32, is_pure=True, pack=1,
        ).to(tl.float32)
    elif KIND == "wrong":
        c = tl.dot(a, b)
    tl.store(c_ptr + at, c)

@triton.jit
def product(a_ptr, b_ptr, c_ptr, k, SIZE: tl.constexpr, STEP: tl.constexpr):
    at, step = tl.arange(0, SIZE), tl.arange(0, STEP)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(0, k, STEP):
        a = tl.load(a_ptr + at[:, None] * k + step[None, :])
        b = tl.load(b_ptr + at[None, :] * k + step[:, None])
        total = tl.dot(a, b, total)
        a_ptr += STEP
        b_ptr += STEP
    tl.store(c_ptr + at[:, None] * SIZE + at[None, :], total)

def one(name, kind, **options):
    return Variant(name, elementwise, dict(a_ptr="*fp32", b_ptr="*fp32", c_ptr="*fp32",
                   KIND="constexpr"), {"KIND": kind}, **options)

def dot(name, size, step, **options):
    signature = dict(a_ptr="*bf16", b_ptr="*bf16", c_ptr="*fp32", k="i32")
    signature |= dict(SIZE="constexpr", STEP="constexpr")
    return Variant(name, product, signature, dict(SIZE=size, STEP=step), **options)

EXACT = dict(exact=True, fp_fusion=False)

def variants():
    return [
        one("good/rounded", "rounded", **EXACT),
        one("good/assembly", "assembly", asm=True),
        one("good/also plain", "rounded", plain=True),
        dot("good/product", 64, 32, stages=3, weights=16.0, max_instructions=20),
        dot("good/second", 64, 32, stages=2),
        one("bad/approximate", "approximate", **EXACT),
        one("bad/contracted", "contracted", exact=True),
        one("bad/fused", "fused", **EXACT),
        one("bad/wrong", "wrong"),
        one("bad/misfit", "rounded", odd=frozenset(["d_ptr"])),
        dot("bad/spilled", 128, 16, warps=1),
        dot("bad/shared", 128, 128, stages=6, warps=8),
        dot("bad/long", 64, 32, weights=16.0, max_instructions=0.5),
    ]
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package `toys`: kernels good and bad."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "toys").mkdir()
    (folder / "toys" / "__init__.py").touch()
    (folder / "toys" / "kernels.py").write_text(TOYS)
    return folder


@pytest.fixture(scope="module")
def first(toys: Path) -> tuple[int, str, Path]:
    """The toys written into a fresh table for sm_90: status, output, table."""
    table = toys / "table.json"
    options = ["--package", "toys", "--targets", "sm_90", "--jobs", "1", "--table", str(table)]
    status, printed = run(*options, "--update", path=toys)
    return status, printed, table


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("approximate", "div.full.f32 in the PTX (approximate)"),
        ("contracted", "contraction is allowed (fp_fusion=True)"),
        ("contracted", "fma.rn.f32 in the PTX (fused multiply-add)"),
        ("contracted", "fused multiply-adds where its divisions explain 0"),
        ("fused", "fma.rn.f32 in the PTX (fused multiply-add)"),
        ("wrong", "does not compile: "),
        ("misfit", "odd names no argument: ['d_ptr']"),
        ("spilled", "spill instructions inside a loop; none is allowed"),
        ("shared", "bytes of shared memory; 232448 at most"),
        ("long", "instructions a weight; 0.5 at most"),
    ],
)
def test_planted_fault_fails_with_its_reason(
    first: tuple[int, str, Path], variant: str, why: str
) -> None:
    status, printed, table = first
    assert status == 1
    lines = [l for l in printed.splitlines() if l.startswith(f"FAILED bad/{variant} on sm_90: ")]
    assert any(why in line for line in lines), printed
    assert f"bad/{variant} on sm_90" not in json.loads(table.read_text())["facts"]


def test_sound_kernels_pass_and_fill_the_table(first: tuple[int, str, Path]) -> None:
    _, printed, table = first
    assert "FAILED good" not in printed
    facts = json.loads(table.read_text())["facts"]
    assert sorted(facts) == [
        f"good/{n} on sm_90" for n in ("assembly", "product", "rounded", "second")
    ]
    product, rounded = facts["good/product on sm_90"], facts["good/rounded on sm_90"]
    assert product["matrix"] == "HGMMA"
    assert product["loop"]
    assert product["per_weight"] == product["instructions"] / 16
    assert product["shared"] == 3 * 2 * 64 * 32 * 2 + product["shared"] % 1024  # stages, operands
    assert product["wide"].startswith("load")
    assert not rounded["loop"]
    assert rounded["matrix"] is None
    # one line an entry
    assert all(json.dumps(k) + ": " + json.dumps(v) in table.read_text() for k, v in facts.items())


def test_change_for_the_worse_names_the_fact(toys: Path, first: tuple[int, str, Path]) -> None:
    before = json.loads(first[2].read_text())
    facts = before["facts"]
    registers = facts["good/rounded on sm_90"]["registers"]
    tables = []

    def doctored(variant: str, **changes: object) -> list[str]:
        facts[f"good/{variant} on sm_90"] |= changes
        tables.append(toys / f"doctored{len(tables)}.json")
        tables[-1].write_text(json.dumps(before))
        options = ["--package", "toys", "--targets", "sm_90", "--jobs", "1"]
        return [*options, "--only", "good/*", "--table", str(tables[-1])]

    del facts["good/assembly on sm_90"]
    facts["good/ghost on sm_80"] = dict(facts["good/product on sm_90"])
    doctored("product", shared=1 << 20)
    other = "0" * 16
    runs = [
        doctored("rounded", registers=registers - 1),
        [*doctored("second", registers=1), "--quick"],
        [*doctored("second", source=other), "--quick"],
        [*doctored("second", code=other), "--quick"],
    ]
    read, believed, same_bytes, changed = run_all(*runs, path=toys)
    worse = f"FAILED good/rounded on sm_90: worse: registers {registers - 1} -> {registers}"
    assert worse in read
    assert "\ngood/product on sm_90: better: shared 1048576 -> " in read
    assert "better than the table: run --update" in read
    assert "FAILED good/assembly on sm_90: not in the table; run --update" in read
    assert "FAILED good/ghost on sm_80: in the table, but gone from the code" in read
    assert read.endswith("\n4 judged, 3 failures, 7 of all exempt\nstatus 1")
    # --quick believes the table of a source, or else of bytes, that it was written for
    assert "\ngood/second on sm_90: 1 registers" in believed
    assert "\ngood/second on sm_90: 1 registers" in same_bytes
    assert "FAILED good/second on sm_90: worse: registers 1 -> " in changed
    # the first variant of a kernel is read all the same
    assert "\ngood/product on sm_90: better: shared 1048576 -> " in believed


def test_another_triton_is_held_to_the_limits_alone(toys: Path) -> None:
    options = ["--package", "toys", "--jobs", "2", "--table", str(toys / "none.json")]
    every = [*options, "--targets", "sm_90,gfx942", "--only", "*/[acr]*"]
    limits, update = run_all(every, [*options, "--update"], path=toys, pin="0.1")
    assert "not 0.1: the table is not compared, only limits are" in limits
    assert limits.endswith("status 1")
    assert "FAILED good" not in limits
    assert "good/rounded on gfx942: " in limits
    assert "good/also plain on gfx942: " in limits
    assert "good/assembly on gfx942" not in limits  # exempt
    assert "good/also plain on sm_90" not in limits
    assert "bad/contracted on gfx942: 1 fused multiply-adds where its" in limits
    assert "status the table is kept for triton 0.1; this is " in update


@pytest.mark.parametrize(
    ("arguments", "env", "why"),
    [
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, under which nothing can be comp"),
        (["--targets", "sm_70"], {}, "no such target: sm_70; known are sm_80"),
        (["--jobs", "0"], {}, "--jobs must be 1 or more; got 0"),
        (["--table", "absent.json"], {}, "the table is of triton None, not "),
    ],
)
def test_refusal_is_one_line(arguments: list[str], env: dict[str, str], why: str) -> None:
    status, printed = run(*arguments, **env)
    assert status != 0
    assert why in printed
    assert "Traceback" not in printed


def test_package_that_cannot_be_judged_is_refused(toys: Path, first: tuple[int, str, Path]) -> None:
    double = "def variants(): return 2 * [v.Variant('same', None, {}, {})]"
    for package, text in (
        ("broken", "from lora_kernels.gpu import no_such_kernel"),
        ("double", f"import lora_kernels.gpu.variant as v\n{double}"),
    ):
        (toys / package).mkdir()
        (toys / package / "__init__.py").touch()
        (toys / package / "module.py").write_text(text)
    table = ["--table", str(first[2]), "--package"]
    nothing, broken, twice = run_all(
        [*table, "toys", "--only", "no*"], [*table, "broken"], [*table, "double"], path=toys
    )
    assert nothing == "status no variant of toys matches 'no*'"
    assert broken.startswith("status broken.module cannot be imported: cannot import name")
    assert twice == "status two variants are named 'same'; names must be unique"


# ---- reading machine code


def sass(*lines: str) -> str:
    """Lines as cuobjdump prints them, 16 bytes an instruction."""
    return "Function : toy\n" + "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0 */" for i, line in enumerate(lines)
    )


# a loop with a matrix instruction whose wait stands behind the end, as on sm_100; before it a
# longer loop around a short one; and a subroutine
PIPELINE = sass(
    "MOV R1, c[0x0][0x28]",  # 0x00
    "@!P0 EXIT",
    "IADD3 R0, R0, 0x1, RZ",  # 0x20: outer loop
    "LDL R9, [R1]",
    "FADD R2, R2, R3",  # 0x40: inner loop
    "@P1 BRA 0x40",
    "CALL.REL.NOINC 0x100",
    "BRA.U UP0, 0x20",
    "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x80: hot loop
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",
    "@!P0 BRA 0x130",
    "HGMMA.64x8x16.F32.BF16 R4, R4, gdesc[UR4], R4",  # 0xb0
    "@P2 BRA 0x80",
    "STG.E.128 desc[UR4][R2.64], R4",
    "EXIT",
    "BRA 0xf0",
    "STL [R1], R9",  # 0x100: the subroutine
    "RET.REL.NODEC R16 0x0",
    "NOP",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3",  # 0x130: the wait
    "@!P0 BRA 0x130",
    "BRA 0xb0",
)


def test_loops_of_sass(machine_code: ModuleType) -> None:
    code = machine_code.parse_sass(PIPELINE)
    assert code.loops == {
        2: {2, 3, 4, 5, 6, 7},
        4: {4, 5},
        8: {8, 9, 10, 11, 12, 19, 20, 21},
        19: {19, 20},
    }
    assert code.hot == code.loops[8]
    assert code.matrix() == "HGMMA"
    assert code.wide() == "load store"
    assert code.count(machine_code.SPILL) == 1  # the subroutine is not reached but called
    assert code.count_in_loops(machine_code.SPILL) == 1
    assert len(code.reached) == 18
    assert code.common(2) == "BRA:4 SYNCS:2"


def test_hot_loop_is_the_longest_that_multiplies(machine_code: ModuleType) -> None:
    dense = ["HMMA.16816.F32.BF16 R4, R4, R8, R4", "@P0 BRA 0x0"]
    decode = ["PRMT R0, R0, R1, R2", "HMMA.16816.F32.BF16 R4, R4, R8, R4", "@P0 BRA 0x20"]
    sums = [*9 * ["FADD R0, R0, R1"], "@P0 BRA 0x50"]
    code = machine_code.parse_sass(sass(*dense, *decode, *sums, "EXIT"))
    assert len(code.loops) == 3
    assert code.hot == {2, 3, 4}


def test_kernel_without_a_loop_is_counted_whole(machine_code: ModuleType) -> None:
    code = machine_code.parse_sass(sass("FADD R0, R0, R1", "@P0 BRA 0x30", "NOP", "EXIT", "NOP"))
    assert code.hot is None
    assert code.counted == ["FADD", "BRA", "NOP", "EXIT"]


def test_what_cannot_be_read_is_said(machine_code: ModuleType) -> None:
    with pytest.raises(ValueError, match="no instructions in the disassembly"):
        machine_code.parse_sass("Function : toy")
    with pytest.raises(ValueError, match="a branch whose target is unknown: BRA 0x5000"):
        machine_code.parse_sass(sass("BRA 0x5000"))
    with pytest.raises(ValueError, match="several functions"):
        machine_code.parse_sass(sass("EXIT") + sass("EXIT"))


AMD = """
toy:                                    ; @toy
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
.Ltmp1:
	global_load_dwordx4 v[2:5], v[2:3], off
	scratch_store_dword off, v9, s32    ; 4-byte Folded Spill
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	s_cbranch_vccnz .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	v_rcp_f32_e32 v1, v2
	v_fma_f32 v1, v1, v2, v3
.LBB0_3:
	s_endpgm
	s_nop 0
    .vgpr_count:     200
    .vgpr_spill_count: 1
"""


def test_loops_of_amd_assembly(machine_code: ModuleType) -> None:
    code = machine_code.parse_amd(AMD)
    assert code.loops == {2: {2, 3, 4, 5}}
    assert code.matrix() == "v_mfma"
    assert code.wide() == "load"
    assert code.count_in_loops(machine_code.SPILL) == 1
    assert len(code.reached) == 10
    assert machine_code.amd_usage(AMD) == {"vgpr_count": 200, "vgpr_spill_count": 1}
    assert machine_code.inexact(None, code, fusion=False) == [
        "1 fused multiply-adds where its divisions explain 0",
        "1 approximate reciprocals where its divisions explain 0",
    ]


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("div.rn.f32 %r1, %r2, %r3;", None),
        ("mul.rn.f32 %r1, %r2, %r3;", None),
        ("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", None),
        ("cvt.rzi.s32.f32 %r1, %r2;", None),
        ("mad.lo.s32 %r1, %r2, %r3, %r4;", None),
        ("// fma.rn.f32 in a comment", None),
        ("div.full.f32 %r1, %r2, %r3;", "1 div.full.f32 in the PTX (approximate)"),
        ("@%p1 rcp.approx.ftz.f32 %r1, %r2;", "1 rcp.approx.ftz.f32 in the PTX (approximate)"),
        ("mul.ftz.f32 %r1, %r2, %r3;", "1 mul.ftz.f32 in the PTX (flushes subnormals)"),
        ("cvt.rz.bf16.f32 %r1, %r2;", "1 cvt.rz.bf16.f32 in the PTX (not to nearest)"),
        ("mad.rn.f32 %r1, %r2, %r3, %r4;", "1 mad.rn.f32 in the PTX (fused multiply-add)"),
        ("{ mov.b32 a, b; fma.rn.bf16x2 a, b, c, d; }", "1 fma.rn.bf16x2 in the PTX (fused m"),
    ],
)
def test_ptx_statement_that_rounds_otherwise(
    machine_code: ModuleType, statement: str, why: str | None
) -> None:
    code = machine_code.parse_sass(sass("EXIT"))
    faults = machine_code.inexact(f"\n\t{statement}\n", code, fusion=False)
    assert len(faults) == (why is not None)
    assert why is None or faults[0].startswith(why)


def test_fma_beyond_the_divisions_is_seen_in_sass(machine_code: ModuleType) -> None:
    division = ["MUFU.RCP R3, R8", "FCHK P0, R4, R8", *5 * ["FFMA R0, R3, R8, R1"]]
    clean = machine_code.parse_sass(sass(*division, "EXIT"))
    assert machine_code.inexact("", clean, fusion=False) == []
    more = machine_code.parse_sass(sass(*division, "FFMA R0, R1, R2, R3", "EXIT"))
    assert machine_code.inexact("", more, fusion=False) == [
        "6 fused multiply-adds where its divisions explain 5"
    ]


# ---- the table

FACTS = {
    "registers": 40,
    "stack": 0,
    "spills": 0,
    "shared": 1024,
    "instructions": 64,
    "loop": True,
    "weights": 16.0,
    "per_weight": 4.0,
    "matrix": "HGMMA",
    "wide": "load store",
    "exact": False,
    "source": "fedcba9876543210",
    "code": "0123456789abcdef",
}


@pytest.mark.parametrize(
    ("change", "worse", "better"),
    [
        ({}, [], []),
        ({"registers": 41}, ["registers 40 -> 41"], []),
        ({"stack": 8, "spills": 2}, ["stack 0 -> 8", "spills 0 -> 2"], []),
        ({"shared": 1000}, [], ["shared 1024 -> 1000"]),
        ({"instructions": 128, "weights": 32.0}, [], []),  # twice the weights a trip
        ({"per_weight": 4.062}, ["per_weight 4.0 -> 4.062"], []),
        ({"weights": None, "per_weight": None, "instructions": 65}, ["instructions 64 -> 65"], []),
        ({"matrix": "HMMA"}, ["matrix instructions HGMMA -> HMMA"], []),
        ({"wide": "load"}, ["128-bit store lost"], []),
    ],
)
def test_comparison(aot: ModuleType, change: dict, worse: list[str], better: list[str]) -> None:
    assert aot.compare(FACTS, FACTS | change) == (worse, better)
    if "wide" in change:
        assert aot.compare(FACTS | change, FACTS) == ([], ["128-bit store gained"])


def test_table_and_its_markdown(aot: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    whole = FACTS | {"weights": None, "per_weight": None, "matrix": None, "wide": ""}
    facts = {"b/on on sm_90": FACTS, "a on sm_90": whole, "a on sm_80": FACTS}
    aot.write_table(table, "3.7.1", facts)
    assert aot.read_table(table) == {"triton": "3.7.1", "facts": facts}
    assert table.read_text().count("\n") == 3 + len(facts) + 2
    assert aot.markdown(aot.read_table(table), "sm_90", "*").splitlines()[2:] == [
        "| `a` | 40 | 1.0 | 64 |  |  |  |",
        "| `b/on` | 40 | 1.0 | 64 | 4.00 | HGMMA | load store |",
    ]


def test_quick_reads_one_variant_of_each_kernel(aot: ModuleType) -> None:
    one, two = SimpleNamespace(kernel=object()), SimpleNamespace(kernel=object())
    variants = {"a": one, "b": two, "c": one, "d": two}
    jobs = [("a", "sm_90"), ("b", "sm_90"), ("c", "sm_90"), ("c", "gfx942"), ("d", "gfx942")]
    sample = {"a on sm_90", "b on sm_90", "c on gfx942", "d on gfx942"}
    assert aot._sample(jobs, variants) == sample


def test_pinned_version(aot: ModuleType, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==2.13.0\ntriton==3.7.1\n")
    assert aot.pinned(constraints) == "3.7.1"
    constraints.write_text("torch==2.13.0\n")
    with pytest.raises(SystemExit, match="pins no triton"):
        aot.pinned(constraints)
