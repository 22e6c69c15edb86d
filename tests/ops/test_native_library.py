"""The C library as Python sees it: loaded when asked, or one line that says why not."""

import contextlib
import ctypes
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_kernels.cpu import cache, library, machine, toolchain

CC = ""
with contextlib.suppress(toolchain.BuildError):
    CC = shlex.join(toolchain.find_compiler())
needs_compiler = pytest.mark.skipif(not CC, reason="no C compiler")
ISAS = machine.available()
NUMBERS = {"avx512": 512, "avx2": 256}  # what lora_probe adds


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library is made of the tiny sources, in a cache of this test's own."""
    monkeypatch.setattr(toolchain, "SOURCES", tiny_sources)
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_KERNELS_ISA", raising=False)
    return tmp_path / "cache"


def probe(many: int = 1) -> float:
    x = torch.zeros(3)
    assert (
        library.function("lora_probe", ctypes.c_void_p, ctypes.c_int64)(x.data_ptr(), many) is None
    )
    return x[0].item()


@needs_compiler
def test_a_function_runs() -> None:
    assert library.why_not() is None
    assert probe() == NUMBERS.get(library.isa(), 128)
    assert library.isa() == ISAS[0]


@needs_compiler
def test_a_function_is_bound_once_and_keeps_its_argument_types() -> None:
    one = library.function("lora_probe", ctypes.c_void_p, ctypes.c_int64)
    assert one is library.function("lora_probe", ctypes.c_void_p, ctypes.c_int64)
    other = library.function("lora_probe", ctypes.c_char_p, ctypes.c_int64)
    assert other is not one
    with pytest.raises(ctypes.ArgumentError):
        other(12, 0)
    one(None, 0)


@needs_compiler
def test_what_a_function_returns_is_raised() -> None:
    with pytest.raises(MemoryError, match="lora_probe found no memory for its workspace"):
        probe(-12)
    with pytest.raises(RuntimeError, match="lora_probe failed: Invalid argument"):
        probe(-22)
    with pytest.raises(AttributeError, match="lora_nothing"):
        library.function("lora_nothing")


@needs_compiler
def test_each_instruction_set_is_a_library_beside_the_others(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for isa in (*ISAS, *ISAS):
        monkeypatch.setenv("LORA_KERNELS_ISA", isa)
        assert library.why_not() is None
        assert library.isa() == isa
        assert probe() == NUMBERS.get(isa, 128)
        assert library.describe().startswith(f"C for {isa}, built by ")
    assert len(list(place.glob("*.so"))) == len(ISAS)
    monkeypatch.setenv("LORA_KERNELS_ISA", "sse9")
    for ask in (library.why_not, library.isa, library.describe, probe):
        with pytest.raises(ValueError, match=f"LORA_KERNELS_ISA is 'sse9'; .*{ISAS[-1]}"):
            ask()


def test_describe_says_what_where_and_what_else_was_tried(
    place: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcc = "Copyright (C) 2022 Free Software Foundation, Inc."
    compiler = script(
        f'[ "$1" = --version ] && echo "cc 1.2.3\n{gcc}" || exec {CC or "false"} "$@"'
    )
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("HOME", str(place.parent))
    if not CC:
        with pytest.raises(RuntimeError, match=r"the C operators cannot run here: .*code 1"):
            library.describe()
        return
    expected = f"C for {ISAS[0]}, built by gcc 1.2.3 ({compiler}) in "
    assert library.describe() == expected + "~/cache"
    monkeypatch.setenv("HOME", "/nowhere")
    assert library.describe() == expected + str(place)
    taken = place.parent / "taken"
    taken.write_text("a file")
    monkeypatch.setattr(cache, "_fresh", lambda: place)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(place.parent))
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(taken))
    folder = place.parent / f"lora-core-{os.geteuid()}"
    assert library.describe() == f"{expected}{folder} (not in {taken}: File exists)"


