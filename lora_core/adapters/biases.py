"""Trained biases of modules that have no other adapter (`bias="all"`).

The trained vector stands in the place of the module's bias; what the host adds is its change,
`y + (bias - bias0)`, zero to the bit at the start. The base's own bias is never written, so that
disabling gives the base back, which PEFT's `bias="all"` cannot (it trains the base's vector).

Only kinds are known whose output the bias is added to last; a bias of any other is refused by
LoRAConfig rather than left out in silence.

Ref: Ben Zaken et al. 2021, BitFit, arXiv:2106.10199, section 3.
"""

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.forms import TransposedForm, form_of
from lora_core.adapters.layers import is_linear

__all__ = ["TrainedBias", "bias_site"]

# kinds with channels before their last dimensions, and how many these are; None: all but batch
_ALONG_CHANNELS: tuple[tuple[tuple[type[nn.Module], ...], int | None], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d), 1),
    ((nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d), 2),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d), 3),
    ((nn.GroupNorm, nn.modules.batchnorm._BatchNorm), None),
)


class TrainedBias(Adapter):
    """The bias of a linear layer, convolution or norm, trained in float32.

    Args:
        module: one whose `bias_site` is True.

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
        found = [dims for kinds, dims in _ALONG_CHANNELS if isinstance(module, kinds)]
        self.along_channels, self.trailing = bool(found), found[0] if found else 0

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Add the bias's change to the output y."""
        change = self.bias - self.bias0
        if self.along_channels:
            dims = y.dim() - 2 if self.trailing is None else self.trailing
            change = change.view(-1, *(1,) * dims)  # y is (B, C, …), or (C, …) of a convolution
        return y - (0.0 - change.to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight as it is and the bias with its change."""
        change = self.bias.to(weight.dtype) - self.bias0.to(weight.dtype)
        return weight, change if bias is None else bias + change

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole bias, under PEFT's name."""
        return {"bias": self.bias}


def bias_site(module: nn.Module) -> bool | None:
    """Whether a module has a bias that can be trained; None: it has one of an unknown kind.

    Args:
        module: any, without its hosts.

    Returns:
        True for linear layers, convolutions and norms whose `.bias` is added to the output last;
        False without a bias.
    """
    if not isinstance(getattr(module, "bias", None), Tensor):
        return False
    known = (
        is_linear(module)
        or isinstance(form_of(module), TransposedForm)
        or isinstance(module, nn.LayerNorm | nn.Bilinear)
        or any(isinstance(module, kinds) for kinds, _ in _ALONG_CHANNELS)
    )
    return True if known else None
