"""Losses of an encoder's heads.

They are transformers', but for two things. They are computed in float32 whatever the logits' dtype
is. And a batch in which nothing is graded gives 0 with a gradient of 0, as everywhere in this
library, where transformers divides 0 by 0. Labels are not shifted: an encoder's logits at t are
about token t. Values of labels are checked on the CPU alone, as a GPU would wait.

Each is a mean; given a `normalizer` it is the sum divided by that instead, so that the losses of a
step's batches add up to the mean over the whole step (train/step.py).

Ref: Devlin et al. 2019, arXiv:1810.04805, sections 3.1 (masked tokens) and 4.2 (spans).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that is not graded


def class_loss(logits: Tensor, labels: Tensor, normalizer: float | None = None) -> Tensor:
    """Mean cross-entropy over graded labels, 0 if none is.

    Args:
        logits: (…, n), any floating dtype; computed in float32 (float64 stays).
        labels: integers (…), -100 where not graded.
        normalizer: what the sum is divided by; None: the number of graded labels.

    Returns:
        A scalar.

    Raises:
        ValueError: a shape that does not fit, or a label out of range (seen on the CPU).
        TypeError: labels that are not integers.
    """
    count = logits.shape[-1]
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}; got "
            f"{tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    labels = labels.long().flatten()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= count))
        if wrong.any():
            raise ValueError(
                f"labels must be {IGNORED} or in 0 … {count - 1}; got {int(labels[wrong][0])}"
            )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if normalizer is not None:
        return total / normalizer
    return total / (labels != IGNORED).sum().clamp(min=1)


def span_loss(logits: Tensor, positions: Tensor, normalizer: float | None = None) -> Tensor:
    """Mean cross-entropy of one end of the span over the tokens of each text.

    Args:
        logits: (B, T).
        positions: (B,) or (B, 1) integers; T and beyond are not graded, below 0 is 0.
        normalizer: what the sum is divided by; None: the number of graded texts.

    Returns:
        A scalar.

    Raises:
        ValueError: a shape that does not fit.
    """
    if positions.numel() != len(logits):
        raise ValueError(
            f"start_positions and end_positions must be ({len(logits)},); got "
            f"{tuple(positions.shape)}"
        )
    positions = positions.reshape(-1).clamp(min=0)
    beyond = positions >= logits.shape[1]
    return class_loss(logits, positions.masked_fill(beyond, IGNORED), normalizer)


def sequence_loss(
    logits: Tensor, labels: Tensor, problem: str | None, normalizer: float | None = None
) -> Tensor:
    """Mean loss of a head for whole texts.

    Args:
        logits: (B, n).
        labels: integers (B,) for one label each; (B, n) for several at once (0 or 1), and for
            numbers, where (B,) will do if n is 1.
        problem: "single_label_classification" (cross-entropy), "multi_label_classification"
            (binary cross-entropy), "regression" (mean square error), or None: numbers if n is 1,
            else told by the dtype of the labels, integers for one label each.
        normalizer: what the sum over texts (of each text's mean over n) is divided by; None: their
            number.

    Returns:
        A scalar.

    Raises:
        ValueError: a shape that does not fit, or a label out of range.
        TypeError: labels that are not integers where one of them is meant.
    """
    if problem is None:
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        problem = "single_label_classification" if whole else "multi_label_classification"
        problem = "regression" if logits.shape[-1] == 1 else problem
    if problem == "single_label_classification":
        return class_loss(logits, labels.squeeze(-1) if labels.dim() == 2 else labels, normalizer)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column = logits.shape[-1] == 1 and labels.shape == logits.shape[:-1]
    if labels.shape != logits.shape and not column:
        raise ValueError(
            f"labels for {problem} must be {tuple(logits.shape)} like the logits; got "
            f"{tuple(labels.shape)}"
        )
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem == "regression":
        mean = F.mse_loss(logits, labels)
    else:
        mean = F.binary_cross_entropy_with_logits(logits, labels)
    return mean if normalizer is None else mean * len(logits) / normalizer
