"""Which implementation of an operator runs.

Every operator has a `reference` in plain PyTorch, which is its definition and runs anywhere. Others
are the same function made faster: `native` is C for the CPU at hand, `triton` runs on GPUs, and in
Triton's interpreter on a CPU, which is slow and meant for tests. Each operator's file keeps a table
from backend to function and asks `backend_for` which one to call, so the choice is made in this
file alone.

`LORA_KERNELS=auto|reference|native|triton` is read at each call. `auto` takes the fastest that the
operator has and the device can run, so it never fails; a backend that was asked for by name and
cannot run raises instead of giving way to another. (C and Triton take blocks as `quantize4` makes
them; block sizes of which 32 is no divisor, made by hand, are expanded by the definition.)

No device is asked anything before a tensor on it arrives, and nothing is compiled before a CPU
tensor arrives at an operator that has C for it.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from lora_kernels.cpu import library

__all__ = ["BACKENDS", "backend_for", "describe", "device_of", "inside", "requested"]

BACKENDS = ("reference", "native", "triton")
# what each device type tries first under `auto`; the interpreter has to be asked for by name
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
OLDEST_GPU = (8, 0)  # bfloat16 tensor cores


def requested() -> str:
    """The value of `LORA_KERNELS`, checked.

    Raises:
        ValueError: a value that is no backend.
    """
    choice = os.environ.get("LORA_KERNELS", "auto")
    if choice != "auto" and choice not in BACKENDS:
        raise ValueError(
            f"LORA_KERNELS is {choice!r}; set it to auto, {', '.join(BACKENDS)}, or leave it out"
        )
    return choice


def backend_for(tensor: Tensor, offered: Collection[str] = ("reference",)) -> str:
    """Choose the backend of one operator call.

    Args:
        tensor: the call's main argument; its device counts.
        offered: the backends the operator has.

    Returns:
        A member of `offered`.

    Raises:
        ValueError: `LORA_KERNELS` names no backend, or one that cannot run here; or
            `LORA_KERNELS_ISA` an instruction set that this CPU lacks.
    """
    choice = requested()
    if choice == "auto":
        for backend in _PREFERENCE.get(tensor.device.type, ()):
            if backend in offered and _why_absent(backend, tensor.device) is None:
                return backend
        return "reference"
    if choice in offered:
        reason = _why_absent(choice, tensor.device)
    else:  # said without compiling anything
        reason = f"this operator has no {choice} implementation"
    if reason is not None:
        raise ValueError(
            f"LORA_KERNELS={choice} cannot run: {reason}; set LORA_KERNELS=auto or reference"
        )
    return choice


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make a tensor's device the current one: Triton launches there, wherever the tensors are.

    Args:
        tensor: on any device.

    Returns:
        A context, empty for tensors that are on no GPU.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def inside(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """What the body of an operator works in: the tensor's device is the current one, autocast off.

    The caller has cast what autocast casts; what the body does is not to be cast again. On a CPU
    outside autocast that is how things are already, and leaving them so saves 5 µs an operator,
    which one token of a small model pays a hundred times.

    Args:
        tensor: on any device.

    Returns:
        A context.
    """
    if tensor.is_cpu and not torch.is_autocast_enabled("cpu"):
        return contextlib.nullcontext()
    return _surroundings(tensor)


@contextlib.contextmanager
def _surroundings(tensor: Tensor) -> Iterator[None]:
    with torch.autocast(tensor.device.type, enabled=False), device_of(tensor):
        yield


def describe() -> dict[str, str]:
    """What `lora-core info` prints: each backend and whether it can run, or why not.

    Returns:
        Backend to one line; `selected` tells what `LORA_KERNELS` leads to.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {backend: _why_absent(backend, device) for backend in BACKENDS}
    reasons["native"] = _why_absent("native", torch.device("cpu"))  # for CPU tensors on any machine
    lines = {b: f"not available: {why}" for b, why in reasons.items() if why is not None}
    lines["reference"] = "available: plain PyTorch on any device, the definition"
    if reasons["native"] is None:
        lines["native"] = f"available: {library.describe()}"
    if reasons["triton"] is None:
        lines["triton"] = f"available: {_triton_runs_on(device)}"
    choice = requested()
    if choice == "auto":
        able = [b for b in _PREFERENCE[device.type] if reasons[b] is None]
        why = "nothing faster is available" if able[0] == "reference" else f"on {device.type}"
        chosen = f"{able[0]} (LORA_KERNELS=auto: {why})"
    elif reasons[choice] is not None:
        chosen = f"none: LORA_KERNELS={choice} cannot run"
    else:
        chosen = f"{choice} (LORA_KERNELS={choice})"
    return {"selected": chosen, **{b: lines[b] for b in BACKENDS}}


def _why_absent(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        return library.why_not() if device.type == "cpu" else f"it is for CPU tensors, not {device}"
    if not _has_triton():
        return "the package triton is not installed"
    if device.type == "cuda":
        return _too_old(device) or _does_not_start()
    if device.type != "cpu":
        return f"no Triton kernels run on {device.type}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "no GPU for it: kernels run on a CPU with TRITON_INTERPRET=1 alone, set before the "
            "program starts"
        )
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return None
    have, need = (".".join(map(str, pair)) for pair in (capability, OLDEST_GPU))
    return f"{torch.cuda.get_device_name(device)} has compute capability {have}, below {need}"


@functools.cache
def _does_not_start() -> str | None:
    """Triton compiles a stub of C at its first start: without a compiler, no kernel runs."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 - of a compiler, a linker, Triton itself
        return f"Triton does not start: {str(error).strip().splitlines()[0]}"
    return None


def _triton_runs_on(device: torch.device) -> str:
    name = "the interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"triton {importlib.metadata.version('triton')} on {name}"
