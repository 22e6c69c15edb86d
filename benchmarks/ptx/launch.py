"""Launchers of the project on CPU tensors: each launch is compiled for a GPU and run here.

`emulated(target)` puts itself where Triton's launch is, `JITFunction.run`. What the launcher passes
is specialised as Triton does it: addresses and integers that are multiples of 16 are declared so,
an integer 1 becomes a constant, None and constexpr are constants. So the machine code is what a GPU
would be given for these tensors, at these alignments, with these strides.

Tensors lie in emulated memory as they lie here, each storage with a gap behind it. Memory that
torch.empty and its kin hand out inside is filled with ones (NaN) and counts as unwritten until a
kernel, or PyTorch in place, has written it.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.ptx.machine import Machine
from benchmarks.ptx.memory import Global
from benchmarks.ptx.program import Program, parse

__all__ = ["Emulator", "emulated"]

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel in the form that a launch asked for."""

    program: Program
    threads: int
    shared: int


@dataclass
class Call:
    """The arguments of a launch, sorted into what is compiled in and what is passed."""

    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], Any] = field(default_factory=dict)
    passed: list[Any] = field(default_factory=list)


def specialise(kernel: Any, values: Mapping[str, Any]) -> Call:
    """What Triton makes of the arguments, kernel by kernel."""
    call = Call()
    for i, p in enumerate(kernel.params):
        value = values.get(p.name, p.default)
        one = type(value) is int and value == 1 and not p.do_not_specialize
        if p.is_constexpr or value is None or one:
            call.signature[p.name], call.constants[(i,)] = "constexpr", value
            continue
        call.signature[p.name] = _kind(value, p.annotation_type)
        multiple = value.data_ptr() if isinstance(value, Tensor) else value
        whole = isinstance(multiple, int) and not isinstance(multiple, bool)
        if whole and multiple % 16 == 0 and not p.do_not_specialize:
            call.attributes[(i,)] = [["tt.divisibility", 16]]
        call.passed.append(value)
    return call


def _kind(value: Any, annotation: str | None) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return annotation or ("i32" if -(2**31) <= value < 2**31 else "i64")
    return "fp32"


class Emulator:
    """Compiles and runs launches for one target; remembers what it compiled and ran."""

    def __init__(self, arch: int, edit: Callable[[str], str] = lambda ptx: ptx) -> None:
        """For a target; `edit` may change the PTX, which is how faults are planted."""
        self.arch, self.edit = arch, edit
        self.compiled: dict[str, Compiled] = {}
        self.launched: dict[str, int] = {}  # instructions, by kernel
        self.fresh: dict[int, tuple[Tensor, np.ndarray]] = {}  # storage -> what is written

    def compile(self, kernel: Any, call: Call, options: dict[str, Any]) -> Compiled:
        """The kernel's PTX for these arguments, parsed."""
        key = f"{id(kernel)} {call.signature} {call.constants} {call.attributes} {options}"
        if key not in self.compiled:
            source = ASTSource(kernel, call.signature, call.constants, call.attributes)
            target = GPUTarget("cuda", self.arch, 32)
            built = triton.compile(source, target=target, options=options)
            self.compiled[key] = Compiled(
                parse(self.edit(built.asm["ptx"])),
                32 * built.metadata.num_warps,
                built.metadata.shared,
            )
        return self.compiled[key]

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """What JITFunction.run does, here."""
        del warmup
        names = [p.name for p in kernel.params]
        values = dict(zip(names, args, strict=False))
        values |= {name: options.pop(name) for name in names if name in options}
        call = specialise(kernel, values)
        compiled = self.compile(kernel, call, options)
        size = tuple(grid(values) if callable(grid) else grid)
        size += (1,) * (3 - len(size))
        if max(size[1:]) >= 2**16:
            raise ValueError(f"{kernel.__name__}: a grid of {size} is more than a GPU takes")
        self._run(kernel.__name__, compiled, call.passed, size)

    def _run(self, name: str, compiled: Compiled, passed: list[Any], grid: Any) -> None:
        storages = {
            v.untyped_storage().data_ptr(): v.untyped_storage()
            for v in passed
            if isinstance(v, Tensor)
        }
        memory = Global(sum(s.nbytes() + 4 * Global.GAP for s in storages.values()) + 2**16)
        at = {}
        for start, storage in storages.items():
            at[start] = memory.put(_bytes(storage), start % 256, self._written(start))
        bits = [_bits(value, at) for value in passed]
        machine = Machine(compiled.program, bits, memory, compiled.threads, compiled.shared)
        steps = 0
        with np.errstate(all="ignore"):  # NaN, infinity and overflow are the kernels' business
            for z, y, x in np.ndindex(grid[2], grid[1], grid[0]):
                steps += machine.run((x, y, z), grid)
        for start, storage in storages.items():
            data = _bytes(storage)
            span = slice(at[start] - memory.base, at[start] - memory.base + data.size)
            data[:] = memory.data[span]
            if start in self.fresh:
                self.fresh[start][1][:] = memory.written[span]
        self.launched[name] = self.launched.get(name, 0) + steps

    def _written(self, start: int) -> np.ndarray | None:
        """Which bytes of a storage hold something; None for all."""
        if start not in self.fresh:
            return None
        tensor, written = self.fresh[start]
        if tensor._version:  # PyTorch wrote into it; kernels leave the count alone
            written[:] = True
        return written

    def unwritten(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that returns memory as torch.empty does, its tensors marked."""

        def marked(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            storage = tensor.untyped_storage()
            data = _bytes(storage)
            data[:] = 0xFF
            # the tensor is kept, so that its address is not handed out again
            self.fresh[storage.data_ptr()] = (tensor, np.zeros(data.size, bool))
            return tensor

        return marked


def _bytes(storage: Any) -> np.ndarray:
    """A storage's memory itself, not a copy."""
    if not storage.nbytes():
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array(
        (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    )


def _bits(value: Any, at: Mapping[int, int]) -> int:
    """An argument as the GPU gets it."""
    if isinstance(value, Tensor):
        start = value.untyped_storage().data_ptr()
        return at[start] + value.data_ptr() - start
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


@contextlib.contextmanager
def emulated(emulator: Emulator) -> Iterator[None]:
    """Inside, Triton's launches run in the emulator."""
    from lora_kernels.gpu import matmul4

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        emulator.launch(kernel, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        pairs = 1 if emulator.arch == 90 else 2  # what the launcher asks the device for
        stack.enter_context(mock.patch.object(matmul4, "pairs", return_value=pairs))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            marked = emulator.unwritten(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, marked))
        yield
        emulator.fresh.clear()
