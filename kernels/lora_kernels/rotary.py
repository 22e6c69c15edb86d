"""Rotary position embedding: turn the channel pairs (i, i + R/2) of q and k by the angles given.

Why an operator: written out in PyTorch, a rotation of a 16-bit q negates and joins halves, makes
two float32 products and a float32 sum, and rounds: six passes and three float32 temporaries. Here q
is read once and written once, and cosines and sines are read once for all heads of a token.

    out_i = x_i cos_i - x_(i+R/2) sin_i        out_(i+R/2) = x_(i+R/2) cos_i + x_i sin_i

The gradient is the rotation by the negative angle: the same operator. Kept for it are cosines and
sines alone, which all layers share. q and k are a call each: one for both would save a launch and
the second reading of the angles, 2 R of 4 B H D bytes a token, and would need either one tensor or
four more arguments.

x is read by its strides, so that the transposed view of a projection's output is no copy, and the
result is laid out as x is. Channels from R on are copied (partial rotary, where the angles have
fewer channels than a head). Angles are float32 and x is rounded once, in every backend to the same
bits.

Ref: Su et al., RoFormer, arXiv:2104.09864, equation 34, in Hugging Face's half layout.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for, inside

__all__ = ["rotary", "rotary_reference"]

BACKENDS = ("reference", "native", "triton")

torch.library.define(
    "lora_kernels::rotary", "(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor"
)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + R/2) of every head.

    Args:
        x: (B, H, T, D), floating-point, any strides.
        cos: (B or 1, 1, T, R) float32, R even and at most D, the angles repeated for both halves as
            Hugging Face has them: the first R/2 are read. Takes no gradient.
        sin: likewise.

    Returns:
        (B, H, T, D) in the dtype and layout of x; channels from R on are those of x.

    Raises:
        TypeError: x is not floating-point, or cos or sin is not float32.
        ValueError: shapes or devices do not fit, R is odd, or cos or sin asks for a gradient.
    """
    _check(x, cos, sin)
    return torch.ops.lora_kernels.rotary(x, cos, sin, False)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point; got {x.dtype}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"cos and sin must be float32; got {cos.dtype} and {sin.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be (B, H, T, D); got {tuple(x.shape)}")
    batch, _, tokens, channels = x.shape
    fits = cos.dim() == 4 and cos.shape[0] in (1, batch) and cos.shape[1:3] == (1, tokens)
    if cos.shape != sin.shape or not fits:
        raise ValueError(
            f"cos and sin must be ({batch} or 1, 1, {tokens}, R) for x {tuple(x.shape)}; "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[3] % 2 or cos.shape[3] > channels:
        raise ValueError(
            f"channels to turn must be even and at most {channels}; got {cos.shape[3]}"
        )
    if not x.device == cos.device == sin.device:
        raise ValueError(
            f"x is on {x.device}, cos on {cos.device} and sin on {sin.device}: move them together"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin take no gradient: give them detached")


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """The definition, in PyTorch differentiable in x; arguments as `rotary`'s.

    Args:
        x: see there.
        cos: see there.
        sin: see there.
        inverse: turn by the negative angles.

    Returns:
        (B, H, T, D), laid out as x.
    """
    turned = cos.shape[3]
    half = turned // 2
    c, s = cos[..., :half], sin[..., :half]
    s = -s if inverse else s
    a, b = x[..., :half], x[..., half:turned]
    out = torch.empty_like(x)
    out[..., :half] = a * c - b * s
    out[..., half:turned] = b * c + a * s
    out[..., turned:] = x[..., turned:]
    return out


@torch.library.impl("lora_kernels::rotary", "default")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    backend = backend_for(x, BACKENDS)
    if backend == "native" and x.dtype == torch.float64:
        backend = "reference"  # C has no float64
    with inside(x):
        if backend == "reference":
            return rotary_reference(x, cos, sin, inverse)
        out = torch.empty_like(x)
        half = cos.shape[3] // 2
        given = (x, cos[..., :half], sin[..., :half])
        a, c, s = (t if t.stride(3) == 1 else t.contiguous() for t in given)
        # angles that the whole batch shares are read again for each
        c, s = (t.expand(len(x), -1, -1, -1) for t in (c, s))
        to = out if out.stride(3) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if backend == "native":
            from lora_kernels.cpu import rotary as cpu

            cpu.rotate(a, c, s, inverse, to)
        else:
            from lora_kernels.gpu import rotary as gpu

            gpu.rotate(a, c, s, inverse, to)
        return out if to is out else out.copy_(to)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.inverse = inputs[3]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.lora_kernels.rotary(dout, *ctx.saved_tensors, not ctx.inverse)
    return dx, None, None, None


torch.library.register_fake("lora_kernels::rotary", _fake)
torch.library.register_autograd("lora_kernels::rotary", _backward, setup_context=_save)
