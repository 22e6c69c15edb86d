r"""Softmax cross-entropy of rows of logits, whose gradient takes the logits' place.

A step inside `linear_cross_entropy`, which makes the logits of some rows, judges them here and
multiplies what it finds in their place by the head. With u = scale · z and y = c tanh(u / c) for a
cap c (else y = u), m = max y, S = Σ exp(y - m) over V words, smoothing ε and target t:

    loss   = log S + (1 - ε)(m - y_t) + ε (m - mean y)
    dz_j   = scale · (1 - (y_j / c)²) · (exp(y_j - m) / S - ε / V - (1 - ε)[j = t])

Bytes moved, of logits with b bytes: read twice and written once, 3 b a logit (from the cache where
a row fits it). Written out in PyTorch, 16-bit logits are copied to float32, and log_softmax, its
gradient and the cast back read or write 26 bytes more. All arithmetic is float32 (float64 for
float64 logits, by the definition in every backend); the maximum is taken off before anything is
rounded, as log_softmax does, so m and S are kept apart and not as log S + m.

The same gradient for some columns of the logits, from m and S found before, is `grade_columns`: the
head's own gradient is made a slice of the vocabulary at a time.

Differs from the known kernels (Liger, Cut Cross Entropy): losses are per row, the cap is part of
the gradient, and a target outside the vocabulary gives NaN instead of reading what lies there.

Ref: Szegedy et al. 2016, section 7 (smoothing); Gemma Team 2024, section 2 (cap); Milakov and
Gimelshein 2018, arXiv:1805.02867 (maximum and sum in one pass).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for, device_of
from lora_kernels.operands import wide

__all__ = ["Grading", "columns_reference", "grade_columns", "grade_rows", "rows_reference"]

BACKENDS = ("reference", "native", "triton")
SLICE_ELEMENTS = 1 << 20  # logits that the definition has in float32 at a time: 4 MiB a copy


class Grading(NamedTuple):
    """How logits are judged.

    Attributes:
        softcap: c; None: no cap.
        scale: a factor on the logits, before the cap.
        label_smoothing: ε in [0, 1).
    """

    softcap: float | None = None
    scale: float = 1.0
    label_smoothing: float = 0.0


def grade_rows(
    logits: Tensor, targets: Tensor, grading: Grading, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Each row's loss; the logits become their gradient.

    Args:
        logits: (n, V), contiguous; overwritten by dz in their own dtype if `wants_gradient`.
        targets: int64 (n,), in 0 … V - 1; elsewhere the loss is NaN.
        grading: cap, scale and smoothing.
        wants_gradient: False: the logits are left as they are.

    Returns:
        Losses (n,) and norms (n, 2), m and S of each row; float32, or float64 for float64 logits.
    """
    backend = _backend(logits)
    with device_of(logits):
        if backend == "native":
            from lora_kernels.cpu import cross_entropy as cpu

            return cpu.grade_rows(logits, targets, grading, wants_gradient)
        if backend == "triton":
            from lora_kernels.gpu import cross_entropy as gpu

            return gpu.grade_rows(logits, targets, grading, wants_gradient)
        return rows_reference(logits, targets, grading, wants_gradient)


def grade_columns(
    logits: Tensor, targets: Tensor, norms: Tensor, first: int, classes: int, grading: Grading
) -> None:
    """Turn some columns of the logits into their gradient, given the rows' norms.

    Args:
        logits: (n, columns), contiguous; overwritten by dz.
        targets: int64 (n,), in the whole vocabulary.
        norms: (n, 2), as `grade_rows` returns them.
        first: the word that the first column is.
        classes: V, of the whole vocabulary.
        grading: cap, scale and smoothing.
    """
    backend = _backend(logits)
    with device_of(logits):
        if backend == "native":
            from lora_kernels.cpu import cross_entropy as cpu

            cpu.grade_columns(logits, targets, norms, first, classes, grading)
        elif backend == "triton":
            from lora_kernels.gpu import cross_entropy as gpu

            gpu.grade_columns(logits, targets, norms, first, classes, grading)
        else:
            columns_reference(logits, targets, norms, first, classes, grading)


