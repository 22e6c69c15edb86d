"""Multiply by a 4-bit weight: `y = x Wᵀ + b` and, for its gradient, `dx = dy W`.

Why operators: written out in PyTorch, forward and backward each expand W. A compiler that sees both
expansions merges them and keeps the dense W between forward and backward, eight times the size of
the codes and the very memory that 4 bits were to save. So each product is one opaque operator,
`lora_kernels::matmul4` and `lora_kernels::matmul4_dx`, in every backend, the reference included.
Saved for backward are the codes and scales, which exist anyway, and never x: W takes no gradient.
Each is the other's gradient, so the product can be differentiated any number of times.

The weight stays in the form it is stored in: doubly quantized scales are decoded inside the
operator, because decoded ones would be a further half bit a parameter held from forward to
backward.

On a GPU one of three routes is taken, by the number of rows (gpu/routes4.py).

Bytes moved by the reference, N x K weight: K N / 2 codes read, 2 K N written and read again as the
16-bit W. W is rounded once, from the float32 product of table entry and scale to the dtype of x.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equations 5 and 6.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels.blockwise4 import Weight4, dequantize4
from lora_kernels.dispatch import backend_for, device_of

__all__ = ["arrange", "matmul4", "matmul4_reference"]

BACKENDS = ("reference", "triton")

_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor table, Tensor? scale_absmax, Tensor? scale_offset, "
    "Tensor? scale_table, Tensor? arranged, int out_features, int in_features, "
    "int block_size"
)
_TENSORS = 7  # of a weight in the schema, before its three integers
torch.library.define("lora_kernels::matmul4", f"(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
torch.library.define("lora_kernels::matmul4_dx", f"(Tensor dy, {_WEIGHT}) -> Tensor")


def matmul4(x: Tensor, weight: Weight4, bias: Tensor | None = None) -> Tensor:
    """Multiply by a 4-bit weight: `y = x Wᵀ + bias`.

    Args:
        x: (..., K), floating-point. Under autocast it is cast first, as `nn.Linear` does.
        weight: the codes and scales of W (N, K); takes no gradient.
        bias: (N,) or None; cast to the dtype of x.

    Returns:
        (..., N) in the dtype of x (autocast's when active), differentiable in x and bias.

    Raises:
        TypeError: x is not floating-point.
        ValueError: the last dimension of x is not K, the bias is not (N,), or a forced backend
            cannot run.
    """
    _check(x, weight, bias)
    device = x.device.type
    # asked first, as a device without autocast (meta) may not be asked the second question
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return torch.ops.lora_kernels.matmul4(x, *_flat(weight), bias)


def _check(x: Tensor, weight: Weight4, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point; got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x must end in in_features = {weight.in_features}; got shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias must be ({weight.out_features},); got {tuple(bias.shape)}")


def arrange(weight: Weight4) -> Tensor | None:
    """What `Weight4.arranged` takes: a copy of the codes in the order in which tensor cores read.

    The copy saves the kernels for few rows a rearrangement in shared memory. It costs as many bytes
    again as the codes, and `lora_kernels.gpu.arrange4.restore` gives the codes back from it.

    Args:
        weight: codes and scales of W (N, K).

    Returns:
        uint8, or None where no kernel reads it: another backend, or a shape that does not divide.
    """
    if backend_for(weight.codes, BACKENDS) != "triton":
        return None
    from lora_kernels.gpu import arrange4

    return arrange4.arrange(weight)


def matmul4_reference(x: Tensor, weight: Weight4, bias: Tensor | None = None) -> Tensor:
    """The definition: expand W in the dtype of x and multiply.

    Args:
        x: (..., K), floating-point.
        weight: codes and scales of W (N, K).
        bias: (N,) or None.

    Returns:
        (..., N) in the dtype of x.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, _expand(weight, x.dtype), bias)


def _expand(weight: Weight4, dtype: torch.dtype) -> Tensor:
    n, k = weight.out_features, weight.in_features
    codes, scales, table, block = weight.codes, weight.scales, weight.table, weight.block_size
    flat = dequantize4(codes, scales, table, block, n * k, dtype, nested=weight.nested)
    return flat.view(n, k)


def _dx_reference(dy: Tensor, weight: Weight4) -> Tensor:
    return dy @ _expand(weight, dy.dtype)


def _matmul4_triton(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    from lora_kernels.gpu import routes4

    with device_of(x):
        y = routes4.multiply(x.reshape(_rows(x), weight.in_features), weight, bias)
    return y.view(*x.shape[:-1], weight.out_features)


def _dx_triton(dy: Tensor, weight: Weight4) -> Tensor:
    from lora_kernels.gpu import routes4

    with device_of(dy):
        dx = routes4.multiply_dx(dy.reshape(_rows(dy), weight.out_features), weight)
    return dx.view(*dy.shape[:-1], weight.in_features)


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])  # reshape(-1, 0) would not know


def _flat(weight: Weight4) -> tuple[Any, ...]:
    """The weight in the order of the operators' schema."""
    w = weight
    tensors = (w.codes, w.scales, w.table, w.scale_absmax, w.scale_offset, w.scale_table)
    return (*tensors, w.arranged, w.out_features, w.in_features, w.block_size)


def _weight(args: tuple[Any, ...]) -> Weight4:
    """`_flat` undone; kernels count on tensors without gaps."""
    tensors: list[Any] = [t if t is None else t.contiguous() for t in args[:_TENSORS]]
    codes, scales, table, *more = tensors
    return Weight4(codes, scales, table, *args[_TENSORS:], *more)


@torch.library.impl("lora_kernels::matmul4", "default")
def _matmul4(x: Tensor, *args: Any) -> Tensor:
    run = {"reference": matmul4_reference, "triton": _matmul4_triton}[backend_for(x, BACKENDS)]
    with torch.autocast(x.device.type, enabled=False):  # the caller's cast is the only one
        return run(x, _weight(args[:-1]), args[-1])


@torch.library.impl("lora_kernels::matmul4_dx", "default")
def _matmul4_dx(dy: Tensor, *args: Any) -> Tensor:
    run = {"reference": _dx_reference, "triton": _dx_triton}[backend_for(dy, BACKENDS)]
    with torch.autocast(dy.device.type, enabled=False):
        return run(dy, _weight(args))


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[_TENSORS]))


def _fake_dx(dy: Tensor, *args: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], args[_TENSORS + 1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight as it is stored; x is not needed."""
    first = 1 + _TENSORS
    ctx.save_for_backward(*inputs[1:first])
    ctx.sizes = inputs[first : first + 3]
    bias = inputs[-1] if len(inputs) > first + 3 else None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul4_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lora_kernels.matmul4_dx(dy, *ctx.saved_tensors, *ctx.sizes)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[-1]:
        rows = dy.reshape(-1, ctx.sizes[0])
        total = rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        dbias = total.to(ctx.bias_dtype)
    return (dx, *[None] * (_TENSORS + 3), dbias)


def _matmul4_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    ddy = None
    if ctx.needs_input_grad[0]:
        ddy = torch.ops.lora_kernels.matmul4(ddx, *ctx.saved_tensors, *ctx.sizes, None)
    return (ddy, *[None] * (_TENSORS + 3))


torch.library.register_fake("lora_kernels::matmul4", _fake)
torch.library.register_fake("lora_kernels::matmul4_dx", _fake_dx)
torch.library.register_autograd("lora_kernels::matmul4", _matmul4_backward, setup_context=_save)
torch.library.register_autograd(
    "lora_kernels::matmul4_dx", _matmul4_dx_backward, setup_context=_save
)
