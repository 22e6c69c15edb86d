"""The C operators under AddressSanitizer and UBSan, beside pages that nobody may touch.

The library is built as for users, by a compiler that adds the sanitizers, and `native_sanitized.py`
runs it in a process that loads AddressSanitizer first. There is one test for each instruction set
that the CPU has.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_kernels.cpu import machine, toolchain

PROGRAM = Path(__file__).with_name("native_sanitized.py")
# after the usual options, so that these win; a large -O takes minutes to instrument
OPTIONS = "-Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.fixture
def compiler() -> str:
    """A compiler that has the sanitizers; CI has one."""
    try:
        found = toolchain.find_compiler()[0]
        runtime(found, "libasan.so")
    except (toolchain.BuildError, FileNotFoundError) as error:
        if os.environ.get("LORA_REQUIRE_ORACLES") == "1":
            raise
        pytest.skip(str(error))
    return found


@pytest.mark.parametrize("isa", machine.available())
def test_operators_stay_within_their_tensors(
    isa: str,
    compiler: str,
    script: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_run: bool,
) -> None:
    if not full_run and isa != machine.available()[0]:
        pytest.skip("ten seconds each: in the full run; the set that operators use here is tested")
    monkeypatch.setenv("CC", str(script(f'exec "{compiler}" "$@" {OPTIONS}')))
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    toolchain.build(isa, toolchain.SOURCES)  # here: a compiler under the preload would be slow
    env = {
        **os.environ,
        "LORA_KERNELS": "native",
        "LORA_KERNELS_ISA": isa,
        # torch throws exceptions, which AddressSanitizer wants to know of before torch is loaded
        "LD_PRELOAD": f"{runtime(compiler, 'libasan.so')} {runtime(compiler, 'libstdc++.so.6')}",
        # Python keeps memory until it ends; what operators keep is counted
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # that the program would notice faults is shown first
    best = isa == machine.available()[0]
    modes = ["plant", "run"] if full_run else ["glance", "run"] if best else ["run"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, *modes],
        capture_output=True,
        text=True,
        env=env,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def runtime(compiler: str, name: str) -> Path:
    """Where the compiler keeps a library."""
    done = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        raise FileNotFoundError(f"{compiler} has no {name}")
    return path
