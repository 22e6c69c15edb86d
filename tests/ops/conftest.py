"""What the operators' tests share: accuracy against PyTorch's, and memory of live tensors."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
