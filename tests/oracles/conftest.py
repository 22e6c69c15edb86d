"""The bound on errors against a peer, which every comparison with one shares."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def largest(x: Tensor) -> Tensor:
    return x.abs().max()


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@pytest.fixture(scope="session")
def within() -> Callable[..., None]:
    """Bound our error by theirs, either the largest or ("rms") the root of the mean square."""

    def check(ours: Tensor, theirs: Tensor, truth: Tensor, by: str = "largest") -> None:
        size = {"largest": largest, "rms": rms}[by]
        eps = torch.finfo(ours.dtype).eps
        assert ours.dtype == theirs.dtype
        error = size(ours.double() - truth)
        allowed = 2 * size(theirs.double() - truth) + 2 * eps * size(truth)
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check
