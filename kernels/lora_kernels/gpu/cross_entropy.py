"""Softmax cross-entropy of rows of logits on a GPU, and in their place its gradient.

One program a row. The first loop keeps the largest logit and the sum of exponentials under it, both
in every lane by itself, so that a step of the loop needs no reduction and no barrier; when a lane
meets a larger logit its sum is scaled to it. The lanes are brought together once, at the end. The
second loop reads the row again, from the cache, and writes the gradient over it.

A row of 128,256 words in 16 bits is 256 KB, and 132 programs at a time hold 34 MB of rows: what the
second loop reads comes from an H200's 50 MB of second-level cache for the most part. Keeping a row
on the chip would take all shared memory there is and a limit on V.

Two exponentials a logit in the first loop instead of one, as each lane scales its own sum; both
are one instruction, and the loop waits for memory. A lane that has seen only -inf scales by
exp(-inf - 0) and not by exp(-inf + inf), which would be NaN.

The gradient of some columns, from norms found before, is the second loop alone (`ROWS` off).
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch import device_of
from lora_kernels.gpu.decode import narrow
from lora_kernels.gpu.variant import Variant

if TYPE_CHECKING:
    from lora_kernels.cross_entropy import Grading

__all__ = ["grade_columns", "grade_rows", "variants"]

BLOCK = 4096  # logits a step
WARPS = 8


@triton.jit
def _tanh(x):
    """(1 - e) / (1 + e), e = exp(-2 |x|); that loses the digits of small x: a polynomial there."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    z = x * x
    p = -0.0062825126 * z + 0.021077754
    p = p * z - 0.05385386
    p = p * z + 0.13332602
    p = p * z - 0.33333319
    magnitude = tl.where(size < 0.55, size + size * z * p, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def _judged(z, scale, cap, CAPPED: tl.constexpr):
    """y of some logits, and dy/dz."""
    if CAPPED:
        t = _tanh(z * (scale / cap))
        return t * cap, (1.0 - t * t) * scale
    else:
        return z * scale, scale


@triton.jit(do_not_specialize=["first"])
def _rows_kernel(
    logits_ptr,  # (n, columns), overwritten by the gradient
    targets_ptr,  # (n,) int64
    losses_ptr,  # (n,) float32
    norms_ptr,  # (n, 2) float32
    columns,
    first,
    scale,
    cap,
    smoothing,
    share,  # smoothing / classes
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * columns
    lane = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row) - first
    inside = (target >= 0) & (target < columns)

    if ROWS:
        # now: after the last reduction other warps may already write the gradient over it
        z_target = tl.load(at + target, mask=inside, other=0.0).to(tl.float32)
        most = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each lane
        total = tl.zeros((BLOCK,), tl.float32)
        logits = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, columns, BLOCK):
            live = begin + lane < columns
            z = tl.load(at + begin + lane, mask=live, other=0.0).to(tl.float32)
            y, _ = _judged(z, scale, cap, CAPPED)
            logits += tl.where(live, y, 0.0)
            y = tl.where(live, y, float("-inf"))
            new = tl.where(y > most, y, most)
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(most - base) + tl.exp(y - base)
            most = new
        top = tl.max(most, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp(most - base)  # 0 for a lane that has seen nothing
        whole = tl.sum(total * weight, 0)
        whole = tl.where(top == float("-inf"), float("nan"), whole)
        y_target, _ = _judged(z_target, scale, cap, CAPPED)
        loss = (top - y_target) * (1.0 - smoothing) + tl.log(whole)
        if smoothing > 0:  # else a logit of -inf would make 0 times infinity
            loss += (top - tl.sum(logits, 0) / columns) * smoothing
        tl.store(losses_ptr + row, tl.where(inside, loss, float("nan")))
        tl.store(norms_ptr + 2 * row, top)
        tl.store(norms_ptr + 2 * row + 1, whole)
    else:
        top = tl.load(norms_ptr + 2 * row)
        whole = tl.load(norms_ptr + 2 * row + 1)

    if GRADIENT:
        for begin in range(0, columns, BLOCK):
            live = begin + lane < columns
            z = tl.load(at + begin + lane, mask=live, other=0.0).to(tl.float32)
            y, slope = _judged(z, scale, cap, CAPPED)
            p = tl.exp(y - top) / whole - share
            p -= tl.where(begin + lane == target, 1.0 - smoothing, 0.0)
            tl.store(at + begin + lane, narrow(p * slope, logits_ptr.dtype.element_ty), mask=live)


def grade_rows(
    logits: Tensor, targets: Tensor, grading: "Grading", wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Each row's loss and norms; the logits become their gradient, as `cross_entropy` says.

    Args:
        logits: (n, V), contiguous, float32, bfloat16 or float16.
        targets: int64 (n,).
        grading: cap, scale and smoothing.
        wants_gradient: False: the logits are left as they are.

    Returns:
        float32 losses (n,) and norms (n, 2).
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    norms = torch.empty((len(logits), 2), dtype=torch.float32, device=logits.device)
    _launch(logits, targets, losses, norms, (0, logits.shape[1]), grading, (True, wants_gradient))
    return losses, norms


def grade_columns(
    logits: Tensor, targets: Tensor, norms: Tensor, first: int, classes: int, grading: "Grading"
) -> None:
    """Turn some columns of the logits into their gradient.

    Args:
        logits: (n, columns), contiguous; overwritten.
        targets: int64 (n,), of the whole vocabulary.
        norms: float32 (n, 2).
        first: the word that the first column is.
        classes: V.
        grading: cap, scale and smoothing.
    """
    _launch(logits, targets, norms, norms.contiguous(), (first, classes), grading, (False, True))


def _launch(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    norms: Tensor,
    words: tuple[int, int],
    grading: "Grading",
    steps: tuple[bool, bool],
) -> None:
    assert logits.is_contiguous()  # it is written to
    rows, columns = logits.shape
    if not rows:
        return
    first, classes = words
    with device_of(logits):
        _rows_kernel[(rows,)](
            logits,
            targets.contiguous(),
            losses,
            norms,
            columns,
            first,
            grading.scale,
            grading.softcap or 0.0,
            grading.label_smoothing,
            grading.label_smoothing / classes,
            **_constants(grading.softcap is not None, *steps),
            num_warps=WARPS,
        )


def _constants(capped: bool, rows: bool, gradient: bool) -> dict[str, Any]:
    return {"BLOCK": BLOCK, "CAPPED": capped, "ROWS": rows, "GRADIENT": gradient}


def variants() -> list[Variant]:
    """What the launchers launch: each type, with a cap and without; evaluation and columns once."""
    found = [
        _variant(dtype, capped, True, True)
        for dtype in ("bf16", "fp16", "fp32")
        for capped in (False, True)
    ]
    return [*found, _variant("bf16", False, True, False), _variant("bf16", False, False, True)]


def _variant(dtype: str, capped: bool, rows: bool, gradient: bool) -> Variant:
    constants = _constants(capped, rows, gradient)
    steps = "rows" if gradient and rows else "losses" if rows else "columns"
    signature = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
    signature |= {"norms_ptr": "*fp32", "columns": "i32", "first": "i32"}
    signature |= dict.fromkeys(("scale", "cap", "smoothing", "share"), "fp32")
    return Variant(
        name=f"cross_entropy/{dtype}/{steps}{'/cap' if capped else ''}",
        kernel=_rows_kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constants=constants,
        warps=WARPS,
        odd=frozenset(("first",)),
    )
