"""What passes: the same bits each time, no poison, and the error of the 16-bit weight's product.

Memory is poisoned first, so what was not written is NaN. A case runs several times and must give
the same bits. A product passes if its error is that of the dense product: its root mean square at
most a quarter more (the target, 5 % at real sizes, is judged where it is timed), and at no element
more than twice the dense one's largest plus two roundings of the largest value. Every row of a
result is judged by its own size, so that small rows count.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Iterator

import torch
import torch.utils.deterministic
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.problem import device

MORE = 1.25  # root mean square error, of the dense product's
ENOUGH = 256  # results; of fewer the root mean square says little
Tensors = tuple[Tensor, ...]


def repeated(
    run: Callable[[], Tensors], runs: int, label: str = ""
) -> Generator[str, None, Tensors]:
    """Run several times on poisoned memory: the same bits each time.

    Args:
        run: gives the results.
        runs: how often.
        label: begins what is yielded.

    Returns:
        The results of the first run.
    """
    _spoil_free_memory()
    first = run()
    for _ in range(1, runs):
        _spoil_free_memory()
        if not all(map(same_bits, first, run())):
            yield f"{label}the same inputs give other bits when run again"
            break
    return first


def compared(found: Tensors, base: Tensors, truth: Tensors, label: str = "") -> Iterator[str]:
    """Errors of results beside those of the dense product."""
    for i, (ours, dense, exact) in enumerate(zip(found, base, truth, strict=True)):
        which = f"{label}result {i}: " if len(found) > 1 else label
        if ours.shape != exact.shape:
            yield f"{which}shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
        elif not bool(ours.isfinite().all()):
            yield f"{which}{int((~ours.isfinite()).sum())} results are NaN or infinite"
        elif exact.numel():
            yield from _errors(ours, dense, exact, which)


def _errors(ours: Tensor, dense: Tensor, exact: Tensor, label: str) -> Iterator[str]:
    size = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    off, allowed = ((t.double() - exact) / size for t in (ours, dense))
    bound = 2 * float(allowed.abs().max()) + 2 * torch.finfo(dense.dtype).eps
    if float(off.abs().max()) > bound:
        yield f"{label}largest error {float(off.abs().max()):.3g} of the row, allowed {bound:.3g}"
    ratio = float(off.norm() / allowed.norm().clamp(min=1e-30))
    if exact.numel() >= ENOUGH and ratio > MORE:
        yield f"{label}error {ratio:.3f} times the dense product's"


def captured(run: Callable[[], Tensors], label: str) -> Iterator[str]:
    """A CUDA graph's replay gives the same bits; nothing to do without a GPU."""
    if device().type != "cuda":
        return
    exact = run()
    graph, found = harness.capture(run)
    for t in found:
        t.fill_(0)
    graph.replay()
    if not all(map(same_bits, found, exact)):
        yield f"{label}: a CUDA graph's replay gives other bits"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as integers: signed zeros differ, a NaN equals itself."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def _spoil_free_memory() -> None:
    """Leave NaN in blocks of many sizes, where the next allocations will lie."""
    if device().type == "cuda":
        blocks = [torch.full((1 << i,), torch.nan, device=device()) for i in range(7, 25)]
        del blocks


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` and its like return NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """The definition runs, whatever backend was asked for."""
    before = os.environ.get("LORA_KERNELS")
    os.environ["LORA_KERNELS"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("LORA_KERNELS")
        if before is not None:
            os.environ["LORA_KERNELS"] = before
