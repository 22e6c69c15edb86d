"""The C operators as Python functions, through ctypes.

The library is compiled when the first operator on a CPU tensor asks whether it could run natively,
never at import (`toolchain.py` is not even imported before). Whatever goes wrong is a reason, one
line, remembered for the process; the plain PyTorch operators run instead.

ctypes costs about a microsecond a call and releases the interpreter's lock meanwhile. That is the
price of needing no header of Python or PyTorch; pybind11 would be faster by half a microsecond, and
would have to be compiled for each version of both.

`LORA_KERNELS_ISA` and `LORA_KERNELS_CACHE` are read at each call, as `LORA_KERNELS` is (half a
microsecond each); the compiler, from `CC` and `PATH`, when a library is first looked for. A library
that was loaded stays: forcing another instruction set loads a second one beside it.
"""

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lora_kernels.cpu import machine

if TYPE_CHECKING:
    from lora_kernels.cpu.toolchain import Built

__all__ = ["describe", "function", "isa", "threads", "why_not"]


@dataclass(frozen=True, eq=False)  # compared by identity, which is quick
class _Loaded:
    isa: str
    library: ctypes.CDLL
    built: "Built"


def why_not() -> str | None:
    """Why the C operators cannot run here; None if they can. The first call compiles them.

    Returns:
        One line.

    Raises:
        ValueError: `LORA_KERNELS_ISA` is no instruction set, or one that this CPU lacks.
    """
    found = _current()
    return found if isinstance(found, str) else None


def isa() -> str:
    """The instruction set that operators use now.

    Returns:
        "avx512", "avx2", "neon" or "portable".

    Raises:
        ValueError: as `why_not`.
        RuntimeError: `why_not()` has a reason.
    """
    return _required().isa


def describe() -> str:
    """The library in one line, for `lora-core info`. Asks the compiler for its version.

    Returns:
        Such as "C for avx512, built by gcc 12.2.0 (/usr/bin/cc) in ~/.cache/lora-core".

    Raises:
        ValueError: as `why_not`.
        RuntimeError: `why_not()` has a reason.
    """
    from lora_kernels.cpu import toolchain

    loaded = _required()
    built = loaded.built
    home = os.path.expanduser("~")
    folder = str(built.path.parent)
    if folder.startswith(home + os.sep):
        folder = "~" + folder.removeprefix(home)
    version, command = toolchain.version_of(built.compiler), " ".join(built.compiler)
    passed_over = f" (not in {'; '.join(built.refused)})" if built.refused else ""
    return f"C for {loaded.isa}, built by {version} ({command}) in {folder}{passed_over}"


def function(name: str, *argtypes: Any) -> Callable[..., None]:
    """A function of the library, which returns 0 or a number of errno.h.

    Args:
        name: of the C function.
        argtypes: ctypes' types of its arguments. Tensors go in as `tensor.data_ptr()`, a
            `c_void_p`, and have to outlive the call.

    Returns:
        The function. It raises MemoryError for ENOMEM, RuntimeError for any other number.

    Raises:
        AttributeError: the library has no such function.
        ValueError: as `why_not`.
        RuntimeError: `why_not()` has a reason.
    """
    return _bind(_required(), name, argtypes)


def threads() -> int:
    """How many threads an operator may use: PyTorch's own number.

    Returns:
        At least 1.
    """
    return torch.get_num_threads()


def _current() -> "_Loaded | str":
    """The library that the environment asks for, or why there is none."""
    read = os.environ.get
    return _load(read("LORA_KERNELS_ISA"), read("LORA_KERNELS_CACHE"))


def _required() -> _Loaded:
    found = _current()
    if isinstance(found, str):
        raise RuntimeError(f"the C operators cannot run here: {found}")
    return found


@functools.cache
def _load(wanted: str | None, place: str | None) -> "_Loaded | str":
    """Compile and load, once for each pair of settings; `place` is read again by `cache.py`."""
    reason = machine.why_not()
    if reason is not None:
        return reason
    chosen = machine.choose(wanted)
    from lora_kernels.cpu import toolchain

    try:
        built = toolchain.build(chosen, toolchain.SOURCES)
        return _Loaded(chosen, ctypes.CDLL(str(built.path)), built)
    except (toolchain.BuildError, OSError) as error:  # OSError: what was built does not load
        return str(error)


@functools.cache
def _bind(loaded: _Loaded, name: str, argtypes: tuple[Any, ...]) -> Callable[..., None]:
    found = loaded.library[name]  # a new object each time, so argtypes are this caller's alone
    found.argtypes = argtypes
    found.restype = ctypes.c_int
    found.errcheck = functools.partial(_check, name)
    return found


def _check(name: str, code: Any, _function: Any, _arguments: Any) -> Any:
    if code == errno.ENOMEM:
        raise MemoryError(f"{name} found no memory for its workspace")
    if code:
        raise RuntimeError(f"{name} failed: {os.strerror(code)}")
