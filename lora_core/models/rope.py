"""Rotary position embedding in Hugging Face's half-rotation layout.

Channel i of a head is paired with channel i + D/2 and the pair is turned by the angle
``position * inv_freq[i]``. Frequencies, angles, cosines and sines are float32 whatever the model's
dtype, and the rotation itself is done in float32 and rounded once. transformers rounds cosine and
sine to the model's dtype first; in float32 the two are the same numbers, in bfloat16 this one is
closer to the exact rotation.

The frequencies are no buffer: they are a handful of numbers that follow from the configuration, so
they are never saved, never cast by ``model.to(torch.bfloat16)`` and never left empty by
construction on the meta device.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lora_kernels import rotary

RopeParameters = Mapping[str, float | str]


def _default(inv_freq: Tensor, parameters: RopeParameters) -> Tensor:
    return inv_freq


def _llama3(inv_freq: Tensor, parameters: RopeParameters) -> Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend in between.

    Ref: Llama 3.1's published reference code, `apply_scaling`.
    """
    factor, low, high, context = (float(parameters[key]) for key in ROPE_TYPES["llama3"][1])
    wavelength = 2 * math.pi / inv_freq  # tokens per turn, (D/2,)
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    between = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(between, blended, scaled)


# rope_type -> (what it does to the plain frequencies, the keys that it needs, all positive numbers)
ROPE_TYPES: dict[str, tuple[Callable[[Tensor, RopeParameters], Tensor], tuple[str, ...]]] = {
    "default": (_default, ()),
    "llama3": (
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}


def inverse_frequencies(head_dim: int, parameters: RopeParameters) -> Tensor:
    """Angle per token of each channel pair: theta^(-2i/D), then the scaling of `rope_type`.

    Args:
        head_dim: D, even.
        parameters: `rope_type`, `rope_theta` and that type's own keys (checked by `ModelConfig`).

    Returns:
        (D/2,) float32 on the CPU, also under `torch.device("meta")`.

    Ref: RoFormer, arXiv:2104.09864, section 3.2.2.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain = 1.0 / (float(parameters["rope_theta"]) ** exponent)  # (D/2,)
    scale, _ = ROPE_TYPES[str(parameters["rope_type"])]
    return scale(plain, parameters)


class Rotary(nn.Module):
    """Cosines and sines of the rotation, in float32, for given positions."""

    def __init__(self, head_dim: int, parameters: RopeParameters) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(head_dim, parameters)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle.

        Args:
            position_ids: (B, T) or (1, T) integers.

        Returns:
            Two float32 tensors (B, 1, T, D), the angles repeated for both halves of a head.
        """
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[:, None, :, None].float() * self.inv_freq  # (B, 1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, D)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + R/2) of x by the angles, in float32, rounded once.

    Args:
        x: (B, H, T, D), by any strides.
        cos: (B or 1, 1, T, R) float32, R at most D: further channels stay as they are.
        sin: likewise.

    Returns:
        (B, H, T, D) in the dtype and layout of x; kept for backward are cos and sin alone.
    """
    return rotary(x, cos, sin)
