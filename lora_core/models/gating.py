"""The product inside a gated feed-forward layer: act(gate) * up.

For SiLU and GELU's tanh form it is one operator, which keeps gate and up alone for backward.

Ref: Shazeer, arXiv:2002.05202, equation 6.
"""

from torch import Tensor

from lora_core.models.activations import ACTIVATIONS
from lora_kernels import swiglu

# what `swiglu` calls those that it has
_FUSED = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Multiply up by the activation of gate.

    Args:
        gate: (..., I).
        up: (..., I).
        activation: a name in `ACTIVATIONS`.

    Returns:
        (..., I).
    """
    fused = _FUSED.get(activation)
    return ACTIVATIONS[activation](gate) * up if fused is None else swiglu(gate, up, fused)