def test_a_failure_is_a_reason_and_is_remembered(
    place: Path, script: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = place.parent / "log"
    compiler = script(f"echo run >> {log}; echo 'probe.c:3: error: no such luck' >&2; exit 1")
    monkeypatch.setenv("CC", str(compiler))
    for _ in range(3):
        assert library.why_not() == f"{compiler} failed: probe.c:3: error: no such luck"
    assert log.read_text() == "run\n"
    for ask in (library.isa, library.describe, probe):
        with pytest.raises(RuntimeError, match=r"the C operators cannot run here: .*no such luck"):
            ask()


def test_a_machine_that_cannot_is_not_asked_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_not", lambda: "it is made of clay")
    monkeypatch.setattr(toolchain, "build", None)
    assert library.why_not() == "it is made of clay"


def test_an_error_of_the_system_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(isa: str, sources: Path) -> None:
        raise FileNotFoundError(2, "No usable temporary directory")

    monkeypatch.setattr(toolchain, "build", build)
    assert library.why_not() == "[Errno 2] No usable temporary directory"


def test_what_does_not_load_is_a_reason(script: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    garbage = script(
        'for a; do case $a in -o) o=1;; *) [ "$o" ] && echo no > "$a"; o=;; esac; done'
    )
    monkeypatch.setenv("CC", str(garbage))
    assert "file too short" in (library.why_not() or "")


def test_threads_are_pytorchs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    assert library.threads() == 3
    torch.set_num_threads(before)
    assert library.threads() == before


@needs_compiler
def test_many_threads_may_ask_first() -> None:
    start, found = threading.Barrier(4), []

    def ask() -> None:
        start.wait()
        found.append((library.why_not(), probe()))

    everyone = [threading.Thread(target=ask) for _ in range(4)]
    for thread in everyone:
        thread.start()
    for thread in everyone:
        thread.join()
    assert found == [(None, NUMBERS.get(ISAS[0], 128))] * 4


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


IMPORT = """
import os, subprocess, sys, torch

def refuse(*args, **kwargs):
    raise AssertionError("a process was started")

for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"), (os, "fork"),
                     (os, "execv"), (os, "execve")):
    setattr(module, name, refuse)
import lora_core, lora_kernels
assert "lora_kernels.cpu.library" in sys.modules
assert "lora_kernels.cpu.toolchain" not in sys.modules
assert not os.path.exists(os.environ["LORA_KERNELS_CACHE"])
"""


def test_importing_compiles_nothing(place: Path) -> None:
    done = python(IMPORT)
    assert done.returncode == 0, done.stderr


HIDDEN = """
import os, torch
from lora_core.cli.main import main
from lora_core import NF4Linear

assert main(["info"]) == 0
layer = NF4Linear.from_linear(torch.nn.Linear(130, 7))
x = torch.randn(3, 130, requires_grad=True)
y = layer(x)
y.sum().backward()
w, bias = layer.dense_weight().double(), layer.bias.double()
linear = torch.nn.functional.linear
terms = linear(x.double().abs(), w.abs(), bias.abs())  # what each of 131 roundings is relative to
off = (y.double() - linear(x.double(), w, bias)).abs()
assert (off <= 131 * torch.finfo(torch.float32).eps * terms).all()
os.environ["LORA_KERNELS"] = "native"
assert main(["info"]) == 0
"""


def test_with_no_compiler_on_the_path_everything_runs(tmp_path: Path) -> None:
    done = python(HIDDEN, PATH=str(tmp_path / "empty"), CC="", LORA_KERNELS="auto")
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    told = "not available: no C compiler: none of cc, gcc, clang is on the PATH, and CC is not set"
    assert [rest for name, *rest in lines if name == "native"] == [[told]] * 2
    chosen = [rest[0] for name, *rest in lines if name == "selected"]
    assert chosen[0] == "reference (LORA_KERNELS=auto: nothing faster is available)"
    assert chosen[1] == "none: LORA_KERNELS=native cannot run"


FORK = """
import ctypes, os, sys
from pathlib import Path
import torch
from lora_kernels.cpu import library, toolchain

toolchain.SOURCES = Path(sys.argv[1])

def add():
    x = torch.zeros(3)
    library.function("lora_probe", ctypes.c_void_p, ctypes.c_int64)(x.data_ptr(), 3)
    assert x.min() >= 128

add()
child = os.fork()
add()
if child == 0:
    assert library.why_not() is None
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@needs_compiler
def test_a_forked_child_keeps_the_library(tiny_sources: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tiny_sources)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_the_operators_compile_without_a_warning(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real sources
    command = (*toolchain.find_compiler(), "-Werror", "-Wpedantic")
    if isa == ISAS[0]:  # in full, for what only the optimiser notices; kept in the usual cache
        monkeypatch.setenv("CC", shlex.join(command))
        ctypes.CDLL(str(toolchain.build(isa, toolchain.SOURCES).path))
        return
    files = [str(path) for path in toolchain.SOURCES.glob("*.c")]
    flags = (*toolchain.FLAGS, *machine.FLAGS[isa], "-fsyntax-only")
    done = subprocess.run((*command, *flags, *files), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
