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

On a GPU one of three routes is taken, by the number of rows (gpu/routes4.py), on a CPU one of two
(cpu/matmul4.py): few rows are multiplied straight from the codes, by W unrounded. Under activation
checkpointing what the recomputation expanded serves the gradient too (expansions.py).

Bytes moved by the reference, N x K weight: K N / 2 codes read, 2 K N written and read again as the
16-bit W. W is rounded once, from the float32 product of table entry and scale to the dtype of x.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, equations 5 and 6.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import backend_for, inside
from lora_kernels.expand4 import expand4
from lora_kernels.expansions import expanded, taken
from lora_kernels.operands import (
    SCHEMA,
    TENSORS,
    WIDTH,
    Weight4,
    autocast,
    check,
    flat,
    rows,
    unflat,
)

__all__ = ["arrange", "dx_reference", "matmul4", "matmul4_reference"]

BACKENDS = ("reference", "native", "triton")

torch.library.define("lora_kernels::matmul4", f"(Tensor x, {SCHEMA}, Tensor? bias) -> Tensor")
torch.library.define("lora_kernels::matmul4_dx", f"(Tensor dy, {SCHEMA}) -> Tensor")


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
    check(x, weight, bias)
    return torch.ops.lora_kernels.matmul4(autocast(x), *flat(weight), bias)


def arrange(weight: Weight4) -> Tensor | None:
    """What `Weight4.arranged` takes: a copy of the codes in the order in which tensor cores read.

    The copy saves the kernel for the fewest rows some loads. It costs as many bytes again as the
    codes, and `lora_kernels.gpu.arrange4.restore` gives the codes back from it.

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
    return torch.nn.functional.linear(x, expanded(weight, x.dtype), bias)


def dx_reference(dy: Tensor, weight: Weight4) -> Tensor:
    """The definition of `dy W`: expand W in the dtype of dy and multiply.

    Args:
        dy: (..., N), floating-point.
        weight: codes and scales of W (N, K).

    Returns:
        (..., K) in the dtype of dy.
    """
    kept = taken(weight, dy.dtype)
    return dy @ (expand4(weight, dy.dtype) if kept is None else kept)


def _matmul4_native(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    from lora_kernels.cpu import matmul4 as cpu

    return cpu.multiply(rows(x), weight, bias).view(*x.shape[:-1], weight.out_features)


def _dx_native(dy: Tensor, weight: Weight4) -> Tensor:
    from lora_kernels.cpu import matmul4 as cpu

    return cpu.multiply_dx(rows(dy), weight).view(*dy.shape[:-1], weight.in_features)


def _matmul4_triton(x: Tensor, weight: Weight4, bias: Tensor | None) -> Tensor:
    from lora_kernels.gpu import routes4

    return routes4.multiply(rows(x), weight, bias).view(*x.shape[:-1], weight.out_features)


def _dx_triton(dy: Tensor, weight: Weight4) -> Tensor:
    from lora_kernels.gpu import routes4

    return routes4.multiply_dx(rows(dy), weight).view(*dy.shape[:-1], weight.in_features)


@torch.library.impl("lora_kernels::matmul4", "default")
def _matmul4(x: Tensor, *args: Any) -> Tensor:
    offered = {
        "reference": matmul4_reference,
        "native": _matmul4_native,
        "triton": _matmul4_triton,
    }
    run = offered[backend_for(x, BACKENDS)]
    # the caller's cast is the only one
    with inside(x):
        return run(x, unflat(args[:-1]), args[-1])


@torch.library.impl("lora_kernels::matmul4_dx", "default")
def _matmul4_dx(dy: Tensor, *args: Any) -> Tensor:
    offered = {"reference": dx_reference, "native": _dx_native, "triton": _dx_triton}
    run = offered[backend_for(dy, BACKENDS)]
    with inside(dy):
        return run(dy, unflat(args))


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[TENSORS]))


def _fake_dx(dy: Tensor, *args: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], args[TENSORS + 1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight as it is stored; x is not needed."""
    weight = inputs[1 : 1 + WIDTH]
    ctx.save_for_backward(*weight[:TENSORS])
    ctx.sizes = weight[TENSORS:]
    bias = inputs[-1] if len(inputs) > 1 + WIDTH else None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul4_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lora_kernels.matmul4_dx(dy, *ctx.saved_tensors, *ctx.sizes)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[-1]:
        total = rows(dy).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        dbias = total.to(ctx.bias_dtype)
    return (dx, *[None] * WIDTH, dbias)


def _matmul4_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    ddy = None
    if ctx.needs_input_grad[0]:
        ddy = torch.ops.lora_kernels.matmul4(ddx, *ctx.saved_tensors, *ctx.sizes, None)
    return (ddy, *[None] * WIDTH)


torch.library.register_fake("lora_kernels::matmul4", _fake)
torch.library.register_fake("lora_kernels::matmul4_dx", _fake_dx)
torch.library.register_autograd("lora_kernels::matmul4", _matmul4_backward, setup_context=_save)
torch.library.register_autograd(
    "lora_kernels::matmul4_dx", _matmul4_dx_backward, setup_context=_save
)
