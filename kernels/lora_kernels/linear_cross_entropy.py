r"""The output head and its cross-entropy: logits are never whole, gradients come with the loss.

Why one operator: the logits of 8192 tokens over 128,256 words are 2.1 GB in 16 bits and 4.2 GB in
the float32 that F.cross_entropy wants, several times over. Here z = x Wᵀ + b + s (x Aᵀ) Bᵀ exists
for some rows at a time (`CHUNK_BYTES`), and as nothing but the loss comes after it, the gradient
follows while those logits are at hand: they turn into dz in place (cross_entropy.py), and

    dx = dz W + s (dz B) A     db = Σ dz     dA = s (dz B)ᵀ x     dB = s dzᵀ (x Aᵀ)

are the sum's, Σ loss, so that backward multiplies them by the one number that comes in. Only graded
rows are computed, gathered a chunk at a time. Recomputing each chunk in backward (a checkpoint)
takes three products with a frozen W; this takes two, as does the loss with whole logits.

A trained W. dW = dzᵀ x is as large as W, so it is not kept from forward to backward, nor made
twice, unscaled and scaled. Backward makes it: a slice of the vocabulary at a time the logits are
computed once more, turned into dz by the norms m and S of each row, and multiplied by x; the slice
is summed over blocks of rows in float32, scaled, and rounded to W's dtype once. The price is one
more product of the head's size, four in all as with a checkpoint, against three with whole logits.
Adding each chunk's dzᵀ x into a 16-bit dW would save it and round after each of some 30 chunks.

Memory above the inputs, b bytes a number, M rows; a chunk is logits, x and dx of its rows:

    frozen W     forward   M H b (dx)  +  CHUNK_BYTES     134 MB at M 8192, V 128,256, H 4096, b 2
                 backward  2 M H b: dx, and dx times the incoming number
    trained W    M H b  +  CHUNK_BYTES (a slice of dW, its logits)  +  2048 H b (x)  +  dW

A weight of another dtype than the product's (float32 under autocast) is cast whole where that is
at most `CAST_BYTES`, else a slice at a time for every chunk, which reads it twice a chunk.

Saved: dx, db, dA, dB, as far as each is wanted; and the inputs with the norms (8 bytes a row) if W
is trained. The number of graded rows is read from the device, once a call; it is in no shape.

Differs from the known implementations: Liger adds up a 16-bit dW in 16 bits and scales saved
gradients in place; Cut Cross Entropy forms logits in the kernel's registers, twice, for GPUs alone.

Ref: Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009; Hsu et al. 2024, Liger Kernel,
arXiv:2410.10989, section 3.2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.cross_entropy import Grading
from lora_kernels.dispatch import inside
from lora_kernels.head_chunks import IGNORE, Head, Wants, grade, weight_gradient
from lora_kernels.operands import autocast_dtype, wide

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

PLAIN = Grading()

_HEAD = "Tensor weight, Tensor? bias, Tensor? down, Tensor? up, Tensor? scaling"
_GRADING = "ScalarType dtype, float? softcap, float scale, float label_smoothing"
_WANTS = "bool wants_hidden, bool wants_weight, bool wants_bias, bool wants_update"
torch.library.define(
    "lora_kernels::linear_cross_entropy",
    f"(Tensor hidden, Tensor targets, {_HEAD}, {_GRADING}, {_WANTS})"
    " -> (Tensor losses, Tensor total, Tensor norms, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "lora_kernels::linear_cross_entropy_dweight",
    f"(Tensor factor, Tensor norms, Tensor hidden, Tensor targets, {_HEAD}, {_GRADING}) -> Tensor",
)


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy of `cap(scale · head(hidden))`, each row's and the sum, without whole logits.

    Args:
        hidden: (M, H), floating-point. Under autocast it is cast, a chunk at a time, as nn.Linear
            would; the weight's dtype has to be hidden's where autocast is off.
        targets: int64 (M,), in 0 … V - 1, or -100 for a row that is not graded and costs nothing;
            any other number gives NaN.
        weight: (V, H), frozen or trained.
        bias: (V,) or None.
        down: A (r, H) of a LoRA pair on the head, or None.
        up: B (V, r), or None.
        scaling: s of the pair, a number or (1,); takes no gradient.
        softcap: c: logits become c tanh(logits / c), after the scale; None: no cap.
        scale: a factor on the logits.
        label_smoothing: ε in [0, 1).

    Returns:
        The sum of the losses, (), differentiable once in hidden, weight, bias, down and up; and the
        losses (M,), 0 where not graded, which are for reports and take no gradient. Both float32
        (float64 if hidden is).

    Raises:
        TypeError: hidden is not floating-point, or of another dtype than the weight.
        ValueError: shapes that do not fit, a cap that is not positive, a smoothing out of range.
        NotImplementedError: from a second derivative, when it is taken.
    """
    s = None if up is None else _as_tensor(scaling, hidden)
    head = Head(weight, bias, down, up, s)
    _check(hidden, targets, head, Grading(softcap, scale, label_smoothing))
    dtype = autocast_dtype(hidden) or hidden.dtype
    wants = [t is not None and torch.is_grad_enabled() and t.requires_grad for t in (hidden, *head)]
    losses, total, *_ = torch.ops.lora_kernels.linear_cross_entropy(
        *(hidden, targets.long(), *head),
        *(dtype, softcap, scale, label_smoothing),
        *(wants[0], wants[1], wants[2], wants[3] or wants[4]),
    )
    return total, losses.detach()


