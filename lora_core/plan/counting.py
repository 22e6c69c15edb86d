"""Counting the bytes that a program would have allocated, without allocating them.

PyTorch can run a program on fake tensors: every operator gives a tensor with the right shape and
dtype and no memory behind it. `LiveBytes` watches such a run from outside. Each new storage adds
its size to a running sum, and the storage's end, seen by a weak reference, takes it off again; so
the sum is what an allocator would hold, and its largest value the peak. Views and in-place
operators share a storage and are counted once.

What an operator allocates and frees inside itself is not seen, as a fake operator has no inside.
`workspace` says how much that is where it matters (inside.py).

A fake tensor has no values either. Where the program asks for one, the answer is the case that
needs the most memory: of a boolean selection every row is taken, and no check finds a fault.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "Stored", "storage_bytes"]

Workspace = Callable[[str, tuple[Any, ...], dict[str, Any]], int]
"""(operator's name, arguments, keyword arguments) -> bytes it holds inside beside its results."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Stored:
    """One storage that is alive."""

    nbytes: int
    """its size"""
    shape: tuple[int, ...]
    """of the tensor that brought it"""
    dtype: torch.dtype
    """of that tensor"""
    number: int
    """how many storages were seen before it"""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, shared memory once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Within the block, the sum of all storages that are alive, and its peak by phase.

    Args:
        workspace: what operators hold inside themselves.

    Attributes:
        now: bytes alive.
        phase: name under which peaks are noted; set it at will.
        peaks: phase -> largest sum seen in it.
    """

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.workspace = workspace
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._seen = 0
        self._live: dict[int, tuple[Stored, Any]] = {}

    @property
    def phase(self) -> str:
        """Name of what is going on."""
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        self._note(0)

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before or outside."""
        for tensor in tensors:
            self._take(tensor)
        self._note(0)

    def alive(self, since: int = 0) -> list[Stored]:
        """Storages that are alive now and were first seen after `since` others."""
        return [stored for stored, _ in self._live.values() if stored.number >= since]

    @property
    def seen(self) -> int:
        """Storages seen so far; pass it to `alive` later on."""
        return self._seen

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        stored = Stored(storage.nbytes(), tuple(tensor.shape), tensor.dtype, self._seen)
        self._seen += 1
        self.now += stored.nbytes
        self._live[key] = (stored, weakref.ref(storage, lambda _: self._drop(key)))

    def _drop(self, key: int) -> None:
        stored, _ = self._live.pop(key)
        self.now -= stored.nbytes

    def _note(self, inside: int) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now + inside)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and take its results into the count."""
        kwargs = kwargs or {}
        out = _answer(func, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        self._note(self.workspace(func._schema.name, args, kwargs))
        return out


def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator's result; of one that depends on values, the result that takes the most."""
    if func is aten._local_scalar_dense.default:
        return False if args[0].dtype == torch.bool else 1
    if func is aten.index.Tensor and (mask := _mask(args[1])) is not None:
        rows = args[0].flatten(0, mask.dim() - 1)
        return torch.empty_like(rows, memory_format=torch.contiguous_format)
    if func is aten.index_put_.default and _mask(args[1]) is not None:
        return args[0]
    if func is aten.nonzero.default:
        size = (args[0].numel(), args[0].dim())
        return torch.empty(size, dtype=torch.int64, device=args[0].device)
    return func(*args, **kwargs)


def _mask(indices: Any) -> Tensor | None:
    """The mask of a selection by one boolean tensor."""
    first = indices[0] if len(indices) == 1 else None
    return first if isinstance(first, Tensor) and first.dtype == torch.bool else None
