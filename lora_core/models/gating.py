"""The product inside a gated feed-forward layer: act(gate) * up.

For SiLU and GELU's tanh form it is one operator, which keeps gate and up alone for backward.

Ref: Shazeer, arXiv:2002.05202, equation 6.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from lora_kernels import swiglu

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# what `swiglu` calls those that it has
_FUSED = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Multiply up by the activation of gate.

    Args:
        gate: (..., I).
        up: (..., I).
        activation: a name in config.ACTIVATIONS.

    Returns:
        (..., I).
    """
    fused = _FUSED.get(activation)
    return _ACTIVATIONS[activation](gate) * up if fused is None else swiglu(gate, up, fused)