def _as_tensor(scaling: float | Tensor, hidden: Tensor) -> Tensor:
    if isinstance(scaling, Tensor):
        return scaling.reshape(-1)
    return torch.full((1,), scaling, dtype=wide(hidden.dtype), device=hidden.device)


def _check(hidden: Tensor, targets: Tensor, head: Head, grading: Grading) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be floating-point; got {hidden.dtype}")
    if hidden.dtype != head.weight.dtype and autocast_dtype(hidden) is None:
        raise TypeError(
            f"hidden is {hidden.dtype} and the head's weight {head.weight.dtype}: cast one of "
            "them, or use autocast"
        )
    if head.weight.dim() != 2:
        raise ValueError(f"weight must be (V, H); got {tuple(head.weight.shape)}")
    (classes, features), m = head.weight.shape, len(hidden)
    if hidden.shape != (m, features) or targets.shape != (m,):
        raise ValueError(
            f"hidden must be (M, {features}) and targets (M,) for a weight "
            f"{tuple(head.weight.shape)}; got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if head.bias is not None and head.bias.shape != (classes,):
        raise ValueError(f"bias must be ({classes},); got {tuple(head.bias.shape)}")
    _check_pair(head)
    if grading.softcap is not None and grading.softcap <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap; got {grading.softcap}")
    if not 0 <= grading.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1); got {grading.label_smoothing}")


def _check_pair(head: Head) -> None:
    classes, features = head.weight.shape
    if (head.down is None) != (head.up is None):
        raise ValueError("down and up are one pair: give both or neither")
    if head.down is not None and head.up is not None:
        r = len(head.down)
        if head.down.shape != (r, features) or head.up.shape != (classes, r):
            raise ValueError(
                f"down and up must be (r, {features}) and ({classes}, r); got "
                f"{tuple(head.down.shape)} and {tuple(head.up.shape)}"
            )
        if head.scaling is not None and head.scaling.numel() != 1:
            raise ValueError(f"scaling must be a number or (1,); got {tuple(head.scaling.shape)}")
        if head.scaling is not None and head.scaling.requires_grad:
            raise ValueError("scaling takes no gradient; multiply up by it to train it")


# --- the definition ------------------------------------------------------------------------------


