"""Every function of lanes.h on every instruction set, by two compilers: what lanes.c checks.

An AVX-512 machine runs three instruction sets itself; NEON, and plain C on the same processor, run
in an emulator.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_kernels.cpu import machine, toolchain

DRIVER = Path(__file__).parent / "lanes.c"
MEMORY = 1 << 16


def system_compiler() -> tuple[str, ...]:
    try:
        return toolchain.find_compiler()
    except toolchain.BuildError as error:
        pytest.skip(str(error))


def compile_with(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_driver(program: Path, isa: str) -> None:
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    name, _, line = done.stdout.strip().partition(" ")
    assert done.returncode == 0, f"code {done.returncode}: lanes.c, line {line}"
    assert name == isa


@pytest.mark.parametrize("isa", machine.available())
def test_the_systems_compiler(isa: str, strict_flags: tuple[str, ...], tmp_path: Path) -> None:
    flags = (*strict_flags, *machine.FLAGS[isa], "-DLORA_HOSTED", f"-I{toolchain.SOURCES}")
    compile_with(*system_compiler(), *flags, DRIVER, "-o", tmp_path / "lanes")
    run_driver(tmp_path / "lanes", isa)


@pytest.mark.oracle
@pytest.mark.parametrize("isa", machine.available())
def test_clang(isa: str, zig: Callable, strict_flags: tuple[str, ...], tmp_path: Path) -> None:
    flags = (*strict_flags, *machine.FLAGS[isa], "-DLORA_HOSTED", f"-I{toolchain.SOURCES}")
    zig("cc", *flags, "-c", DRIVER, "-o", tmp_path / "lanes.o")
    # clang would compile the C library's stubs first, for seconds
    compile_with(*system_compiler(), tmp_path / "lanes.o", "-o", tmp_path / "lanes")
    run_driver(tmp_path / "lanes", isa)


@pytest.mark.oracle
@pytest.mark.parametrize("isa", ["neon", "portable"])
def test_64_bit_arm(isa: str, bare_program: Callable, arm: Callable) -> None:
    processor = arm(bare_program([DRIVER], *machine.FLAGS[isa]))
    name = isa.encode() + b"\0"
    assert processor.read(processor.symbols["lanes_name"], len(name)) == name
    line = processor.call("check_lanes", processor.room(MEMORY) + MEMORY)
    assert line == 0, f"lanes.c, line {line}"


def test_each_function_of_the_list_is_on_each_instruction_set_and_tried() -> None:
    listed, headers = (toolchain.SOURCES / "lanes.h").read_text(), {}
    for isa in machine.FLAGS:
        text = (toolchain.SOURCES / f"lanes_{isa}.h").read_text()
        headers[isa] = set(re.findall(r"^LANE \w+ (\w+)\(", text, re.MULTILINE))
    # what begins with lanes_ helps within one header, except for two that all have
    common = set.intersection(*headers.values())
    for isa, functions in headers.items():
        assert {name for name in functions if not name.startswith("lanes_")} <= common, isa
    driver = DRIVER.read_text()
    assert len(common) > 30
    for name in common:
        assert re.search(rf"\b{name}\b", listed), f"lanes.h does not list {name}"
        assert re.search(rf"\b{name}\(", driver), f"lanes.c does not try {name}"
