"""A 4-bit product with LoRA in it: `y = x Wᵀ + b + s (x Aᵀ) Bᵀ`, by one adapter or by many.

Why one operator: beside a frozen product, LoRA is two small products and a sum, which written out
read x twice, write and read the (rows, N) output three more times and round it as often. Here, in a
product with few rows, A is r more columns of W: x is read once, y is rounded once, and nothing is
launched for the adapter (gpu/finish4.py). With many rows the vendor's product is followed by
kernels that read x once and y once (gpu/lora4.py). On a CPU the low-rank part is plain PyTorch
beside the product in C.

Rows that each name their own adapter, as in a server's batch or in the training of several adapters
at a time, are the same operator: A and B are stacked, (L, r, K) and (L, N, r), and `rows` holds an
index for every row of x, -1 for none.

The gradient is one operator too, `dx = dy W + …`, which adds the low-rank part (low_rank.py) into
the base's while that is in the cache. Saved are x and what exists anyway: codes, scales, A, B and a
seed of 8 bytes. Neither W nor h = x Aᵀ nor a 16-bit copy of A or B nor a dropout mask is: layers
that share their input save one x and nothing else. The price is that backward computes h again,
2 M K r operations for M rows of x beside the 2 M N K of dy W. Second and higher derivatives are
taken through plain PyTorch around `matmul4`.

Dropout acts on the update's x alone, so that a product with few rows no longer has A among its
columns: it takes the two steps of many rows.

PEFT runs base and adapter as separate modules and, for a mixed batch, loops over the adapters of
the batch with an index of rows for each, which waits for the device; for inference alone.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1; Chen et al. 2023, Punica, arXiv:2310.18547, for
rows that name their adapter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_kernels import low_rank as part
from lora_kernels.dispatch import backend_for, inside, requested
from lora_kernels.dropout import drop_rows
from lora_kernels.low_rank import HALF, LowRank
from lora_kernels.matmul4 import dx_reference, matmul4, matmul4_reference
from lora_kernels.operands import (
    SCHEMA,
    TENSORS,
    WIDTH,
    Weight4,
    autocast,
    check,
    flat,
    unflat,
    wide,
)
from lora_kernels.operands import rows as flatten

__all__ = ["lora_linear4", "lora_linear4_reference", "row_dtypes"]

BACKENDS = ("reference", "native", "triton")
FUSED_COLUMNS = 512  # of all adapters; more would be a second matrix beside W, read by every row

torch.library.define(
    "lora_kernels::lora_linear4", f"(Tensor x, {SCHEMA}, Tensor? bias, {part.SCHEMA}) -> Tensor"
)
torch.library.define(
    "lora_kernels::lora_linear4_backward",
    f"(Tensor dy, Tensor x, {SCHEMA}, {part.SCHEMA}, bool wants_dx, bool wants_update)"
    " -> (Tensor, Tensor, Tensor)",
)


def lora_linear4(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float | Tensor,
    rows: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Multiply by a 4-bit weight and add LoRA: `y = x Wᵀ + bias + s (D(x) Aᵀ) Bᵀ`.

    With B = 0 the result is that of `matmul4`, bit for bit.

    Args:
        x: (..., K), floating-point. Under autocast it is cast first, as `nn.Linear` does.
        weight: the codes and scales of W (N, K); takes no gradient.
        bias: (N,) or None; cast to the dtype of x.
        down: A, (r, K), or (L, r, K) for L adapters; best in float32, in which it is read.
        up: B, (N, r) or (L, N, r).
        scaling: s, a number for all adapters or (L,); takes no gradient.
        rows: which adapter each row of x takes, 0 ... L-1 or -1 for none: integers of x's leading
            shape, or one a sequence, (B,) for x (B, T, K). None: all take the only one. Values are
            checked on a CPU; on a GPU the check would wait for it, and a row beyond L takes none.
        dropout: p, the probability of dropping an element of the update's x, to a multiple of
            2^-16; the others count 1 / (1 - p) times.
        seed: int64 (1,) that decides which; None: one is drawn from torch's generator of x's
            device.

    Returns:
        (..., N) in the dtype of x (autocast's when active), differentiable in x, bias, down and up;
        gradients of down and up come in their own dtype.

    Raises:
        TypeError: x is not floating-point, rows are not integers.
        ValueError: shapes or devices that do not fit, an index without an adapter, scaling that
            requires a gradient, dropout out of range, or a forced backend that cannot run.
    """
    check(x, weight, bias)
    x = autocast(x)
    size = (weight.out_features, weight.in_features)
    lora = part.low_rank(x, size, down, up, scaling, rows, dropout, seed)
    return torch.ops.lora_kernels.lora_linear4(x, *flat(weight), bias, *lora)


