"""RMS norm: `y = w round(x r)`, r = 1 / sqrt(mean(x²) + eps), over the last dimension.

Why an operator: written out in PyTorch it is six passes over x, and backward needs the float32 copy
of a 16-bit x and the normalised one. Here forward reads x and writes y, backward reads x and dy and
writes dx, and kept between them are x and w, which exist anyway: r is summed up again, for free, as
the row is read in any case.

    g = dy w        dx = r (g - n mean(g n)),  n = x r        dw = sum over rows of dy round(n)

Bytes moved, 16-bit x of M H elements: 4 M H forward and 6 M H backward, where the plain chain moves
about 30 and 50. Bytes kept: 0 beyond x, where the chain keeps 4 M H (the float32 copy), and 2 M H
more with a trained w. dw is only summed where w is trained.

Three families are covered, as Hugging Face has them. Llama's rounds to the dtype of x before the
product with w; OLMo 2's (`wide`) multiplies in float32 and rounds once, at the end; Gemma's
(`offset`) does so with 1 + w. The norms of single heads (Qwen 3, Gemma 3) are the same with short
rows: queries and keys are normalised where their projection wrote them, a view (..., heads, D).

The sum of the residual before the norm is not fused in. It would save 3 of the 11 passes over the
residual that a layer's two sums and norms take, under 1 % of a training step, and the norm would no
longer be a module that maps x to y: hooks on it, and adapters, would see something else.

Ref: Zhang and Sennrich, arXiv:1910.07467, equation 4.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels import operands
from lora_kernels.derivatives import through
from lora_kernels.dispatch import backend_for, inside
from lora_kernels.operands import rows

__all__ = ["rms_norm", "rms_norm_reference"]

BACKENDS = ("reference", "native", "triton")

torch.library.define(
    "lora_kernels::rms_norm",
    "(Tensor x, Tensor weight, float eps, bool offset, bool wide) -> Tensor",
)
torch.library.define(
    "lora_kernels::rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor weight, float eps, bool offset, bool wide, bool wants_dx, "
    "bool wants_dw) -> (Tensor, Tensor)",
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, offset: bool = False, wide: bool = False
) -> Tensor:
    """Divide rows by their root mean square and multiply by a weight.

    Args:
        x: (..., H), floating-point; computed in float32, float64 if x is.
        weight: (H,), floating-point.
        eps: added to the mean square.
        offset: multiply by 1 + weight instead of the weight (Gemma); `wide` is implied.
        wide: multiply in float32 and round once, to the dtype of x (OLMo 2), instead of rounding to
            it before the product with the weight (Llama).

    Returns:
        (..., H) in the dtype of x; in Llama's form, promoted with the weight's.

    Raises:
        TypeError: x or the weight is not floating-point.
        ValueError: the weight is not (H,), on another device, or eps is negative.
    """
    _check(x, weight, eps)
    return torch.ops.lora_kernels.rms_norm(x, weight, eps, offset, wide or offset)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    for name, t in (("x", x), ("weight", weight)):
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating-point; got {t.dtype}")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be ({x.shape[-1] if x.dim() else 'H'},), as long as the rows of x; "
            f"got {tuple(weight.shape)} for x {tuple(x.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}: move one")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0; got {eps}")


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, offset: bool = False, wide: bool = False
) -> Tensor:
    """The definition, in differentiable PyTorch; arguments as `rms_norm`'s."""
    n = x.to(operands.wide(x.dtype))
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
    if wide or offset:
        return (n * (offset + weight.to(n.dtype))).to(x.dtype)
    return weight * n.to(x.dtype)


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: bool, wide: bool
) -> tuple[Tensor, Tensor]:
    """dx (M, H) and dw (H,) of rows x (M, H)."""
    dtype = operands.wide(x.dtype)
    r = torch.rsqrt(x.to(dtype).pow(2).mean(-1, keepdim=True) + eps)  # (M, 1)
    n = x.to(dtype) * r
    w = offset + weight.to(dtype)
    g = dy.to(dtype) * w
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    dw = (dy.to(dtype) * (n if wide else n.to(x.dtype))).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype)


def _result(x: Tensor, weight: Tensor, wide: bool) -> torch.dtype:
    return x.dtype if wide else torch.promote_types(x.dtype, weight.dtype)


