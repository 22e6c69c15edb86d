"""What the operators' tests share: accuracy against PyTorch's, and memory of live tensors."""

import functools
import importlib
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core.quant.codebook import CODEBOOKS
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import Weight4
from lora_kernels.cpu import library, machine


def _as_accurate_as(
    ours: Tensor, theirs: Tensor, truth: Tensor, magnitude: Tensor | None = None
) -> None:
    """Error against float64 at most twice PyTorch's, plus two roundings of the largest value.

    Of a sum that cancels, the largest value is not the result but the sum of its terms' magnitudes
    (`magnitude`): that is what the roundings on the way are relative to.
    """
    assert ours.shape == truth.shape
    assert ours.dtype == theirs.dtype
    if not truth.numel():
        return
    largest = (truth if magnitude is None else magnitude).abs().max().item()
    error, baseline = ((t.double() - truth).abs().max().item() for t in (ours, theirs))
    floor = 2 * torch.finfo(ours.dtype).eps * largest
    assert error <= 2 * baseline + floor, f"{error:.3e} > 2 x {baseline:.3e} + {floor:.3e}"


@pytest.fixture(scope="session")
def as_accurate_as() -> Callable[[Tensor, Tensor, Tensor], None]:
    return _as_accurate_as


def _make_weight(
    n: int,
    k: int,
    block: int = 64,
    *,
    nested: bool = False,
    table: Tensor | None = None,
    seed: int = 0,
) -> Weight4:
    generator = torch.Generator().manual_seed(seed)
    size, blocks = (n * k + 1) // 2, -(-n * k // block)
    codes = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    table = CODEBOOKS["nf4"].table() if table is None else table
    if not nested:
        scales = torch.randn(blocks, generator=generator)
        return Weight4(codes, scales, table, n, k, block)
    scales = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-blocks // 256), generator=generator)
    offset = torch.randn((), generator=generator)
    return Weight4(codes, scales, table, n, k, block, absmax, offset, dynamic_map())


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend by turns; Triton's kernels run in the interpreter, C needs a compiler."""
    if request.param == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORA_KERNELS", request.param)
    return request.param


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., Weight4]:
    """Random codes, scales of either sign: `make_weight(n, k, block, nested=, table=, seed=)`."""
    return _make_weight


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive at once; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}  # storage -> (bytes, tensors that hold it)
        self.peak = 0

    def _drop(self, key: int) -> None:
        size, holders = self.live.pop(key)
        if holders > 1:
            self.live[key] = (size, holders - 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tensors}
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key = storage.data_ptr()
            if key not in self.live and key in given:
                continue  # a view of an argument from outside
            holders = self.live.get(key, (0, 0))[1]
            self.live[key] = (storage.nbytes(), holders + 1)
            weakref.finalize(t, self._drop, key)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))
        return out


@pytest.fixture
def live_bytes() -> LiveBytes:
    return LiveBytes()