def row_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """In which dtypes rows that name their adapters are one kernel; else adapters take turns.

    Args:
        device: of x.

    Returns:
        Dtypes of x; none where there is no such kernel.
    """
    if requested() in ("reference", "native"):
        return ()
    # no look for C, which torch.compile could not trace
    probe = torch.empty(0, device=device)
    return HALF if backend_for(probe, ("reference", "triton")) == "triton" else ()


# --- the definition ------------------------------------------------------------------------------


def lora_linear4_reference(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: Tensor,
    rows: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition, in differentiable PyTorch.

    Args:
        x: (..., K), floating-point.
        weight: codes and scales of W (N, K).
        bias: (N,) or None.
        down: A, (L, r, K).
        up: B, (L, N, r).
        scaling: s, (L,).
        rows: int32 (M,) for the M rows of x, or None.
        dropout: p.
        seed: int64 (1,), or None: nothing is dropped.

    Returns:
        (..., N) in the dtype of x.
    """
    lora = LowRank(rows, down, up, scaling, seed, dropout)
    y = part.add(matmul4_reference(flatten(x), weight, bias), part.update(flatten(x), lora))
    return y.view(*x.shape[:-1], weight.out_features)


# --- Triton --------------------------------------------------------------------------------------


def _forward_triton(x: Tensor, weight: Weight4, bias: Tensor | None, lora: LowRank) -> Tensor:
    from lora_kernels.gpu import low_rank, routes4

    if x.dtype not in HALF:
        return part.add(routes4.multiply(x, weight, bias), part.update(x, lora, drop_rows))
    way = routes4.route(len(x), weight, x.dtype, x.device)
    width = len(lora.down) * lora.down.shape[1]
    if way != "dense" and width <= FUSED_COLUMNS and len(x) and lora.seed is None:
        return routes4.fused_multiply(way, x, weight, bias, low_rank.as_update(lora))[0]
    return low_rank.add_update(routes4.multiply(x, weight, bias), x, lora, in_place=True)


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Weight4, lora: LowRank, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor]:
    from lora_kernels.gpu import low_rank, routes4

    if dy.dtype not in HALF:
        return _backward_plain(dy, x, weight, lora, wants, routes4.multiply_dx)
    dx = routes4.multiply_dx(dy, weight) if wants[0] else None
    return low_rank.gradients(dy, x, lora, wants, dx)


# --- elsewhere -----------------------------------------------------------------------------------


def _backward_plain(
    dy: Tensor,
    x: Tensor,
    weight: Weight4,
    lora: LowRank,
    wants: tuple[bool, bool],
    multiply_dx: Callable[[Tensor, Weight4], Tensor],
) -> tuple[Tensor | None, Tensor, Tensor]:
    dx, ddown, dup = part.gradients(dy, x, lora, wants, drop_rows)
    return None if dx is None else dx.add_(multiply_dx(dy, weight)), ddown, dup


# --- the operators -------------------------------------------------------------------------------


@torch.library.impl("lora_kernels::lora_linear4", "default")
def _lora_linear4(x: Tensor, *args: Any) -> Tensor:
    weight, bias, lora = unflat(args[:WIDTH]), args[WIDTH], LowRank(*args[WIDTH + 1 :])
    part.check_values(lora)
    backend, x_rows = backend_for(x, BACKENDS), flatten(x)
    with inside(x):
        if backend == "triton":
            y = _forward_triton(x_rows, weight, bias, lora)
        else:
            y = _products(backend)[0](x_rows, weight, bias)
            y = part.add(y, part.update(x_rows, lora, drop_rows))
    return y.view(*x.shape[:-1], weight.out_features)


@torch.library.impl("lora_kernels::lora_linear4_backward", "default")
def _lora_linear4_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, lora = unflat(args[:WIDTH]), LowRank(*args[WIDTH:-2])
    wants, backend = (args[-2], args[-1]), backend_for(dy, BACKENDS)
    both = flatten(dy), flatten(x)
    with inside(dy):
        if backend == "triton":
            dx, ddown, dup = _backward_triton(*both, weight, lora, wants)
        else:
            dx, ddown, dup = _backward_plain(*both, weight, lora, wants, _products(backend)[1])
    return x.new_empty(0) if dx is None else dx.view(x.shape), ddown, dup


def _products(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`x Wᵀ + b` and `dy W` of a backend that adds LoRA in plain PyTorch."""
    if backend == "native":
        from lora_kernels.cpu import matmul4 as cpu

        return cpu.multiply, cpu.multiply_dx
    return matmul4_reference, dx_reference


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], args[TENSORS]))


