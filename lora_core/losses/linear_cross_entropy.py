r"""The loss from hidden states and the output head, without the logits.

With 128k words the logits of 4096 tokens are 2.1 GB in float32. A head that is a matrix (a weight,
an nn.Linear, either with one LoRA pair) goes to one operator, `lora_kernels.linear_cross_entropy`,
which makes the logits of some graded rows at a time and their gradient with them, in the forward
pass. A head says that it is one by a method

    linear_parts() -> (weight, bias, down, up, scaling) or None

for x Wᵀ + b + s (x Aᵀ) Bᵀ, of which bias, down and up may be None. Every other head is called, a
chunk of rows at a time and again in backward (a checkpoint): 4-bit weights, DoRA, several adapters
at once, dropout on one, modules with hooks, weights that are tensors of another class. That general
path computes the head's product once more, and holds `CHUNK_ELEMENTS` logits in float32, a few
copies of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from lora_core.calls import offers, watched
from lora_core.losses.cross_entropy import IGNORE, check_labels, divisor, shift_labels
from lora_kernels import linear_cross_entropy as fused

__all__ = ["linear_cross_entropy", "linear_token_cross_entropy"]

CHUNK_ELEMENTS = 1 << 24  # logits of a head that is called: 64 MiB in float32


# fake ones stand for plain ones: lora_core.plan counts with them what a step would allocate
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class _Parts(NamedTuple):
    """A head that is a matrix: logits are x Wᵀ + b + s (x Aᵀ) Bᵀ."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scaling: Tensor | float = 1.0


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
    classes = head.shape[0] if isinstance(head, Tensor) else head_rows(head)
    check_labels(labels, hidden.shape[:-1], classes)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap; got {softcap}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    rows, targets = hidden.flatten(0, 1), shift_labels(labels).flatten()  # (B·T, H), (B·T,)
    grading: dict[str, Any] = {
        "softcap": softcap,
        "scale": scale,
        "label_smoothing": label_smoothing,
    }
    parts = _parts(head)
    if parts is None:
        project = (lambda x: F.linear(x, head)) if isinstance(head, Tensor) else head
        total, losses = _called(rows, targets, project, classes, grading)
    else:
        total, losses = fused(rows, targets, *parts, **grading)
    return total / divisor(labels, normalizer), losses.view(labels.shape)


def head_rows(head: nn.Module) -> int:
    """V of a head given as a module."""
    rows = getattr(head, "out_features", None)
    if not isinstance(rows, int):
        raise TypeError(f"head must be a weight (V, H) or have out_features; got {type(head)}")
    return rows


def _parts(head: Tensor | nn.Module) -> _Parts | None:
    """What a head is made of, if it is a matrix and nothing expects it to be called."""
    if isinstance(head, Tensor):
        parts = _Parts(head)
    elif watched(head):
        return None
    elif type(head) is nn.Linear:
        parts = _Parts(head.weight, head.bias)
    else:
        found = head.linear_parts() if offers(head, "linear_parts") else None  # type: ignore[operator]
        if found is None:
            return None
        parts = _Parts(*found)
    # a tensor of another class (sharded, quantized) has products of its own
    plain = all(type(t) in _PLAIN for t in parts if isinstance(t, Tensor))
    return parts if plain else None


def _called(
    rows: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    classes: int,
    grading: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The sum of the losses and the losses (M,), by a head that is called a chunk at a time."""
    graded = targets != IGNORE
    kept, wanted = rows[graded], targets[graded]  # (n, H), (n,)
    size = max(1, CHUNK_ELEMENTS // classes)
    found = []
    # without a graded row one empty chunk still ties the result to hidden and head
    for start in range(0, max(len(wanted), 1), size):
        chunk = slice(start, start + size)
        found.append(
            checkpoint(_chunk_loss, kept[chunk], wanted[chunk], head, grading, use_reentrant=False)
        )
    losses = torch.cat(found)  # (n,)
    by_row = losses.new_zeros(targets.shape)
    by_row[graded] = losses.detach()
    return losses.sum(), by_row


def _chunk_loss(
    rows: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], grading: dict[str, Any]
) -> Tensor:
    logits = head(rows)  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * grading["scale"]
    softcap = grading["softcap"]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    smoothing = grading["label_smoothing"]
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)  # (n,)
