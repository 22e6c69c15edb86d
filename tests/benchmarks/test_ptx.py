"""The emulator of compiled PTX: the kernels pass, and planted faults do not.

Nothing is compiled in the suite's own process, where Triton interprets: the cases run as a user
runs them. Snippets of PTX need no compiler and run here.
"""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """The repository's root on the path, which a test run leaves off."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def run(*command: str, **env: str) -> tuple[int, str]:
    """Python in a process of its own: its exit status and all that it printed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env = kept | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        [sys.executable, *command], env=env, text=True, capture_output=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_kernels(full_run: bool) -> None:
    status, text = run("-m", "benchmarks.ptx", *([] if full_run else ["--quick"]))
    assert status == 0, text
    assert "0 failures" in text
    ran = set(re.findall(r"_\w+", text[text.index("kernels:") :]))
    few = {"_digits_kernel", "_planes_kernel", "_finish_kernel", "_multiply", "_multiply_dx"}
    many = {"_shrink_kernel", "_add_kernel", "_outer_kernel", "_kernel", "_expand_kernel"}
    assert few | many <= ran


PLANTED = """
import re, sys, tempfile
from benchmarks.aot import clean_environment
from benchmarks import ptx
from benchmarks.ptx.__main__ import check, parse

def nth(text, what, n, new):
    at = -1
    for _ in range(n):
        at = text.index(what, at + 1)
    return text[:at] + new + text[at + len(what):]

def lacks(kernel, edit):
    return lambda text: edit(text) if f".entry {kernel}(" in text else text

FAULTS = {
    "barrier": ("matmul4/16*", "_multiply", lambda t: nth(t, "bar.sync", 2, "bar.warp.sync")),
    "selector": ("matmul4/16*", "_multiply", lambda t: nth(t, "0x4051", 1, "0x4050")),
    "signs": ("planes4/1*", "_planes_kernel", lambda t: t.replace("0x88888888", "0x80888888", 1)),
    "bound": ("planes4/1*", "_planes_kernel", lambda t: re.sub(
        r"min\\.s32 \\t(%r\\d+), (%r\\d+), %r\\d+;", r"mov.b32 \\1, \\2;", t)),
    "mask": ("expand*", "_expand_kernel", lambda t: re.sub(r"@%p\\d+ st\\.global", "st.global", t)),
}
with tempfile.TemporaryDirectory() as fresh:
    clean_environment(fresh)
    for name, (only, kernel, edit) in FAULTS.items():
        seen = []
        def planted(text):
            changed = lacks(kernel, edit)(text)
            seen.append(changed != text)
            return changed
        failed = check(parse(["--quick", "--only", only]), planted)
        print("PLANTED", name, any(seen), *failed)

    from benchmarks.ptx.launch import Emulator
    launch = Emulator.launch
    def contracted(self, kernel, *args, **options):
        launch(self, kernel, *args, **options | {"enable_fp_fusion": True})
    Emulator.launch = contracted
    print("PLANTED contraction True", *check(parse(["--quick", "--only", "finish4*"])))
"""


def test_faults_in_compiled_kernels(full_run: bool) -> None:
    if not full_run:
        pytest.skip("twenty seconds of emulation: in the full run")
    status, text = run("-c", PLANTED)
    assert status == 0, text
    for name, said in {
        "barrier": "without a barrier",
        "selector": "AssertionError: error",
        "signs": "AssertionError: error",
        "bound": "out of bounds of global memory",
        "mask": "out of bounds of global memory",
        "contraction": "lanes disagree",
    }.items():
        line = next(x for x in text.splitlines() if x.startswith(f"PLANTED {name} "))
        assert line.startswith(f"PLANTED {name} True "), line  # the fault is there
        assert said in line, line  # and was noticed


def test_refuses_the_interpreter() -> None:
    status, text = run("-m", "benchmarks.ptx", "--quick", TRITON_INTERPRET="1")
    assert status == 1
    assert "TRITON_INTERPRET is set" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--targets", "sm_100"), "no such target: sm_100"), (("--only", "x"), "no case matches 'x'")],
)
def test_unknown_names(arguments: tuple[str, ...], said: str) -> None:
    status, text = run("-m", "benchmarks.ptx", *arguments)
    assert status != 0
    assert said in text


ENTRY = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
{
	.reg .b32 	%%r<9>;
	ld.param.b64 	%%rd1, [k_param_0];
	mov.u32 	%%r1, %%tid.x;
	shl.b32 	%%r2, %%r1, 2;
	cvt.u64.u32 	%%rd2, %%r2;
	add.s64 	%%rd3, %%rd1, %%rd2;
	%s
	ret;
}
"""
SHARE = """
	st.shared.b32 	[%r2], %r1;
	bar.sync 	0;
	xor.b32 	%r3, %r2, 128;
	ld.shared.b32 	%r4, [%r3];
	st.global.b32 	[%rd3], %r4;