def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return part.fake_gradients(x, args)


# --- derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what exists anyway, and x if A or B is trained."""
    x, weight, bias, lora = inputs[0], inputs[1 : 1 + WIDTH], inputs[1 + WIDTH], inputs[2 + WIDTH :]
    x = x if any(ctx.needs_input_grad[3 + WIDTH : 5 + WIDTH]) else part.unread(x)
    ctx.save_for_backward(x, *weight[:TENSORS], *lora[:-1])
    ctx.sizes, ctx.dropout = weight[TENSORS:], lora[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    weight, lora = (*rest[:TENSORS], *ctx.sizes), (*rest[TENSORS:], ctx.dropout)
    wants_dx, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1 + WIDTH]
    wants_update = any(ctx.needs_input_grad[3 + WIDTH : 5 + WIDTH])
    dbias = None
    dx, ddown, dup = torch.ops.lora_kernels.lora_linear4_backward(
        dy, x, *weight, *lora, wants_dx, wants_update
    )
    if ctx.bias_dtype is not None and wants_bias:
        dbias = flatten(dy).sum(0, dtype=wide(dy.dtype)).to(ctx.bias_dtype)
    given = (dx if wants_dx else None, *[None] * WIDTH, dbias, None)
    return (*given, *((ddown, dup) if wants_update else (None, None)), None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, lora = *inputs[:2], inputs[2 : 2 + WIDTH], inputs[2 + WIDTH : -2]
    ctx.save_for_backward(dy, x, *weight[:TENSORS], *lora[:-1])
    ctx.sizes, ctx.dropout, ctx.wants = weight[TENSORS:], lora[-1], inputs[-2:]
    ctx.set_materialize_grads(False)


def _second(
    ctx: Any, gx: Tensor | None, ga: Tensor | None, gb: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradient of `<gx, dx> + <ga, dA> + <gb, dB>`, every step differentiable again."""
    dy, x, *rest = ctx.saved_tensors
    weight = unflat((*rest[:TENSORS], *ctx.sizes))
    lora = LowRank._make((*rest[TENSORS:], ctx.dropout))
    gx = flatten(gx) if gx is not None and ctx.wants[0] else None
    ga, gb = (ga, gb) if ctx.wants[1] else (None, None)
    with torch.autocast(x.device.type, enabled=False):
        d_dy, d_x, d_down, d_up = part.second(flatten(dy), flatten(x), lora, gx, ga, gb)
        if gx is not None:
            d_dy = d_dy + matmul4(gx, weight)
    given = (d_dy.view(dy.shape), d_x.view(x.shape), *[None] * (WIDTH + 1), d_down, d_up)
    return (*given, *[None] * 5)


for _name, _fake_kernel, _gradient, _setup in (
    ("lora_linear4", _fake, _backward, _save),
    ("lora_linear4_backward", _fake_backward, _second, _save_backward),
):
    torch.library.register_fake(f"lora_kernels::{_name}", _fake_kernel)
    torch.library.register_autograd(f"lora_kernels::{_name}", _gradient, setup_context=_setup)
