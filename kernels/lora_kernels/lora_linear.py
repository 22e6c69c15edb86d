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

The gradient is one operator too, with h = x Aᵀ (rows, r) handed from forward to backward:

    dh = s dy B      dx = dy W + dh A      dA = dhᵀ x      dB = s dyᵀ h      (each row by its own)

Saved are x, h and what exists anyway: codes, scales, A and B. Neither W nor a 16-bit copy of A or
B is. Second and higher derivatives are taken through plain PyTorch around `matmul4`.

PEFT runs base and adapter as separate modules and, for a mixed batch, loops over the adapters of
the batch with an index of rows for each, which waits for the device; for inference alone.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1; Chen et al. 2023, Punica, arXiv:2310.18547, for
rows that name their adapter.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.dispatch import backend_for, device_of, requested
from lora_kernels.matmul4 import dx_reference, matmul4, matmul4_reference
from lora_kernels.operands import SCHEMA, TENSORS, WIDTH, Weight4, autocast, check, flat, unflat
from lora_kernels.operands import rows as flatten

__all__ = ["lora_linear4", "lora_linear4_reference", "row_dtypes"]

BACKENDS = ("reference", "native", "triton")
HALF = (torch.bfloat16, torch.float16)
FUSED_COLUMNS = 512  # of all adapters; more would be a second matrix beside W, read by every row

_LORA = "Tensor? rows, Tensor down, Tensor up, Tensor scaling"
torch.library.define(
    "lora_kernels::lora_linear4",
    f"(Tensor x, {SCHEMA}, Tensor? bias, {_LORA}) -> (Tensor, Tensor)",
)
torch.library.define(
    "lora_kernels::lora_linear4_backward",
    f"(Tensor dy, Tensor x, Tensor h, {SCHEMA}, {_LORA}, bool wants_dx, bool wants_update)"
    " -> (Tensor, Tensor, Tensor)",
)


class _Lora(NamedTuple):
    """The low-rank part in the order of the schema."""

    rows: Tensor | None  # int32 (M,)
    down: Tensor  # (L, r, K)
    up: Tensor  # (L, N, r)
    scaling: Tensor  # (L,)


