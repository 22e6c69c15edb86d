"""Cross-entropy over graded tokens, whole and in chunks.

Labels arrive unshifted (`labels[b, t]` is the token at position t, or -100 where the model is not
graded), and this file is the only place of the library that shifts them: logits at t are judged by
the label at t + 1. The count of graded tokens is taken after the shift, so a label at position 0,
which nothing predicts, is not counted (counting before it is off by one for each row that begins
graded). The sum is divided by `normalizer`, which in training is the count over the whole optimizer
step; a mean of the micro-batches' means would weigh a token by how few its micro-batch has.

`masked_cross_entropy` takes logits. `linear_cross_entropy` (a file of its own) takes the hidden
states and the output head, and never holds the logits whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def shift_labels(labels: Tensor) -> Tensor:
    """What each position has to predict: the next label, and -100 at the last position.

    Args:
        labels: integers (B, T), unshifted, -100 where not graded.

    Returns:
        int64 (B, T): column t is `labels[:, t + 1]`.
    """
    return F.pad(labels.long(), (0, 1), value=IGNORE)[:, 1:]  # (B, T)


def count_graded(labels: Tensor) -> int:
    """How many tokens are graded, counted after the shift.

    Args:
        labels: integers (B, T), unshifted, -100 where not graded.

    Returns:
        The number of labels other than -100 from the second column on. On a GPU this waits for the
        device; count before moving the batch there.
    """
    return int((labels[:, 1:] != IGNORE).sum())


def check_labels(labels: Tensor, shape: torch.Size, classes: int) -> None:
    """Refuse labels that do not fit.

    Their values are read on the CPU alone, as a GPU would wait, and not while compiling, as the
    graph would break.

    Args:
        labels: (B, T).
        shape: (B, T) of the logits or hidden states.
        classes: V.

    Raises:
        ValueError: shapes that do not fit, or a label outside the vocabulary.
        TypeError: labels that are not integers.
    """
    if len(shape) != 2:
        raise ValueError(
            f"logits and hidden states need 3 dimensions, (B, T, …); got {len(shape) + 1}"
        )
    if labels.shape != shape:
        raise ValueError(
            f"labels must be (B, T) = {tuple(shape)} like the logits; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if labels.device.type != "cpu" or labels.numel() == 0 or torch.compiler.is_compiling():
        return
    wrong = (labels >= classes) | ((labels < 0) & (labels != IGNORE))
    if wrong.any():
        raise ValueError(
            f"labels must be {IGNORE} or in 0 … {classes - 1} (the vocabulary has {classes} "
            f"entries); got {int(labels[wrong][0])}: was the data made with another tokenizer?"
        )


def divisor(labels: Tensor, normalizer: float | Tensor | None) -> float | Tensor:
    """The number the sum is divided by, at least 1, so that nothing graded gives 0.

    Args:
        labels: (B, T), unshifted.
        normalizer: the count to divide by; None: the labels' own.

    Returns:
        A number or a scalar tensor.

    Raises:
        ValueError: a negative number.
    """
    if normalizer is None:
        return (labels[:, 1:] != IGNORE).sum().clamp(min=1)
    if isinstance(normalizer, Tensor):
        return normalizer.clamp(min=1)
    if normalizer < 0:
        raise ValueError(f"normalizer is a count of tokens, 0 or more; got {normalizer}")
    return max(normalizer, 1)


def token_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    r"""Each position's loss, -log softmax(logits[b, t])[labels[b, t + 1]], 0 where not graded.

    Args:
        logits: (B, T, V), any floating dtype; computed in float32 (float64 stays).
        labels: integers (B, T), unshifted, -100 where not graded.
        label_smoothing: ε in [0, 1): the target is 1 - ε on the label plus ε / V on every word.

    Returns:
        (B, T) in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, or a label outside the vocabulary (seen on the CPU).
        TypeError: labels that are not integers.

    Ref:
        Szegedy et al. 2016, section 7, for the smoothing.
    """
    check_labels(labels, logits.shape[:-1], logits.shape[-1])
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits.flatten(0, 1),  # (B·T, V): the labels are shifted, so the logits need no copy
        shift_labels(labels).flatten(),  # (B·T,)
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses.view_as(labels)


def masked_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Mean cross-entropy over the graded tokens: Σ -log p(label) / normalizer.

    Args:
        logits: (B, T, V), any floating dtype; computed in float32.
        labels: integers (B, T), unshifted, -100 where not graded.
        normalizer: what the sum is divided by; None: the graded tokens of this batch. Pass the
            count of the whole optimizer step when accumulating. Below 1 it counts as 1.
        label_smoothing: ε in [0, 1); see `token_cross_entropy`.

    Returns:
        A scalar in float32. With no graded token it is 0, and so is its gradient.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, a negative normalizer.
        TypeError: labels that are not integers.
    """
    loss, _ = token_mean(logits, labels, normalizer=normalizer, label_smoothing=label_smoothing)
    return loss


def token_mean(
    logits: Tensor,
    labels: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`masked_cross_entropy` with each position's own loss beside the mean.

    Args:
        logits: (B, T, V).
        labels: integers (B, T), unshifted, -100 where not graded.
        normalizer: as in `masked_cross_entropy`.
        label_smoothing: ε in [0, 1).

    Returns:
        The scalar, and the detached losses (B, T).
    """
    losses = token_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return losses.sum() / divisor(labels, normalizer), losses.detach()
