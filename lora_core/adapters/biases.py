"""Trained biases of modules that have no other adapter (`bias="all"`).

The trained vector stands in the place of the module's bias; what the host adds is its change,
`y + (bias - bias0)`, zero to the bit at the start. The base's own bias is never written, so that
disabling gives the base back, which PEFT's `bias="all"` cannot (it trains the base's vector).

Ref: Ben Zaken et al. 2021, BitFit, arXiv:2106.10199, section 3.
"""

import torch
from torch import Tensor, nn

from lora_core.adapters.base import Adapter, is_linear
from lora_core.adapters.forms import TransposedForm, form_of

__all__ = ["TrainedBias", "has_bias"]

_ALONG_CHANNELS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,  # instance norms too
)


class TrainedBias(Adapter):
    """The bias of a linear layer, convolution or norm, trained in float32.

    Args:
        module: one that `has_bias`.

    Attributes:
        bias: float32, of the shape of the module's.
        bias0: the module's at the start.
    """

    additive = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        start = getattr(module, "bias").detach().float().cpu()  # noqa: B009
        self.bias = nn.Parameter(start.clone())
        self.register_buffer("bias0", start.clone())
        self.bias0: Tensor
        self.along_channels = isinstance(module, _ALONG_CHANNELS)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Add the bias's change to the output y."""
        change = self.bias - self.bias0
        if self.along_channels:
            change = change.view(-1, *(1,) * (y.dim() - 2))  # y is (B, C, …)
        return y - (0.0 - change.to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight as it is and the bias with its change."""
        change = self.bias.to(weight.dtype) - self.bias0.to(weight.dtype)
        return weight, change if bias is None else bias + change

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole bias, under PEFT's name."""
        return {"bias": self.bias}


def has_bias(module: nn.Module) -> bool:
    """Whether a module is of a kind whose output its `.bias` is added to last, and has one."""
    known = (
        is_linear(module)
        or isinstance(form_of(module), TransposedForm)
        or isinstance(module, (*_ALONG_CHANNELS, nn.LayerNorm))
    )
    return known and isinstance(getattr(module, "bias", None), torch.Tensor)
