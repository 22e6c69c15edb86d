"""Which implementation of an operator runs.

Every operator has a `reference` in plain PyTorch, which is its definition and runs anywhere. Others
are the same function made faster: `native` is C for the CPU at hand, `triton` runs on GPUs. Each
operator's file keeps a table from backend to function and asks `backend_for` which one to call, so
the choice is made in this file alone.

`LORA_KERNELS=auto|reference|native|triton` is read at each call. `auto` takes the fastest that the
operator has and the device can run, so it never fails; a backend that was asked for by name and
cannot run raises instead of giving way to another.
"""

import os
from collections.abc import Collection

from torch import Tensor

__all__ = ["BACKENDS", "backend_for", "describe", "requested"]

BACKENDS = ("reference", "native", "triton")
# what each device type tries first under `auto`
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}
# which operators have an implementation beside the reference; their files add to it
_WHY_ABSENT = {
    "native": "no operator of this version has a C implementation",
    "triton": "no operator of this version has a Triton implementation",
}


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
        ValueError: `LORA_KERNELS` names no backend, or one that cannot run here.
    """
    choice = requested()
    if choice == "auto":
        order = _PREFERENCE.get(tensor.device.type, ("reference",))
        return next(backend for backend in order if backend in offered)
    if choice not in offered:
        raise ValueError(
            f"LORA_KERNELS={choice} cannot run: {_WHY_ABSENT[choice]}; "
            "set LORA_KERNELS=auto or reference"
        )
    return choice


def describe() -> dict[str, str]:
    """What `lora-core info` prints: each backend and whether it can run, or why not.

    Returns:
        Backend to one line; `selected` tells what `LORA_KERNELS` leads to.
    """
    lines = {"reference": "available: plain PyTorch on any device, the definition"}
    lines |= {name: f"not available: {reason}" for name, reason in _WHY_ABSENT.items()}
    choice = requested()
    if choice == "auto":
        return {"selected": "reference (LORA_KERNELS=auto: nothing faster is available)", **lines}
    if choice in _WHY_ABSENT:
        return {"selected": f"none: LORA_KERNELS={choice} cannot run", **lines}
    return {"selected": f"{choice} (LORA_KERNELS={choice})", **lines}