"""
Execute = Callable[..., np.ndarray]


@pytest.fixture
def execute(path: None) -> Execute:
    """Runs a snippet on 64 threads over 64 words, the last 8 unwritten; returns them."""
    machine, memory, program = (
        importlib.import_module(f"benchmarks.ptx.{n}") for n in ("machine", "memory", "program")
    )

    def call(snippet: str, programs: int = 1) -> np.ndarray:
        store = memory.Global(1 << 15)
        words = np.arange(64, dtype=np.uint32)
        at = store.put(words.view(np.uint8), 0, np.arange(256) < 224)
        code = program.parse(ENTRY % snippet)
        one = machine.Machine(code, [at, 0], store, 64, 256)
        for i in range(programs):
            one.run((i, 0, 0), (programs, 1, 1))
        return store.data[at - store.base :][:256].view(np.uint32).copy()

    return call


def test_warps_exchange_through_shared_memory(execute: Execute) -> None:
    assert execute(SHARE).tolist() == [i ^ 32 for i in range(64)]


@pytest.mark.parametrize("pending", [0, 1])
def test_copies_land_at_the_wait(execute: Execute, pending: int) -> None:
    copy = "cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group;"
    wait = f"cp.async.wait_group {pending}; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd3], %r3;"
    if pending == 0:
        assert (execute(copy + wait) == 0).all()  # each thread copied word 0
        return
    with pytest.raises(importlib.import_module("benchmarks.ptx.memory").Fault, match="nobody"):
        execute(copy + wait)


@pytest.mark.parametrize(
    ("snippet", "said"),
    [
        (SHARE.replace("bar.sync 	0;", ""), "race|nobody has written"),
        (SHARE + "st.shared.b32 [%r2], %r4;", "race, stores over another warp's load"),
        (SHARE.replace("bar.sync 	0;", "bar.warp.sync -1;"), "race|nobody has written"),
        ("st.shared.b32 [0], %r1;", "race|lanes disagree"),
        ("st.global.b32 [%rd1], %r1;", "lanes disagree|written twice"),
        ("ld.global.b32 %r3, [%rd3];", "global memory that nobody has written"),
        ("ld.shared.b32 %r3, [%r2];", "shared memory that nobody has written"),
        ("ld.global.b32 %r3, [%rd3+4];", "out of bounds of global"),
        ("st.global.b32 [%rd3+-4], %r1;", "out of bounds of global"),
        ("st.shared.b32 [%r2+4], %r1;", "out of bounds of shared"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd3];", "misaligned for 8 bytes"),
        ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1+8];", "misaligned for 16 bytes"),
        ("add.s32 %r3, %r1, %r7;", "register %r7 was never written"),
        (
            "cp.async.ca.shared.global [%r2], [%rd1], 4; ld.shared.b32 %r3, [%r2];",
            "nobody has written",
        ),
    ],
)
def test_faults_are_noticed(execute: Execute, snippet: str, said: str) -> None:
    fault = importlib.import_module("benchmarks.ptx.memory").Fault
    with pytest.raises(fault, match=said):
        execute(snippet)


def test_programs_of_a_grid_may_not_disagree(execute: Execute) -> None:
    write = "mov.u32 %r5, %ctaid.x; add.s32 %r6, %r5, 100; st.global.b32 [%rd3], %r6;"
    fault = importlib.import_module("benchmarks.ptx.memory").Fault
    with pytest.raises(fault, match="written twice in one launch, differently"):
        execute(write, programs=2)
    assert (execute(write) == 100).all()


@pytest.mark.parametrize(
    "snippet", ["tcgen05.alloc %r3, 1;", "add.f64 %rd4, %rd1, %rd2;", "cvt.sat.f32.f32 %r3, %r1;"]
)
def test_unknown_instructions_are_named(execute: Execute, snippet: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(snippet.split()[0])):
        execute(snippet)


def test_threads_may_not_part_ways(execute: Execute) -> None:
    snippet = "setp.lt.s32 %p1, %r1, 5; @%p1 bra $L1; mov.b32 %r3, 1; $L1: mov.b32 %r3, 2;"
    with pytest.raises(NotImplementedError, match="part ways"):
        execute(snippet)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("prmt.b32 %r3, 0x33221180, 0x77665544, 0x8051;", 0xFF805511 & 0xFFFFFFFF),
        ("prmt.b32 %r3, 0x33221100, 0x77665544, 0x7340;", 0x77334400),
        ("bfe.s32 %r3, 0xF0, 4, 4;", 0xFFFFFFFF),
        ("shr.s32 %r3, 0x80000000, 40;", 0xFFFFFFFF),
        ("shl.b32 %r3, 1, 32;", 0),
        ("lop3.b32 %r3, 12, 10, 9, 0x96;", 12 ^ 10 ^ 9),
        ("add.rn.f32 %r3, 0f3F800000, 0f33800000;", 0x3F800000),
        ("cvt.rn.bf16.f32 %r3, 0f3F808000;", 0x3F80),
        ("cvt.rn.bf16x2.f32 %r3, 0f3F800000, 0f40000000;", 0x3F804000),
        ("cvt.rzi.s32.f32 %r3, 0fC0200000;", 0xFFFFFFFE),
        ("div.s32 %r3, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r3, -7, 2;", 0xFFFFFFFF),
        ("min.u32 %r3, -1, 5;", 5),
        ("mad.lo.s32 %r3, -2, 3, 1;", 0xFFFFFFFB),
    ],
)
def test_values(execute: Execute, code: str, value: int) -> None:
    assert execute(f"{code} st.global.b32 [%rd3], %r3;")[0] == value