class _Bounds:
    """Where the tensors of a kernel lie, and whether what it reads and writes lies in them."""

    def __init__(self) -> None:
        self.starts = self.ends = np.empty(0, np.int64)

    def enter(self, arguments: tuple[object, ...]) -> None:
        """Note the tensors that a kernel is launched with."""
        spans = []
        for t in arguments:
            if isinstance(t, Tensor) and t.numel():
                last = sum((size - 1) * by for size, by in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
        self.starts, self.ends = np.array(sorted(spans), np.int64).reshape(-1, 2).T

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Each address that a mask lets through must be in the tensor of the first of them."""
        let = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        at = pointers.data[let].astype(np.int64)
        if not at.size:
            return
        low, high = int(at.min()), int(at.max()) + pointers.get_element_ty().primitive_bitwidth // 8
        inside = (self.starts <= low) & (high <= self.ends)
        assert inside.any(), f"{what} of bytes {low} to {high} is outside {self.starts, self.ends}"


@pytest.fixture(autouse=True)
def _within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel in the interpreter may touch nothing but the tensors it was given.

    What lies beside a tensor can be read without harm here, and ends a process on a GPU.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    bounds, builder = _Bounds(), interpreter.InterpreterBuilder
    launch = interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        bounds.enter((*args, *kwargs.values()))
        launch(self, *args, **kwargs)

    def loaded(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        bounds.check("a load", pointers, mask)
        return load(self, pointers, mask, *more)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        bounds.check("a store", pointers, mask)
        return store(self, pointers, value, mask, *more)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)


def _run_ptx(assembly: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run the assembly of an `inline_asm_elementwise` on arrays, one element a lane.

    Args:
        assembly: moves, logic, 32-bit shifts and byte permutes on `.b32` registers, float32
            products, and their rounding to 16 bits.
        outputs: how many of $0, $1, … are results; the inputs follow them.
        inputs: uint32 arrays of one shape, or scalars of shape ().

    Returns:
        The results, uint32. An operand that nothing has written is a KeyError.
    """
    registers = {f"${outputs + i}": np.asarray(a, np.uint32) for i, a in enumerate(inputs)}

    def read(operand: str) -> np.ndarray:
        if operand[0].isdigit():
            return np.asarray(int(operand, 0), np.uint32)
        return registers[operand]

    text = re.sub(r"//.*", "", assembly).strip().strip("{}")
    for statement in filter(None, (s.strip() for s in text.split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        operation = name.removesuffix(".b32").removesuffix(".u32")
        to, *operands = (operand.strip() for operand in rest.split(","))
        registers[to] = _PTX[operation](*map(read, operands))
    return [registers[f"${i}"] for i in range(outputs)]


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of the eight in a and b; a set fourth bit of a nibble spreads that byte's sign."""
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        word = np.where(nibble & 4, b, a)
        byte = word >> 8 * (nibble & 3) & 255
        byte = np.where(nibble & 8, (byte >> 7) * 255, byte)
        out |= (byte << 8 * i).astype(np.uint32)
    return out


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any function of three bits, by its truth table."""
    out = np.uint32(0)
    for row in range(8):
        if table >> row & 1:
            terms = (v if row & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1)))
            out = out | functools.reduce(np.bitwise_and, terms)
    return out


def _narrow(high: np.ndarray, low: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round two float32 to 16 bits, into the upper and the lower half of a word."""
    both = torch.from_numpy(np.stack(np.broadcast_arrays(high, low)).view(np.float32)).to(dtype)
    upper, lower = both.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return upper << 16 | lower


def _shift(function: Callable) -> Callable:
    """32-bit shifts; by 32 or more they give 0."""
    return lambda a, n: np.where(n < 32, function(a, n & 31), 0).astype(np.uint32)


_PTX: dict[str, Callable] = {
    "mov": lambda a: a,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "lop3": _lop3,
    "prmt": _prmt,
    "mul.rn.f32": lambda a, b: (a.view(np.float32) * b.view(np.float32)).view(np.uint32),
    "cvt.rn.bf16x2.f32": lambda high, low: _narrow(high, low, torch.bfloat16),
    "cvt.rn.f16x2.f32": lambda high, low: _narrow(high, low, torch.float16),
}


@pytest.fixture(scope="session")
def run_ptx() -> Callable[..., list[np.ndarray]]:
    """The decoders' PTX on numpy arrays: `run_ptx(assembly, number of outputs, inputs)`."""
    return _run_ptx


@pytest.fixture
def tiny_sources(tmp_path: Path) -> Path:
    """A folder with one C file: `lora_probe(p, n)` adds its instruction set's number to n floats.

    It returns n if that is below 0 (an errno, negated) and needs the header beside it.
    """
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "probe.h").write_text('#define LORA_EXPORT __attribute__((visibility("default")))\n')
    (folder / "probe.c").write_text(
        """#include "probe.h"
#if defined(__AVX512F__)
enum { NUMBER = 512 };
#elif defined(__AVX2__)
enum { NUMBER = 256 };
#else
enum { NUMBER = 128 };
#endif
LORA_EXPORT int lora_probe(float *p, long long n)
{
    for (long long i = 0; i < n; i++) p[i] += (float)NUMBER;
    return n < 0 ? (int)-n : 0;
}
"""
    )
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write an executable shell script into a folder of its own; gives back its path."""

    def write(text: str, name: str = "compiler") -> Path:
        path = tmp_path / "scripts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture(params=machine.available())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Operators on CPU tensors run in C, for each instruction set in turn; skips if none can."""
    monkeypatch.setenv("LORA_KERNELS", "native")
    monkeypatch.setenv("LORA_KERNELS_ISA", request.param)
    reason = library.why_not()
    if reason is not None:
        pytest.skip(reason)
    return request.param