def linear_cross_entropy_reference(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    grading: Grading = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The definition, in differentiable PyTorch, with the logits whole and in one dtype.

    Args:
        hidden: (M, H).
        targets: int64 (M,), -100 where not graded.
        weight: (V, H).
        bias: (V,) or None.
        down: A, (r, H), or None.
        up: B, (V, r), or None.
        scaling: s.
        grading: cap, scale and smoothing.

    Returns:
        The sum of the losses, and the losses (M,).
    """
    dtype = hidden.dtype
    z = F.linear(hidden, weight, None if bias is None else bias.to(dtype))  # (M, V)
    if down is not None and up is not None:
        z = z + F.linear(F.linear(hidden, down.to(dtype)), (up * scaling).to(dtype))
    y = z.to(wide(dtype)) * grading.scale
    if grading.softcap is not None:
        y = grading.softcap * torch.tanh(y / grading.softcap)
    losses = F.cross_entropy(
        y, targets, ignore_index=IGNORE, reduction="none", label_smoothing=grading.label_smoothing
    )
    return losses.sum(), losses


# --- the operators -------------------------------------------------------------------------------


@torch.library.impl("lora_kernels::linear_cross_entropy", "default")
def _linear_cross_entropy(hidden: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, (dtype, *grading), wants = Head(*args[:5]), args[5:9], Wants(*args[9:])
    with inside(hidden):
        found = grade(hidden, targets, head, dtype, Grading(*grading), wants)
        return found.losses, found.losses.sum(), *found[1:]


@torch.library.impl("lora_kernels::linear_cross_entropy_dweight", "default")
def _dweight(factor: Tensor, norms: Tensor, hidden: Tensor, targets: Tensor, *args: Any) -> Tensor:
    head, (dtype, *grading) = Head(*args[:5]), args[5:]
    with inside(hidden):
        return weight_gradient(factor, norms, hidden, targets, head, dtype, Grading(*grading))


def _fake(hidden: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    head, dtype, wants = Head(*args[:5]), wide(args[5]), Wants(*args[9:])

    def like(t: Tensor | None, wanted: bool) -> Tensor:
        if t is None:
            return hidden.new_empty(0, dtype=dtype)
        return t.new_empty(t.shape if wanted else 0)

    losses = hidden.new_empty(len(hidden), dtype=dtype)
    norms = hidden.new_empty((len(hidden) if wants.weight else 0, 2), dtype=dtype)
    update = like(head.down, wants.update), like(head.up, wants.update)
    gradients = (like(hidden, wants.hidden), like(head.bias, wants.bias), *update)
    return losses, losses.new_empty(()), norms, *gradients


def _fake_dweight(factor: Tensor, norms: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(args[2])


# --- derivatives ---------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """A gradient that says so when it is differentiated: what it is made of was not kept."""

    @staticmethod
    def forward(gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _refuse()


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "linear_cross_entropy has no second derivative, as its gradient is made in the forward "
        "pass; differentiate the loss of whole logits"
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients, and what W's is to be made of if it is wanted."""
    losses, _, norms, *gradients = output
    ctx.wants = Wants(*inputs[11:])
    again = inputs[:7] if ctx.wants.weight else ()
    ctx.save_for_backward(norms, *gradients, *again)
    ctx.grading = inputs[7:11]
    ctx.mark_non_differentiable(losses, norms, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, _: Any, factor: Tensor | None, *__: Any) -> tuple[Tensor | None, ...]:
    norms, dhidden, dbias, ddown, dup, *again = ctx.saved_tensors
    wants, grads = ctx.wants, [None] * 15
    if factor is None:
        return tuple(grads)
    found: dict[int, Tensor] = {}
    if wants.weight:  # first, as it needs room of its own
        found[2] = torch.ops.lora_kernels.linear_cross_entropy_dweight(
            factor, norms, *again, *ctx.grading
        )
    kept = {0: (wants.hidden, dhidden), 3: (wants.bias, dbias)}
    kept |= {4: (wants.update, ddown), 5: (wants.update, dup)}
    found |= {at: total * factor for at, (wanted, total) in kept.items() if wanted}
    if torch.is_grad_enabled():  # create_graph=True
        anchor = factor.new_empty(0).requires_grad_()
        found = {
            at: _Once.apply(gradient, anchor)  # type: ignore[no-untyped-call]
            for at, gradient in found.items()
        }
    return tuple(found.get(at) for at in range(len(grads)))


torch.library.register_fake("lora_kernels::linear_cross_entropy", _fake)
torch.library.register_fake("lora_kernels::linear_cross_entropy_dweight", _fake_dweight)
torch.library.register_autograd(
    "lora_kernels::linear_cross_entropy", _backward, setup_context=_save
)
torch.library.register_autograd("lora_kernels::linear_cross_entropy_dweight", _refuse)
