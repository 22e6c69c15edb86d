"""Losses on plain tensors."""

from lora_core.losses.cross_entropy import (
    IGNORE,
    count_graded,
    masked_cross_entropy,
    shift_labels,
    token_cross_entropy,
    token_mean,
)
from lora_core.losses.linear_cross_entropy import (
    linear_cross_entropy,
    linear_token_cross_entropy,
)

__all__ = [
    "IGNORE",
    "count_graded",
    "linear_cross_entropy",
    "linear_token_cross_entropy",
    "masked_cross_entropy",
    "shift_labels",
    "token_cross_entropy",
    "token_mean",
]