def _backend(x: Tensor, weight: Tensor, wide: bool) -> str:
    """Which backend, but float64 in C and a weight wider than the sums are the definition's."""
    backend, dtype = backend_for(x, BACKENDS), _result(x, weight, wide)
    taken = dtype in (x.dtype, torch.float32) and weight.dtype in (x.dtype, dtype, *_HALVES)
    if backend == "native" and x.dtype == torch.float64:
        return "reference"
    return backend if taken else "reference"


_HALVES = (torch.bfloat16, torch.float16, torch.float32)


# --- the operators -------------------------------------------------------------------------------


@torch.library.impl("lora_kernels::rms_norm", "default")
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool, wide: bool) -> Tensor:
    backend, dtype, flat = _backend(x, weight, wide), _result(x, weight, wide), _rows(x)
    with inside(x):
        if backend == "native":
            from lora_kernels.cpu import rms_norm as cpu

            y = cpu.forward(flat, _float32(weight, offset), eps, not wide, dtype)
        elif backend == "triton":
            from lora_kernels.gpu import rms_norm as gpu

            y = gpu.forward(flat, weight.contiguous(), eps, offset, wide, dtype)
        else:
            y = rms_norm_reference(flat, weight, eps, offset, wide).contiguous()
    return y.view(x.shape)


@torch.library.impl("lora_kernels::rms_norm_backward", "default")
def _rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: bool,
    wide: bool,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[Tensor, Tensor]:
    backend, wants = _backend(x, weight, wide), (wants_dx, wants_dw)
    flat, rows_dy = _rows(x), rows(dy).contiguous()
    dx: Tensor | None
    dw: Tensor | None
    with inside(x):
        if backend == "native":
            from lora_kernels.cpu import rms_norm as cpu

            own = _float32(weight, offset)
            dx, dw = cpu.backward(rows_dy, flat, own, eps, not wide, wants)
        elif backend == "triton":
            from lora_kernels.gpu import rms_norm as gpu

            own = weight.contiguous()
            dx, dw = gpu.backward(rows_dy, flat, own, eps, offset, wide, wants)
        else:
            dx, dw = backward_reference(rows_dy, flat, weight, eps, offset, wide)
    return (
        dx.contiguous().view(x.shape) if wants_dx and dx is not None else x.new_empty(0),
        dw.to(weight.dtype) if wants_dw and dw is not None else weight.new_empty(0),
    )


def _rows(x: Tensor) -> Tensor:
    """x (..., H) as (M, H), channels side by side."""
    flat = rows(x)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _float32(weight: Tensor, offset: bool) -> Tensor:
    """What multiplies, in float32."""
    own = weight.float().contiguous()
    return own + 1 if offset else own


def _fake(x: Tensor, weight: Tensor, eps: float, offset: bool, wide: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=_result(x, weight, wide))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: bool,
    wide: bool,
    wants_dx: bool,
    wants_dw: bool,
) -> tuple[Tensor, Tensor]:
    dx, dw = (x.shape if wants_dx else (0,)), (weight.shape if wants_dw else (0,))
    return x.new_empty(dx), weight.new_empty(dw)


# --- derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.form = inputs[2:]  # eps, offset, wide


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad[:2]
    grads = torch.ops.lora_kernels.rms_norm_backward(dy, *ctx.saved_tensors, *ctx.form, *wants)
    found = (g if wanted else None for g, wanted in zip(grads, wants, strict=True))
    return (*found, None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.form, ctx.wants = inputs[3:6], inputs[6:]


def _second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of `<grads, (dx, dw)>`, through plain PyTorch."""
    dy, x, weight = ctx.saved_tensors

    def wanted(dy: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        flat = rows(dy), rows(x)
        dx, dw = backward_reference(*flat, weight, *ctx.form)
        both = zip((dx.view(x.shape), dw), ctx.wants, strict=True)
        return [t for t, wants in both if wants]

    given = [g for g, wants in zip(grads, ctx.wants, strict=True) if wants]
    if not given:
        return (None,) * 8
    with torch.autocast(x.device.type, enabled=False):
        return (*through(wanted, (dy, x, weight), given), *(None,) * 5)


for _name, _fake_kernel, _gradient, _setup in (
    ("rms_norm", _fake, _backward, _save),
    ("rms_norm_backward", _fake_backward, _second, _save_backward),
):
    torch.library.register_fake(f"lora_kernels::{_name}", _fake_kernel)
    torch.library.register_autograd(f"lora_kernels::{_name}", _gradient, setup_context=_setup)
