"""The gate of a feed-forward layer: `act(gate) * up`, for SiLU and the tanh form of GELU.

Why an operator: written out in PyTorch, forward writes act(gate) and reads it again, and keeps it
for backward beside gate and up; backward makes five passes. Here forward reads two tensors and
writes one, backward reads three and writes two, and gate and up alone are kept: act(gate) is
recomputed, one exponential an element in a pass that waits for memory anyway.

Both activations are `gate s` with a sigmoid s = 1 / (1 + exp(-z)), as (1 + tanh(a)) / 2 is the
sigmoid of 2a:

    SiLU          z = gate
    GELU, tanh    z = 2 sqrt(2/pi) (gate + 0.044715 gate³)

    dup = dout gate s        dgate = dout up (s + gate s (1 - s) dz/dgate)

Bytes kept, 16-bit tensors of M D elements: 4 M D instead of 6 M D. Gradients go to new tensors, so
that backward can be run again. In C and Triton arithmetic is float32 and rounds once, where the
definition rounds act(gate) first.

Ref: Shazeer, arXiv:2002.05202, section 2; Hendrycks and Gimpel, arXiv:1606.08415, section 2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.derivatives import through
from lora_kernels.dispatch import backend_for, inside
from lora_kernels.operands import rows

__all__ = ["ACTIVATIONS", "swiglu", "swiglu_reference"]

BACKENDS = ("reference", "native", "triton")
ACTIVATIONS = ("silu", "gelu_tanh")

torch.library.define("lora_kernels::swiglu", "(Tensor gate, Tensor up, str activation) -> Tensor")
torch.library.define(
    "lora_kernels::swiglu_backward",
    "(Tensor dout, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
)


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Gate `up` by `act(gate)`.

    Args:
        gate: (..., D), floating-point.
        up: of the same shape; of another dtype, both are promoted.
        activation: "silu", or "gelu_tanh" for GELU's tanh form.

    Returns:
        (..., D) in the common dtype.

    Raises:
        TypeError: gate or up is not floating-point.
        ValueError: shapes or devices differ, or an unknown activation.
    """
    _check(gate, up, activation)
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return torch.ops.lora_kernels.swiglu(gate.to(dtype), up.to(dtype), activation)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    for name, t in (("gate", gate), ("up", up)):
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating-point; got {t.dtype}")
    if gate.shape != up.shape:
        raise ValueError(
            f"gate and up must have one shape; got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    if gate.device != up.device:
        raise ValueError(f"gate is on {gate.device} and up on {up.device}: move one")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def swiglu_reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The definition, in differentiable PyTorch; arguments as `swiglu`'s."""
    return _act(gate, activation) * up


def _act(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def gradients_reference(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """What autograd does, but act(gate) is recomputed."""
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dout * up, gate)
    else:
        dgate = torch.ops.aten.gelu_backward(dout * up, gate, approximate="tanh")
    return dgate, dout * _act(gate, activation)


# --- the operators -------------------------------------------------------------------------------


def _backend(gate: Tensor) -> str:
    """Which backend; C has no float64."""
    backend = backend_for(gate, BACKENDS)
    return "reference" if backend == "native" and gate.dtype == torch.float64 else backend


@torch.library.impl("lora_kernels::swiglu", "default")
def _swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    backend = _backend(gate)
    with inside(gate):
        if backend == "reference":
            return swiglu_reference(gate, up, activation).contiguous()
        a, b = _flat(gate, up)
        if backend == "native":
            from lora_kernels.cpu import swiglu as cpu

            return cpu.forward(a, b, activation).view(gate.shape)
        from lora_kernels.gpu import swiglu as gpu

        return gpu.forward(a, b, activation).view(gate.shape)


@torch.library.impl("lora_kernels::swiglu_backward", "default")
def _swiglu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    backend = _backend(gate)
    with inside(gate):
        if backend == "reference":
            plain = gradients_reference(dout, gate, up, activation)
            return plain[0].contiguous(), plain[1].contiguous()
        d, a, b = _flat(dout, gate, up)
        if backend == "native":
            from lora_kernels.cpu import swiglu as cpu

            dgate, dup = cpu.backward(d, a, b, activation)
        else:
            from lora_kernels.gpu import swiglu as gpu

            dgate, dup = gpu.backward(d, a, b, activation)
    return dgate.view(gate.shape), dup.view(gate.shape)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """As matrices of one shape with channels side by side: a single row where none has gaps."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    matrices = [rows(t if t.dim() else t[None]) for t in tensors]
    return [t if t.stride(1) == 1 else t.contiguous() for t in matrices]


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(
    dout: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# --- derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.lora_kernels.swiglu_backward(dout, *ctx.saved_tensors, ctx.activation)
    return (*(g if w else None for g, w in zip(grads, ctx.needs_input_grad, strict=False)), None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.activation = inputs[3]


def _second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of `<grads, (dgate, dup)>`, through plain PyTorch."""

    def plain(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        out = swiglu_reference(gate, up, ctx.activation)
        return torch.autograd.grad(out, (gate, up), dout, create_graph=True)

    with torch.autocast(grads[0].device.type, enabled=False):
        return (*through(plain, ctx.saved_tensors, grads), None)


for _name, _fake_kernel, _gradient, _setup in (
    ("swiglu", _fake, _backward, _save),
    ("swiglu_backward", _fake_backward, _second, _save_backward),
):
    torch.library.register_fake(f"lora_kernels::{_name}", _fake_kernel)
    torch.library.register_autograd(f"lora_kernels::{_name}", _gradient, setup_context=_setup)
