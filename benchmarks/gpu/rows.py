"""RMS norm, rotary embedding and the gate on a GPU: right first, then how near to a copy's speed.

    python -m benchmarks.gpu.rows            # Llama-3-8B's sizes at 2 x 2048 tokens
    python -m benchmarks.gpu.rows --smoke    # small, in the interpreter or on a GPU, no timing

All three wait for memory alone, so the figure is the share of the bandwidth that a device-to-device
copy reaches on the same card, each tensor counted as read or written once. Beside it stands the
plain PyTorch chain. A wrong answer is not timed.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.judge import captured, compared, poisoned, repeated
from benchmarks.gpu.problem import normal
from lora_kernels import rms_norm, rotary, swiglu
from lora_kernels.rms_norm import rms_norm_reference
from lora_kernels.rotary import rotary_reference
from lora_kernels.swiglu import swiglu_reference

FULL = {"tokens": 4096, "width": 4096, "inner": 14336, "heads": 32}
SMOKE = {"tokens": 9, "width": 100, "inner": 70, "heads": 3}
Problem = tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...], int]


def problems(sizes: dict[str, int], dtype: torch.dtype) -> Iterator[Problem]:
    """Name, operator, definition, its tensors, and how many of x's size forward moves."""
    t, h = sizes["tokens"], sizes["width"]
    weight = normal(h, seed=1, dtype=dtype)
    norm = (functools.partial(f, weight=weight) for f in (rms_norm, rms_norm_reference))
    yield "rms_norm", *norm, (normal(t, h, seed=2, dtype=dtype),), 2
    angle = normal(1, 1, t, 64, seed=3).repeat(1, 1, 1, 2)
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    turn = (functools.partial(f, **tables) for f in (rotary, rotary_reference))
    yield "rotary", *turn, (normal(1, t, sizes["heads"], 128, seed=4, dtype=dtype),), 2
    gate, up = (normal(t, sizes["inner"], seed=s, dtype=dtype) for s in (5, 6))
    yield "swiglu", swiglu, swiglu_reference, (gate, up), 3


def step(run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The result and every gradient."""
    own = [t.detach().requires_grad_() for t in given]
    # heads lie side by side in what a projection gives
    out = run(own[0].transpose(1, 2)) if own[0].dim() == 4 else run(*own)
    dout = normal(*out.shape, seed=7, dtype=out.dtype)
    return out.detach(), *torch.autograd.grad(out, own, dout)


def check(problem: Problem) -> Iterator[str]:
    """What is wrong, a line each."""
    name, run, plain, given, _ = problem
    with poisoned():
        found = yield from repeated(lambda: step(run, given), 3, f"{name}: ")
    truth = step(plain, tuple(t.double() for t in given))
    yield from compared(found, step(plain, given), truth, f"{name}: ")
    if given[0].dim() < 4:
        yield from captured(lambda: (run(*given),), name)


def time(run: Callable[[], object]) -> float:
    """Median seconds of a call, by device events."""
    from triton.testing import do_bench

    return statistics.median(do_bench(run, warmup=50, rep=200, return_mode="all")) * 1e-3


def speed(problem: Problem) -> str:
    """Forward's share of a copy's bandwidth, and the plain chain's time."""
    name, run, plain, given, moved = problem
    x = given[0].transpose(1, 2) if given[0].dim() == 4 else given[0]
    given = (x, *given[1:])
    source = normal(1 << 27, seed=8)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time(lambda: target.copy_(source))
    ours, theirs = (time(lambda f=f: f(*given)) for f in (run, plain))
    rate = moved * x.nbytes / ours
    return (
        f"{name}: {ours * 1e6:.0f} us, {rate / 1e12:.2f} TB/s, {rate / copy:.0%} of a copy's; "
        f"plain PyTorch {theirs * 1e6:.0f} us"
    )


def main() -> int:
    """Check, then time; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes, no timing")
    smoke, wrong = parser.parse_args().smoke, 0
    for dtype in (torch.bfloat16, torch.float16):
        for problem in problems(SMOKE if smoke else FULL, dtype):
            faults = list(check(problem))
            wrong += bool(faults)
            told = f"{problem[0]}: right" if smoke else None
            print(f"{dtype}, {'; '.join(faults) or told or speed(problem)}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
