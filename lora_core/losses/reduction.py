"""What the losses over rows share: their inputs checked and widened, their values averaged.

A row is a completion or a pair, and a loss over rows takes one number a row, (B,). Shapes have to
be equal: (B,) against (B, 1) would broadcast to (B, B), a loss that falls and means nothing.
Numbers of 16 bits are widened to float32, for differences of sums over hundreds of tokens do not
fit into them; float64 stays. `reduction="none"` leaves the rows apart, for a loop that divides by
its own count.
"""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "none"]


def aligned(dims: int = 1, **tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype, float32 at least, once they are seen to have one shape.

    Args:
        dims: dimensions of each: 1 for (B,), 2 for (N, L).
        tensors: by the name that an error calls them.

    Raises:
        TypeError: not a tensor, or not of floating dtype.
        ValueError: another number of dimensions, or shapes that differ.
    """
    first, shape, dtype = "", torch.Size(()), torch.float32
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            held = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of floating dtype; got {held}")
        if tensor.dim() != dims:
            wanted = "(B,), a number a row" if dims == 1 else "(N, L), a number a token"
            raise ValueError(f"{name} must be {wanted}; got {tuple(tensor.shape)}")
        if first and tensor.shape != shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(shape)}; got {tuple(tensor.shape)}"
            )
        first, shape = first or name, tensor.shape
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors.values()]


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """The rows' losses, or their mean: 0, with zero gradient, where there is no row.

    Raises:
        ValueError: an unknown reduction.
    """
    if reduction == "none":
        return losses
    if reduction != "mean":
        raise ValueError(f'reduction must be "mean" or "none"; got {reduction!r}')
    return losses.sum() / max(losses.numel(), 1)


def check_positive(name: str, value: float) -> None:
    """Refuse what is not a finite number above 0; ValueError."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0; got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Refuse what is not a finite number, 0 or more; ValueError."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be 0 or more; got {value}")