def _backend(logits: Tensor) -> str:
    backend = backend_for(logits, BACKENDS)
    return "reference" if logits.dtype == torch.float64 else backend


# --- the definition ------------------------------------------------------------------------------


def rows_reference(
    logits: Tensor, targets: Tensor, grading: Grading, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The definition of `grade_rows`, with no more than some rows in float32 at a time.

    Args:
        logits: (n, V); overwritten by dz if `wants_gradient`.
        targets: int64 (n,).
        grading: cap, scale and smoothing.
        wants_gradient: False: the logits are left as they are.

    Returns:
        Losses (n,) and norms (n, 2).
    """
    n, classes = logits.shape
    losses = torch.empty(n, dtype=wide(logits.dtype), device=logits.device)
    norms = torch.empty(n, 2, dtype=losses.dtype, device=logits.device)
    for rows in _slices(n, classes):
        y = _judged(logits[rows], grading)  # (rows, V)
        top = y.amax(1)  # (rows,)
        total = (y - top[:, None]).exp_().sum(1)
        norms[rows] = torch.stack((top, total), 1)
        losses[rows] = _losses(y, targets[rows], top, total, grading.label_smoothing)
        if wants_gradient:
            dz = _gradient(y, targets[rows], norms[rows], classes, grading)
            logits[rows] = dz.to(logits.dtype)
    return losses, norms


def columns_reference(
    logits: Tensor, targets: Tensor, norms: Tensor, first: int, classes: int, grading: Grading
) -> None:
    """The definition of `grade_columns`, with no more than some rows in float32 at a time.

    Args:
        logits: (n, columns); overwritten by dz.
        targets: int64 (n,).
        norms: (n, 2).
        first: the word that the first column is.
        classes: V.
        grading: cap, scale and smoothing.
    """
    for rows in _slices(*logits.shape):
        y = _judged(logits[rows], grading)
        dz = _gradient(y, targets[rows] - first, norms[rows], classes, grading)
        logits[rows] = dz.to(logits.dtype)


def _slices(n: int, columns: int) -> Iterator[slice]:
    size = max(1, SLICE_ELEMENTS // max(columns, 1))
    return (slice(start, start + size) for start in range(0, n, size))


def _judged(logits: Tensor, grading: Grading) -> Tensor:
    """y: the logits in float32, scaled and capped; memory of its own."""
    y = logits.to(wide(logits.dtype)) * grading.scale
    c = grading.softcap
    return y if c is None else y.div_(c).tanh_().mul_(c)


def _losses(
    y: Tensor, targets: Tensor, top: Tensor, total: Tensor, label_smoothing: float
) -> Tensor:
    inside = (targets >= 0) & (targets < y.shape[1])
    of_target = y.gather(1, torch.where(inside, targets, 0)[:, None])[:, 0]  # (rows,)
    loss = (top - of_target) * (1 - label_smoothing) + total.log()
    if label_smoothing:  # else a logit of -inf would make 0 · inf
        loss = loss + (top - y.mean(1)) * label_smoothing
    return torch.where(inside, loss, torch.nan)


def _gradient(y: Tensor, at: Tensor, norms: Tensor, classes: int, grading: Grading) -> Tensor:
    """dz; `at` is the column of each row's target, which may lie outside."""
    top, total = norms[:, :1], norms[:, 1:]
    p = (y - top).exp_().div_(total)
    if grading.label_smoothing:
        p -= grading.label_smoothing / classes
    inside = (at >= 0) & (at < y.shape[1])
    less = inside.to(p.dtype) * (grading.label_smoothing - 1)
    p.scatter_add_(1, torch.where(inside, at, 0)[:, None], less[:, None])
    if grading.softcap is not None:
        p *= 1 - (y / grading.softcap) ** 2
    return p.mul_(grading.scale)