def lora_linear4(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float | Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Multiply by a 4-bit weight and add LoRA: `y = x Wᵀ + bias + s (x Aᵀ) Bᵀ`.

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

    Returns:
        (..., N) in the dtype of x (autocast's when active), differentiable in x, bias, down and up;
        gradients of down and up come in their own dtype.

    Raises:
        TypeError: x is not floating-point, rows are not integers.
        ValueError: shapes or devices that do not fit, an index without an adapter, scaling that
            requires a gradient, or a forced backend that cannot run.
    """
    check(x, weight, bias)
    x = autocast(x)
    if down.dim() == 2 and up.dim() == 2:
        down, up = down[None], up[None]
    if not isinstance(scaling, Tensor):
        dtype = torch.promote_types(up.dtype, torch.float32)
        scaling = torch.full((len(down),), scaling, dtype=dtype, device=x.device)
    _check_lora(weight, down, up, scaling)
    index = _index(rows, x, len(down))
    return torch.ops.lora_kernels.lora_linear4(
        x, *flat(weight), bias, index, down, up, scaling.reshape(-1)
    )[0]


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


def _check_lora(weight: Weight4, down: Tensor, up: Tensor, scaling: Tensor) -> None:
    n, k = weight.out_features, weight.in_features
    adapters, r = (len(down), down.shape[-2]) if down.dim() == 3 else (0, 0)
    if adapters == 0 or r == 0 or down.shape != (adapters, r, k) or up.shape != (adapters, n, r):
        raise ValueError(
            f"down and up must be (L, r, {k}) and (L, {n}, r), or (r, {k}) and ({n}, r); "
            f"got {tuple(down.shape)} and {tuple(up.shape)}"
        )
    if scaling.numel() != adapters:
        raise ValueError(f"scaling must be ({adapters},); got {tuple(scaling.shape)}")
    if scaling.requires_grad:
        raise ValueError("scaling takes no gradient; multiply up by it to train it")


def _index(rows: Tensor | None, x: Tensor, adapters: int) -> Tensor | None:
    """`rows` as int32 (M,)."""
    lead = x.shape[:-1]
    if rows is None:
        if adapters != 1:
            raise ValueError(f"rows must say which of the {adapters} adapters each row takes")
        return None
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"rows must be integers; got {rows.dtype}")
    if rows.device != x.device:
        raise ValueError(f"rows must be on the device of x, {x.device}; got {rows.device}")
    if rows.shape == lead:
        return rows.reshape(-1).to(torch.int32)
    if len(lead) > 1 and rows.shape == lead[:1]:
        each = rows.view(-1, *[1] * (len(lead) - 1)).expand(lead)
        return each.reshape(-1).to(torch.int32)
    raise ValueError(f"rows must be {tuple(lead)}, or {tuple(lead[:1])}; got {tuple(rows.shape)}")


# --- the definition ------------------------------------------------------------------------------


def lora_linear4_reference(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: Tensor,
    rows: Tensor | None = None,
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

    Returns:
        (..., N) in the dtype of x.
    """
    lora = _Lora(rows, down, up, scaling)
    y, _ = _forward_plain(flatten(x), weight, bias, lora, matmul4_reference)
    return y.view(*x.shape[:-1], weight.out_features)


def _forward_plain(
    x: Tensor,
    weight: Weight4,
    bias: Tensor | None,
    lora: _Lora,
    multiply: Callable[[Tensor, Weight4, Tensor | None], Tensor],
) -> tuple[Tensor, Tensor]:
    y = multiply(x, weight, bias)
    h = _times(x, lora.down, lora.rows)  # (M, r)
    update = _times(h, _scaled_up(lora), lora.rows)  # (M, N)
    # y + update, but with the sign of a zero y kept under an update of zero
    return y - (0.0 - update), h.to(_wide(x.dtype))


def _backward_plain(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Weight4,
    lora: _Lora,
    wants: tuple[bool, bool],
    multiply_dx: Callable[[Tensor, Weight4], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    adapters, dtype = len(lora.down), dy.dtype
    dh = _times(dy, _scaled_up(lora).transpose(1, 2), lora.rows)  # (M, r)
    dx, ddown, dup = x.new_empty(0), lora.down.new_empty(0), lora.up.new_empty(0)
    if wants[0]:
        dx = multiply_dx(dy, weight) + _times(dh, lora.down.transpose(1, 2), lora.rows)
    if wants[1]:
        ddown = _outer(dh, x, lora.rows, adapters).to(lora.down.dtype)
        dup = _outer(dy, h.to(dtype), lora.rows, adapters).to(lora.up.dtype)
        dup = dup * lora.scaling.to(dup.dtype)[:, None, None]
    return dx, ddown, dup


def _times(x: Tensor, mats: Tensor, rows: Tensor | None) -> Tensor:
    """`x_i M^T` with the matrix of row i, x (M, D) and mats (L, E, D) to (M, E); 0 without one."""
    mats = mats.to(x.dtype)
    if rows is None:
        return F.linear(x, mats[0])
    out = x.new_zeros(len(x), mats.shape[1])
    for i, mat in enumerate(mats):
        out = torch.where((rows == i)[:, None], F.linear(x, mat), out)
    return out


def _outer(u: Tensor, v: Tensor, rows: Tensor | None, adapters: int) -> Tensor:
    """`sum of u_i^T v_i` over the rows of each adapter: (M, D) and (M, E) to (L, D, E)."""
    if rows is None:
        return (u.t() @ v)[None]
    chosen = [(rows == i)[:, None] for i in range(adapters)]
    return torch.stack([torch.where(c, u, 0).t() @ torch.where(c, v, 0) for c in chosen])


def _scaled_up(lora: _Lora) -> Tensor:
    return lora.up * lora.scaling[:, None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- Triton --------------------------------------------------------------------------------------


def _forward_triton(
    x: Tensor, weight: Weight4, bias: Tensor | None, lora: _Lora
) -> tuple[Tensor, Tensor]:
    from lora_kernels.gpu import lora4, routes4
    from lora_kernels.gpu.finish4 import Update

    if x.dtype not in HALF:
        return _forward_plain(x, weight, bias, lora, routes4.multiply)
    rows, down, up, scaling = _float32(lora)
    update = Update(down, up, scaling, rows)
    way = routes4.route(len(x), weight, x.dtype, x.device)
    if way != "dense" and update.width <= FUSED_COLUMNS and len(x):
        y, h = routes4.fused_multiply(way, x, weight, bias, update)
        assert h is not None
        return y, h
    y = routes4.multiply(x, weight, bias)
    h = lora4.shrink(x, down, rows)
    return lora4.add(y, h, up, rows, scaling, in_place=True), h


def _backward_triton(
    dy: Tensor, x: Tensor, h: Tensor, weight: Weight4, lora: _Lora, wants: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    from lora_kernels.gpu import lora4, routes4

    if dy.dtype not in HALF:
        return _backward_plain(dy, x, h, weight, lora, wants, routes4.multiply_dx)
    rows, down, up, scaling = _float32(lora)
    adapters = len(down)
    dx, ddown, dup = x.new_empty(0), lora.down.new_empty(0), lora.up.new_empty(0)
    dh = lora4.shrink(dy, up.transpose(1, 2), rows, scaling)  # (M, r)
    if wants[0]:
        dx = routes4.multiply_dx(dy, weight)
        dx = lora4.add(dx, dh, down.transpose(1, 2), rows, in_place=True)
    if wants[1]:
        ddown = lora4.outer(dh, x, rows, adapters).to(lora.down.dtype)
        dup = lora4.outer(h, dy, rows, adapters, scaling, transposed=True).to(lora.up.dtype)
    return dx, ddown, dup


def _float32(lora: _Lora) -> _Lora:
    """What the kernels read; parameters are float32 and contiguous, so nothing is copied."""
    down, up, scaling = (t.float().contiguous() for t in lora[1:])
    rows = None if lora.rows is None else lora.rows.contiguous()
    return _Lora(rows, down, up, scaling)


# --- the operators -------------------------------------------------------------------------------


@torch.library.impl("lora_kernels::lora_linear4", "default")
def _lora_linear4(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias, lora = unflat(args[:WIDTH]), args[WIDTH], _Lora(*args[WIDTH + 1 :])
    _check_values(lora)
    backend, x_rows = backend_for(x, BACKENDS), flatten(x)
    with torch.autocast(x.device.type, enabled=False), device_of(x):
        if backend == "triton":
            y, h = _forward_triton(x_rows, weight, bias, lora)
        else:
            y, h = _forward_plain(x_rows, weight, bias, lora, _products(backend)[0])
    return y.view(*x.shape[:-1], weight.out_features), h


@torch.library.impl("lora_kernels::lora_linear4_backward", "default")
def _lora_linear4_backward(
    dy: Tensor, x: Tensor, h: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weight, lora = unflat(args[:WIDTH]), _Lora(*args[WIDTH:-2])
    wants, backend = (args[-2], args[-1]), backend_for(dy, BACKENDS)
    both = flatten(dy), flatten(x)
    with torch.autocast(dy.device.type, enabled=False), device_of(dy):
        if backend == "triton":
            dx, ddown, dup = _backward_triton(*both, h, weight, lora, wants)
        else:
            dx, ddown, dup = _backward_plain(*both, h, weight, lora, wants, _products(backend)[1])
    return dx.view(x.shape) if wants[0] else dx, ddown, dup


def _products(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`x Wᵀ + b` and `dy W` of a backend that adds LoRA in plain PyTorch."""
    if backend == "native":
        from lora_kernels.cpu import matmul4 as cpu

        return cpu.multiply, cpu.multiply_dx
    return matmul4_reference, dx_reference


def _check_values(lora: _Lora) -> None:
    rows, adapters = lora.rows, len(lora.down)
    if rows is None or rows.device.type != "cpu" or not rows.numel():
        return
    least, most = int(rows.min()), int(rows.max())
    if least < -1 or most >= adapters:
        wrong = least if least < -1 else most
        raise ValueError(
            f"rows must lie in -1 ... {adapters - 1} for {adapters} adapters; got {wrong}"
        )


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], args[TENSORS]))
    down = args[WIDTH + 2]
    return y, x.new_empty((math.prod(x.shape[:-1]), down.shape[1]), dtype=_wide(x.dtype))


def _fake_backward(dy: Tensor, x: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    down, up, _, wants_dx, wants_update = args[-5:]
    dx = x.new_empty(x.shape if wants_dx else 0)
    return (
        dx,
        down.new_empty(down.shape if wants_update else 0),
        up.new_empty(up.shape if wants_update else 0),
    )


# --- derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep x, h and what exists anyway."""
    x, weight, bias, lora = inputs[0], inputs[1 : 1 + WIDTH], inputs[1 + WIDTH], inputs[-4:]
    ctx.save_for_backward(x, output[1], *weight[:TENSORS], *lora)
    ctx.sizes = weight[TENSORS:]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h, *rest = ctx.saved_tensors
    weight, lora = (*rest[:TENSORS], *ctx.sizes), _Lora(*rest[TENSORS:])
    wants_dx, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1 + WIDTH]
    wants_update = any(ctx.needs_input_grad[-3:-1])
    dx = dbias = ddown = dup = None
    if dy is not None:
        dx, ddown, dup = torch.ops.lora_kernels.lora_linear4_backward(
            dy, x, h, *weight, *lora, wants_dx, wants_update
        )
        if ctx.bias_dtype is not None and wants_bias:
            total = flatten(dy).sum(0, dtype=_wide(dy.dtype))
            dbias = total.to(ctx.bias_dtype)
    if dh is not None:  # of a second derivative: h = x A^T was an argument of the gradient
        dx, ddown = _add_through_h(dx, ddown, dh.to(x.dtype), x, lora)
    given = (dx if wants_dx else None, *[None] * WIDTH, dbias, None)
    return (*given, *((ddown, dup) if wants_update else (None, None)), None)


def _add_through_h(
    dx: Tensor | None, ddown: Tensor | None, dh: Tensor, x: Tensor, lora: _Lora
) -> tuple[Tensor, Tensor]:
    more = _times(dh, lora.down.transpose(1, 2), lora.rows).view(x.shape)
    down = _outer(dh, flatten(x), lora.rows, len(lora.down)).to(lora.down.dtype)
    dx = more if dx is None or not dx.numel() else dx + more
    return dx, down if ddown is None or not ddown.numel() else ddown + down


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, h = inputs[:3]
    weight, lora = inputs[3 : 3 + WIDTH], inputs[3 + WIDTH : -2]
    ctx.save_for_backward(dy, x, h, *weight[:TENSORS], *lora)
    ctx.sizes, ctx.wants = weight[TENSORS:], inputs[-2:]
    ctx.set_materialize_grads(False)


def _second(
    ctx: Any, gx: Tensor | None, ga: Tensor | None, gb: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradient of `<gx, dx> + <ga, dA> + <gb, dB>`, every step differentiable again."""
    dy, x, h, *rest = ctx.saved_tensors
    weight, lora = unflat((*rest[:TENSORS], *ctx.sizes)), _Lora(*rest[TENSORS:])
    gx = gx if ctx.wants[0] else None
    ga, gb = (ga, gb) if ctx.wants[1] else (None, None)
    with torch.autocast(x.device.type, enabled=False):
        grads = _second_plain(dy, x, h, weight, lora, gx, ga, gb)
    d_dy, d_x, d_h, d_down, d_up = grads
    return (d_dy.view(dy.shape), d_x.view(x.shape), d_h, *[None] * (WIDTH + 1), d_down, d_up) + (
        None,
    ) * 3


def _second_plain(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Weight4,
    lora: _Lora,
    gx: Tensor | None,
    ga: Tensor | None,
    gb: Tensor | None,
) -> tuple[Tensor, ...]:
    rows, adapters, dtype = lora.rows, len(lora.down), dy.dtype
    dy, x = flatten(dy), flatten(x)
    gx = torch.zeros_like(x) if gx is None else gx.reshape(x.shape)
    ga = torch.zeros_like(lora.down) if ga is None else ga
    gb = torch.zeros_like(lora.up) if gb is None else gb
    s = lora.scaling[:, None, None]
    up, gb = lora.up * s, gb * s
    dh = _times(dy, up.transpose(1, 2), rows)
    through = _times(gx, lora.down, rows) + _times(x, ga, rows)  # what dh gets
    d_dy = matmul4(gx, weight) + _times(through, up, rows) + _times(h.to(dtype), gb, rows)
    d_x = _times(dh, ga.transpose(1, 2), rows)
    d_h = _times(dy, gb.transpose(1, 2), rows).to(h.dtype)
    d_down = _outer(dh, gx, rows, adapters).to(lora.down.dtype)
    d_up = (_outer(dy, through, rows, adapters) * s).to(lora.up.dtype)
    return d_dy, d_x, d_h, d_down, d_up


for _name, _fake_kernel, _gradient, _setup in (
    ("lora_linear4", _fake, _backward, _save),
    ("lora_linear4_backward", _fake_backward, _second, _save_backward),
):
    torch.library.register_fake(f"lora_kernels::{_name}", _fake_kernel)
    torch.library.register_autograd(f"lora_kernels::{_name}", _gradient, setup_context=_setup)
