"""Operators for processors that this machine is not: a cross-compiler and an emulator.

`ziglang` is clang with the headers of many systems' C libraries, in a wheel; `unicorn` is QEMU's
processors without anything around them, in another. The operators, linked with the little that
freestanding.c gives them, become a program for a bare Arm processor: no operating system, no
threads, no C library.

The processor is a Cortex-A53, ARMv8.0: what later versions added (half-precision arithmetic, dot
products, atomics) is an illegal instruction on it. And its memory is what it was given. Each buffer
lies alone, pages that do not exist before and behind it; a call is made twice, with each buffer at
the beginning of its page and at the end of it, so that a byte too far on either side ends the
call. What it allocates is guarded in the same way, and has to be given back.
"""

import ctypes
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.cpu import library, toolchain

PAGE = 4096
RETURN, STACK, HEAP = 0x10000, 0x40000000, 0x100000000
STACK_BYTES = 1 << 20  # what pool.h promises a task
POISON = b"\xff"  # of memory that nobody has written: NaN in every type
LONGEST = 60_000_000  # µs
SUPERVISOR_CALL = 2  # QEMU's number of the exception
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
LINKING = ("-shared", "-pthread")
# as the operators are compiled for use, and no warning
FLAGS = (*(flag for flag in toolchain.FLAGS if flag not in LINKING), *WARNINGS)


@pytest.fixture(scope="session")
def strict_flags() -> tuple[str, ...]:
    """The flags that the operators are compiled with, but for linking; warnings are errors."""
    return FLAGS


