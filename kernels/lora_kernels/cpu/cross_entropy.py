"""Softmax cross-entropy of rows of logits in C: `cross_entropy.c`, for 16- and 32-bit logits."""

from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_kernels.cpu import arguments, library

if TYPE_CHECKING:
    from lora_kernels.cross_entropy import Grading

__all__ = ["grade_columns", "grade_rows"]

_ARGUMENTS = (
    *(c_int, c_int, c_void_p, c_int64, c_int64),  # threads, dtype, logits, rows, columns
    *(c_int64, c_int64, c_void_p),  # first, classes, targets
    *(c_void_p, c_void_p),  # losses, norms
    *(c_float, c_float, c_double, c_int),  # scale, cap, smoothing, gradient
)


def grade_rows(
    logits: Tensor, targets: Tensor, grading: "Grading", wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Each row's loss and norms; the logits become their gradient, as `cross_entropy` says.

    Args:
        logits: (n, V), contiguous, float32, bfloat16 or float16, on a CPU.
        targets: int64 (n,).
        grading: cap, scale and smoothing.
        wants_gradient: False: the logits are left as they are.

    Returns:
        float32 losses (n,) and norms (n, 2).
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    norms = torch.empty((len(logits), 2), dtype=torch.float32, device=logits.device)
    _run(logits, targets, losses, norms, 0, logits.shape[1], grading, wants_gradient)
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
    _run(logits, targets, None, norms, first, classes, grading, True)


def _run(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor | None,
    norms: Tensor,
    first: int,
    classes: int,
    grading: "Grading",
    gradient: bool,
) -> None:
    assert logits.is_contiguous()  # it is written to
    targets, norms = targets.contiguous(), norms.contiguous()
    library.function("lora_cross_entropy", *_ARGUMENTS)(
        *(library.threads(), arguments.DTYPES[logits.dtype], logits.data_ptr(), *logits.shape),
        *(first, classes, targets.data_ptr()),
        *(None if losses is None else losses.data_ptr(), norms.data_ptr()),
        *(grading.scale, grading.softcap or 0.0, grading.label_smoothing, int(gradient)),
    )
