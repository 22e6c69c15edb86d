"""What adapters ask a layer: is it linear, its dense weight, precision and dtype, its scale."""

import torch
from torch import Tensor, nn

from lora_kernels.operands import autocast_dtype

__all__ = [
    "compute_dtype",
    "dense_weight",
    "is_linear",
    "linear_features",
    "precision_of",
    "scaled_as",
]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear-like: an nn.Linear, or the contract of four.

    The contract: `in_features`, `out_features`, `forward` (x W^T + b), and `dense_weight()`, which
    returns the weight as float32 (out_features, in_features). NF4Linear fulfils it.
    """
    return isinstance(module, nn.Linear) or (
        callable(getattr(module, "dense_weight", None))
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear-like module."""
    return int(getattr(module, "in_features")), int(getattr(module, "out_features"))  # noqa: B009


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of a module as a dense tensor in float32, or float64 if it is stored so.

    Args:
        module: one with `dense_weight()` or with a floating `.weight`.

    Returns:
        The weight, detached; may share memory with the module's.

    Raises:
        TypeError: the module has neither.
    """
    expand = getattr(module, "dense_weight", None)
    if callable(expand):
        return expand()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"{type(module).__name__} has no dense weight: it needs dense_weight() or a "
            "floating-point .weight"
        )
    return weight.detach().to(torch.promote_types(torch.float32, weight.dtype))


def precision_of(module: nn.Module) -> str | None:
    """In what precision a module holds its weight: what it says itself, else its dtype.

    Args:
        module: any; NF4Linear says "nf4, block 64, double quantization".

    Returns:
        Such as "bfloat16", or None for a module without a floating-point parameter.
    """
    own = getattr(module, "precision", None)
    if isinstance(own, str):
        return own
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    first = next(dtypes, None)
    return None if first is None else str(first).removeprefix("torch.")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a linear layer computes on x: autocast's where active, else x's."""
    return autocast_dtype(x) or x.dtype


def scaled_as(base: nn.Module, x: Tensor) -> Tensor:
    """What an embedding makes of rows that it has looked up: some multiply them, as Gemma's do.

    Args:
        base: the embedding. One with a method `scaled` does it by that; else by `embed_scale`, a
            number, or a tensor, which transformers rounds to the weight's dtype first.
        x: rows, in the dtype that the embedding computes in.

    Returns:
        As x.
    """
    own = getattr(base, "scaled", None)
    if callable(own):
        rows: Tensor = own(x)
        return rows
    scale = getattr(base, "embed_scale", None)
    if scale is None:
        return x
    return (x * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)).to(x.dtype)
