"""What the products with a 4-bit weight share: the weight, as they and their schemas take it.

A `torch.library` operator takes tensors and numbers, no objects, so a weight is spread over the
arguments of each and put together again inside. The rules for x are nn.Linear's: any leading shape,
and under autocast its dtype is autocast's.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SCHEMA",
    "TENSORS",
    "WIDTH",
    "Weight4",
    "autocast",
    "autocast_dtype",
    "check",
    "flat",
    "rows",
    "unflat",
    "wide",
]

SCHEMA = (
    "Tensor codes, Tensor scales, Tensor table, Tensor? scale_absmax, Tensor? scale_offset, "
    "Tensor? scale_table, Tensor? arranged, int out_features, int in_features, int block_size"
)
TENSORS = 7  # of a weight in the schema, before its three integers
WIDTH = TENSORS + 3  # arguments that are the weight


class Weight4(NamedTuple):
    """A 4-bit matrix as the operators take it: tensors and three integers.

    Attributes:
        codes: uint8, `out_features * in_features / 2` bytes rounded up, any shape.
        scales: float32 (blocks,), or uint8 indices into `scale_table` (double quantization).
        table: float32 (16,), the value of each code.
        out_features: rows, N.
        in_features: columns, K.
        block_size: elements that share a scale.
        scale_absmax: float32 (ceil(blocks / 256),) with double quantization, else None.
        scale_offset: float32 (), likewise.
        scale_table: float32 (256,), likewise.
        arranged: uint8, a copy of the codes in the order in which tensor cores read them, or None.
    """

    codes: Tensor
    scales: Tensor
    table: Tensor
    out_features: int
    in_features: int
    block_size: int
    scale_absmax: Tensor | None = None
    scale_offset: Tensor | None = None
    scale_table: Tensor | None = None
    arranged: Tensor | None = None

    @property
    def nested(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """What decodes uint8 scales: `scale_absmax`, `scale_offset`, `scale_table`; or None."""
        if self.scale_absmax is None or self.scale_offset is None or self.scale_table is None:
            return None
        return self.scale_absmax, self.scale_offset, self.scale_table


def flat(weight: Weight4) -> tuple[Any, ...]:
    """The weight in the order of the schema."""
    w = weight
    tensors = (w.codes, w.scales, w.table, w.scale_absmax, w.scale_offset, w.scale_table)
    return (*tensors, w.arranged, w.out_features, w.in_features, w.block_size)


def unflat(args: tuple[Any, ...]) -> Weight4:
    """`flat` undone; kernels count on tensors without gaps."""
    tensors: list[Any] = [t if t is None else t.contiguous() for t in args[:TENSORS]]
    codes, scales, table, *more = tensors
    return Weight4(codes, scales, table, *args[TENSORS:], *more)


def check(x: Tensor, weight: Weight4, bias: Tensor | None) -> None:
    """Refuse an x or a bias that does not fit the weight.

    Raises:
        TypeError: x is not floating-point.
        ValueError: x is on another device, its last dimension is not K, or the bias is not (N,).
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point; got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x must end in in_features = {weight.in_features}; got shape {tuple(x.shape)}"
        )
    # a weight on meta would give memory as it was found: operators have shapes there, no values
    if x.device != weight.codes.device:
        raise ValueError(
            f"x must be on the weight's device, {weight.codes.device}; got {x.device}: move one"
        )
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias must be ({weight.out_features},); got {tuple(bias.shape)}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where nn.Linear would cast x to it; None where it is off, or x float64."""
    device = x.device.type
    # asked first, as a device without autocast (meta) may not be asked the second question
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if active and x.dtype != torch.float64 else None


def autocast(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype when it is active, as nn.Linear does; float64 stays."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of a dtype are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rows(x: Tensor) -> Tensor:
    """x (..., D) as (M, D)."""
    # with -1 for either, 0 elements would not tell
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
