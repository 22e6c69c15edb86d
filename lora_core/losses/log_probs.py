r"""Log-probabilities of labels, differentiable token by token.

Losses of preferences and of policies weigh every completion's log-probability by something that is
known only after all of them are, so that the fused cross-entropy, which makes its gradient in the
forward pass, cannot serve. Here the forward pass keeps one number a graded token, and the logits
are made again in backward, a chunk of rows at a time (a checkpoint): the head's product costs once
more, and the logits (B, T, V) are never whole.

    log p = z_y - logsumexp(z),     z = cap(scale · head(h)) / temperature

The temperature is that of sampling: a policy that answers at 0.7 has the distribution of z / 0.7,
and its ratios and its KL are of that one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_core.losses.cross_entropy import IGNORE, check_labels, shift_labels
from lora_core.losses.linear_cross_entropy import CHUNK_ELEMENTS, head_rows


def label_log_probs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Each position's log p of the next label, 0 where that is not graded.

    Args:
        logits: (B, T, V), any floating dtype; computed in float32 (float64 stays).
        labels: integers (B, T), unshifted, -100 where not graded.
        temperature: above 0; logits are divided by it.

    Returns:
        (B, T): column t is log softmax(logits[:, t] / temperature)[labels[:, t + 1]].

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, a temperature of 0.
        TypeError: labels that are not integers.
    """
    check_labels(labels, logits.shape[:-1], logits.shape[-1])
    _check(temperature)
    rows, targets = logits.flatten(0, 1), shift_labels(labels).flatten()
    graded = targets != IGNORE
    found = _log_probs(rows[graded], targets[graded], lambda x: x, 1.0, None, temperature)
    return found.new_zeros(targets.shape).masked_scatter(graded, found).view(labels.shape)


def linear_log_probs(
    hidden: Tensor,
    head: Tensor | nn.Module,
    labels: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """`label_log_probs(cap(scale · head(hidden)), labels)` without ever holding the logits.

    Args:
        hidden: the decoder's last hidden states (B, T, H).
        head: the output head's weight (V, H), or a module (H) -> (V), an adapted one included.
        labels: integers (B, T), unshifted, -100 where not graded.
        softcap: c: logits become c·tanh(logits / c), after the scale; None: no cap.
        scale: a factor on the logits.
        temperature: above 0; what is left is divided by it.

    Returns:
        (B, T) in float32 (float64 of float64), with gradients to hidden and to the head.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, a temperature of 0.
        TypeError: labels that are not integers.
    """
    classes = head.shape[0] if isinstance(head, Tensor) else head_rows(head)
    check_labels(labels, hidden.shape[:-1], classes)
    _check(temperature)
    rows, targets = hidden.flatten(0, 1), shift_labels(labels).flatten()  # (B·T, H), (B·T,)
    graded = targets != IGNORE
    kept, wanted = rows[graded], targets[graded]  # (n, H), (n,)
    project = (lambda x: F.linear(x, head)) if isinstance(head, Tensor) else head
    size = max(1, CHUNK_ELEMENTS // classes)
    settings = (project, scale, softcap, temperature)
    found = []
    # without a graded row one empty chunk still ties the result to hidden and head
    for start in range(0, max(len(wanted), 1), size):
        chunk = slice(start, start + size)
        found.append(
            checkpoint(_log_probs, kept[chunk], wanted[chunk], *settings, use_reentrant=False)
        )
    picked = torch.cat(found)  # (n,)
    return picked.new_zeros(targets.shape).masked_scatter(graded, picked).view(labels.shape)


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")


def _log_probs(
    rows: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """log p of the targets (n,), of rows (n, H)."""
    logits = head(rows)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature != 1:
        logits = logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")  # (n,)
