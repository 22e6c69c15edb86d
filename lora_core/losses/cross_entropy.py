"""Cross-entropy over graded tokens, whole and in chunks.

Labels arrive unshifted (`labels[b, t]` is the token at position t, or -100 where the model is not
graded), and this file is the only place of the library that shifts them: logits at t are judged by
the label at t + 1. The count of graded tokens is taken after the shift, so a label at position 0,
which nothing predicts, is not counted (counting before it is off by one for each row that begins
graded). The sum is divided by `normalizer`, which in training is the count over the whole optimizer
step; a mean of the micro-batches' means would weigh a token by how few its micro-batch has.

`masked_cross_entropy` takes logits. `linear_cross_entropy` takes the hidden states and the output
head, keeps the graded rows alone, and makes the logits of a few of them at a time, forward and
again in backward: with 128k words the logits of 4096 tokens are 2.1 GB in float32, a chunk 64 MiB.
The trade-off is that the head's product is computed twice.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100
_CHUNK_ELEMENTS = 1 << 24  # logits held at a time by linear_cross_entropy: 64 MiB in float32


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


def _check_labels(labels: Tensor, shape: torch.Size, classes: int) -> None:
    """Refuse labels that do not fit.

    Their values are read on the CPU alone, as a GPU would wait, and not while compiling, as the
    graph would break.
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


def _divisor(labels: Tensor, normalizer: float | Tensor | None) -> float | Tensor:
    """The number the sum is divided by, at least 1, so that nothing graded gives 0."""
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
    _check_labels(labels, logits.shape[:-1], logits.shape[-1])
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
    return losses.sum() / _divisor(labels, normalizer), losses.detach()


def _chunk_loss(
    rows: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    softcap: float | None,
    scale: float,
    label_smoothing: float,
) -> Tensor:
    logits = head(rows)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(
        logits, targets, reduction="none", label_smoothing=label_smoothing
    )  # (n,)


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor | nn.Module,
    labels: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    r"""`masked_cross_entropy(cap(scale · head(hidden)), labels)` without ever holding the logits.

    Args:
        hidden: the decoder's last hidden states (B, T, H).
        head: the output head's weight (V, H), or a module (H) -> (V), an adapted one included.
        labels: integers (B, T), unshifted, -100 where not graded.
        normalizer: as in `masked_cross_entropy`.
        softcap: c: logits become c·tanh(logits / c), after the scale; None: no cap.
        scale: a factor on the logits.

    Returns:
        A scalar in float32: the same number as with whole logits, up to the order of the sum.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, a negative normalizer.
        TypeError: labels that are not integers.

    Ref:
        Gemma Team 2024 (Gemma 2), section 2, for the cap.
    """
    loss, _ = linear_token_cross_entropy(
        hidden, head, labels, normalizer=normalizer, softcap=softcap, scale=scale
    )
    return loss


def linear_token_cross_entropy(
    hidden: Tensor,
    head: Tensor | nn.Module,
    labels: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""`linear_cross_entropy` with each position's own loss beside the mean.

    Args:
        hidden: the decoder's last hidden states (B, T, H).
        head: the output head's weight (V, H), or a module (H) -> (V), an adapted one included.
        labels: integers (B, T), unshifted, -100 where not graded.
        normalizer: as in `masked_cross_entropy`.
        softcap: c: logits become c·tanh(logits / c), after the scale; None: no cap.
        scale: a factor on the logits.
        label_smoothing: ε in [0, 1); see `token_cross_entropy`.

    Returns:
        The scalar of `linear_cross_entropy`, and what `token_cross_entropy` gives, (B, T) in
        float32, without a gradient.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, a negative normalizer.
        TypeError: labels that are not integers.

    Ref:
        Gemma Team 2024 (Gemma 2), section 2, for the cap.
    """
    classes = head.shape[0] if isinstance(head, Tensor) else _head_rows(head)
    _check_labels(labels, hidden.shape[:-1], classes)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap; got {softcap}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    project = (lambda x: F.linear(x, head)) if isinstance(head, Tensor) else head
    targets = shift_labels(labels)  # (B, T)
    graded = targets != IGNORE
    rows, targets = hidden[graded], targets[graded]  # (n, H), (n,)
    size = max(1, _CHUNK_ELEMENTS // classes)
    parts = []
    # without a graded row one empty chunk still ties the result to hidden and head
    for start in range(0, max(len(targets), 1), size):
        chunk, options = slice(start, start + size), (project, softcap, scale, label_smoothing)
        parts.append(
            checkpoint(_chunk_loss, rows[chunk], targets[chunk], *options, use_reentrant=False)
        )
    losses = torch.cat(parts)  # (n,)
    by_token = losses.new_zeros(labels.shape)
    by_token[graded] = losses.detach()
    return losses.sum() / _divisor(labels, normalizer), by_token


def _head_rows(head: nn.Module) -> int:
    """V of a head given as a module."""
    rows = getattr(head, "out_features", None)
    if not isinstance(rows, int):
        raise TypeError(f"head must be a weight (V, H) or have out_features; got {type(head)}")
    return rows
