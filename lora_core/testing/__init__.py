"""The property tests that users point at their own layers."""

from lora_core.testing.adapters import check_adapter
from lora_core.testing.operators import check_operator
from lora_core.testing.quantizers import check_quantizer
from lora_core.testing.strategies import (
    dtypes,
    operands,
    ranks,
    scales,
    seeds,
    shapes,
    sizes,
    weights,
)

__all__ = [
    "check_adapter",
    "check_operator",
    "check_quantizer",
    "dtypes",
    "operands",
    "ranks",
    "scales",
    "seeds",
    "shapes",
    "sizes",
    "weights",
]