@pytest.fixture(scope="session")
def zig(oracle: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Run a tool of ziglang's: `zig("cc", …)`. It must end with 0."""
    oracle("ziglang")
    cache = str(tmp_path_factory.mktemp("zig"))
    places = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}

    def run(*arguments: object) -> None:
        command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
        done = subprocess.run(command, env=places, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"

    return run


@pytest.fixture(scope="session")
def bare_program(zig: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Compile and link C files for a bare 64-bit Arm processor: `bare_program(files, *flags)`."""
    runtime = Path(__file__).parent / "freestanding.c"
    places = ("-I", toolchain.SOURCES, "-I", runtime.parent)
    target = ("-target", "aarch64-linux-gnu", *places, *FLAGS)

    def build(files: list[Path], *flags: str) -> bytes:
        folder = tmp_path_factory.mktemp("bare")
        objects = []
        # -fno-builtin: or a compiler may turn the loop of memset into a call of memset
        for file, more in [*((f, flags) for f in files), (runtime, ("-fno-builtin",))]:
            objects.append(folder / f"{file.stem}.o")
            zig("cc", *target, *more, "-c", file, "-o", objects[-1])
        image = folder / "image"
        zig("ld.lld", "-static", "--no-gc-sections", "--entry=0", *objects, "-o", image)
        return image.read_bytes()

    return build


class Arm:
    """A processor with a program in its memory.

    Attributes:
        steps: instructions that it has done, where `count` is set.
    """

    def __init__(self, unicorn: ModuleType, image: bytes, count: bool = False) -> None:
        self.unicorn, self.registers = unicorn, unicorn.arm64_const
        self.uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.uc.ctl_set_cpu_model(self.registers.UC_CPU_ARM64_A53)
        self.symbols: dict[str, int] = {}
        self._load(image)
        self.uc.mem_map(STACK, STACK_BYTES)
        self.rooms: dict[int, tuple[int, int]] = {}  # address -> (pages' address, their bytes)
        self.next, self.at_end, self.fault, self.steps = HEAP, False, "", 0
        self.uc.hook_add(unicorn.UC_HOOK_INTR, self._supervise)
        self.uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, self._note_fault)
        if count:
            self.uc.hook_add(unicorn.UC_HOOK_CODE, self._step)

    def _load(self, image: bytes) -> None:
        """Put the segments of an ELF program where it says, and read its table of symbols."""
        programs, sections = struct.unpack_from("<QQ", image, 32)
        _, program_count, _, section_count = struct.unpack_from("<HHHH", image, 54)
        for i in range(program_count):
            kind, access, offset, address, _, size, room, _ = struct.unpack_from(
                "<IIQQQQQQ", image, programs + 56 * i
            )
            if kind == 1:  # PT_LOAD; ELF's bits of access are Unicorn's, the other way round
                first = address // PAGE * PAGE
                last = -(-(address + room) // PAGE) * PAGE
                allowed = (access & 2) | (access & 1) << 2 | access >> 2
                self.uc.mem_map(first, last - first, allowed)
                self.uc.mem_write(address, image[offset : offset + size])
        headers = [
            struct.unpack_from("<IIQQQQII", image, sections + 64 * i) for i in range(section_count)
        ]
        for _, kind, _, _, offset, size, link, _ in headers:
            if kind == 2:  # SHT_SYMTAB
                names = image[headers[link][4] :]
                for at in range(offset, offset + size, 24):
                    name, _, _, value = struct.unpack_from("<IBxHQ", image, at)
                    self.symbols[names[name : names.index(0, name)].decode()] = value

    def room(self, size: int, alignment: int = 1) -> int:
        """Map pages for a buffer of `size` bytes: at their end, or from their beginning."""
        pages = max(1, -(-size // PAGE)) * PAGE
        address = self.next + ((pages - size) // alignment * alignment if self.at_end else 0)
        self.uc.mem_map(self.next, pages, self.unicorn.UC_PROT_READ | self.unicorn.UC_PROT_WRITE)
        self.uc.mem_write(self.next, POISON * pages)
        self.rooms[address] = (self.next, pages)
        self.next += pages + PAGE
        return address

    def free(self, address: int) -> None:
        self.uc.mem_unmap(*self.rooms.pop(address))

    def put(self, data: bytes) -> int:
        address = self.room(len(data))
        self.uc.mem_write(address, data)
        return address

    def read(self, address: int, size: int) -> bytes:
        return bytes(self.uc.mem_read(address, size))

    def call(self, name: str, *arguments: float) -> int:
        """Call a C function of integers, pointers and floats, which gives an int.

        An access outside what is mapped, or an instruction that ARMv8.0 lacks, fails the test.
        """
        floats = [a for a in arguments if isinstance(a, float)]
        for i, number in enumerate(floats):
            bits = int.from_bytes(struct.pack("<f", number), "little")
            self.uc.reg_write(self.registers.UC_ARM64_REG_S0 + i, bits)
        integers = [a for a in arguments if isinstance(a, int)]
        registers, beyond = integers[:8], integers[8:]
        words = struct.pack(f"<{len(beyond)}Q", *(a % 2**64 for a in beyond))
        top = STACK + STACK_BYTES - -(-len(words) // 16) * 16
        self.uc.mem_write(STACK, POISON * (top - STACK) + words)
        for i, argument in enumerate(registers):
            self.uc.reg_write(self.registers.UC_ARM64_REG_X0 + i, argument % 2**64)
        self.uc.reg_write(self.registers.UC_ARM64_REG_SP, top)
        self.uc.reg_write(self.registers.UC_ARM64_REG_LR, RETURN)
        self.fault = "it does not end"
        try:
            self.uc.emu_start(self.symbols[name], RETURN, timeout=LONGEST)
        except self.unicorn.UcError as error:
            self.fault = f"{error}: {self.fault}"
        counter = self.uc.reg_read(self.registers.UC_ARM64_REG_PC)
        if counter != RETURN:
            pytest.fail(f"{name} at {counter:#x}: {self.fault}")
        return self.uc.reg_read(self.registers.UC_ARM64_REG_W0)

    def _supervise(self, uc: Any, number: int, _data: Any) -> None:
        """The supervisor calls of freestanding.c; any other exception is the end."""
        if number != SUPERVISOR_CALL:
            self.fault = f"exception {number}: an instruction that the processor lacks?"
            uc.emu_stop()
            return
        x0, x1, x8 = (uc.reg_read(getattr(self.registers, f"UC_ARM64_REG_X{i}")) for i in (0, 1, 8))
        if x8 == 1:
            uc.reg_write(self.registers.UC_ARM64_REG_X0, self.room(x0, x1))
        elif x0:
            self.free(x0)

    def _note_fault(self, _uc: Any, _kind: int, address: int, size: int, *_: Any) -> bool:
        self.fault = f"{size} bytes at {address:#x}"
        return False

    def _step(self, *_: Any) -> None:
        self.steps += 1


@pytest.fixture(scope="session")
def arm(oracle: Callable[[str], ModuleType]) -> Callable[..., Arm]:
    """Put a program into a new processor: `arm(image, count=False)`."""
    unicorn = oracle("unicorn")
    oracle("unicorn.arm64_const")
    return lambda image, count=False: Arm(unicorn, image, count)


class Emulated:
    """The calls of library.py, made on an emulated processor.

    Every address that an operator hands to C it has read from a tensor, so it is known how far each
    may be followed.

    Attributes:
        called: the C functions that ran, by name.
    """

    def __init__(self, processor: Arm) -> None:
        self.processor, self.called = processor, set[str]()
        self.spans: dict[int, int] = {}  # address on this machine -> bytes, the latest last

    def address(self, tensor: Tensor) -> int:
        """`Tensor.data_ptr`, noted."""
        address = torch._C.TensorBase.data_ptr(tensor)
        self.spans.pop(address, None)
        if tensor.numel():
            last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
            self.spans[address] = (last + 1) * tensor.element_size()
        return address

    def function(self, name: str, *kinds: Any) -> Callable[..., None]:
        """`library.function`: both ways to lie in a page must give the same."""

        def run(*arguments: Any) -> None:
            passed = list(zip(kinds, arguments, strict=True))
            after = [self._run(name, passed, at_end) for at_end in (False, True)]
            assert after[0] == after[1], f"{name} depends on where its tensors lie"
            for start, data in after[0].items():
                ctypes.memmove(start, data, len(data))
            self.called.add(name)

        return run

    def _run(self, name: str, passed: list[tuple[Any, Any]], at_end: bool) -> dict[int, bytes]:
        """One call; gives back what the tensors hold after it, by their addresses."""
        processor = self.processor
        processor.at_end = at_end
        rooms: dict[int, int] = {}  # a tensor's address here -> there
        words: list[float] = []
        for kind, value in passed:
            if kind is ctypes.c_void_p and value:
                start = self._start(value)
                if start not in rooms:
                    rooms[start] = processor.put(ctypes.string_at(start, self.spans[start]))
                words.append(rooms[start] + value - start)
            else:
                words.append(float(value) if kind is ctypes.c_float else int(value or 0))
        try:
            assert processor.call(name, *words) == 0
            assert len(processor.rooms) == len(rooms), f"{name} has kept memory"
            return {a: processor.read(b, self.spans[a]) for a, b in rooms.items()}
        finally:
            for address in list(processor.rooms):
                processor.free(address)

    def _start(self, address: int) -> int:
        """Of the tensor that an address lies in: the latest, should others have been there."""
        for start in reversed(self.spans):
            if start <= address < start + self.spans[start]:
                return start
        raise AssertionError(f"{address:#x} lies in no tensor whose address was read")


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Arm], Emulated]:
    """Have the native operators call into a processor's program: `run_on(processor)`."""

    def install(processor: Arm) -> Emulated:
        emulated = Emulated(processor)

        def data_ptr(tensor: Tensor) -> int:
            return emulated.address(tensor)

        monkeypatch.setenv("LORA_KERNELS", "native")
        monkeypatch.setattr(library, "why_not", lambda: None)
        monkeypatch.setattr(library, "function", emulated.function)
        monkeypatch.setattr(Tensor, "data_ptr", data_ptr)
        return emulated

    return install
