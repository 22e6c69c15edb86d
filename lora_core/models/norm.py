"""Root mean square norm, in the three forms that families use.

    llama    w · round(x / sqrt(mean(x²) + eps))         rounded to x's dtype before the product
    gemma    round((1 + w) · x / sqrt(mean(x²) + eps))   all in float32
    wide     round(w · x / sqrt(mean(x²) + eps))         likewise (OLMo 2)

In float32 the first and the last are the same numbers. Kept for backward are x and w, which exist
anyway.

Ref: Zhang and Sennrich, arXiv:1910.07467, equation 4.
"""

import torch
from torch import Tensor, nn

from lora_core.models.config import ModelConfig
from lora_kernels import rms_norm


class RMSNorm(nn.Module):
    """x divided by its root mean square, times a weight.

    Args:
        size: C, channels.
        eps: added to the mean square.
        form: "llama", "gemma" or "wide".

    Attributes:
        neutral: the weight with which it only normalises.
    """

    def __init__(self, size: int, eps: float, form: str = "llama") -> None:
        super().__init__()
        self.neutral = 0.0 if form == "gemma" else 1.0
        self.weight = nn.Parameter(torch.full((size,), self.neutral))
        self.eps = eps
        self.offset, self.wide = form == "gemma", form == "wide"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C) along C."""
        return rms_norm(x, self.weight, self.eps, self.offset, self.wide)


def norm_of(config: ModelConfig, size: int) -> RMSNorm:
    """A norm over `size` channels, in the form of the model's family."""
    return RMSNorm(size, config.rms_norm_eps, config.family.norm)
