"""LoRA beside any linear-like layer, as one operator: `y + s (D(x) Aᵀ) Bᵀ`.

For a base whose product is not our own (`nn.Linear`, a user's layer). Written out in PyTorch, the
update keeps for backward x, 16-bit casts of A and B, x Aᵀ and, with dropout, a mask and the dropped
copy of x: under autocast and with dropout nine times x for three layers that share it. The operator
keeps x, which is the same tensor in all of them, the parameters and 8 bytes of seed (low_rank.py).
In bytes, for M rows of a 16-bit x and n layers that share it,

    written out  n (2 M K + 2 M r + 2 (K + N) r), with dropout 3 n M K more      here  2 M K + 8 n

On a GPU it is two kernels forward and five backward, each of which goes once through a tensor as
large as x or y (gpu/lora4.py); elsewhere plain PyTorch. PEFT writes it out in three modules and a
product.

The price: backward computes x Aᵀ again, r columns beside the N of the base's own product.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels import low_rank as part
from lora_kernels.dispatch import backend_for, inside
from lora_kernels.dropout import drop_rows
from lora_kernels.low_rank import HALF, SCHEMA, WIDTH, LowRank
from lora_kernels.operands import autocast
from lora_kernels.operands import rows as flatten

__all__ = ["lora_update", "lora_update_reference"]

BACKENDS = ("reference", "native", "triton")

torch.library.define("lora_kernels::lora_update", f"(Tensor? y, Tensor x, {SCHEMA}) -> Tensor")
torch.library.define(
    "lora_kernels::lora_update_backward",
    f"(Tensor dy, Tensor x, {SCHEMA}, bool wants_dx, bool wants_update)"
    " -> (Tensor, Tensor, Tensor)",
)


def lora_update(
    y: Tensor | None,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float | Tensor,
    rows: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Add LoRA to a layer's output: `y + s (D(x) Aᵀ) Bᵀ`.

    With B = 0 the result is y, bit for bit.

    Args:
        y: (..., N), the layer's output; None: 0.
        x: (..., K), its input, floating-point. Under autocast it is cast first, as `nn.Linear`
            does; what is computed in is the dtype of x after that.
        down: A, (r, K), or (L, r, K) for L adapters; best in float32, in which it is read.
        up: B, (N, r) or (L, N, r).
        scaling: s, a number for all adapters or (L,); takes no gradient.
        rows: which adapter each row of x takes, as `lora_linear4`'s.
        dropout: p, the probability of dropping an element of x, to a multiple of 2^-16; the others
            count 1 / (1 - p) times.
        seed: int64 (1,) that decides which; None: one is drawn from torch's generator of x's
            device.

    Returns:
        (..., N) in the dtype of y (without y: of the computation), differentiable in y, x, down and
        up; gradients of down and up come in their own dtype.

    Raises:
        TypeError: x is not floating-point, rows are not integers.
        ValueError: shapes or devices that do not fit, an index without an adapter, scaling that
            requires a gradient, dropout out of range, or a forced backend that cannot run.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point; got {x.dtype}")
    k, n = down.shape[-1] if down.dim() else 0, up.shape[-2] if up.dim() > 1 else 0
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must end in the {k} columns of down; got shape {tuple(x.shape)}")
    if y is not None and y.shape != (*x.shape[:-1], n):
        raise ValueError(f"y must be {(*x.shape[:-1], n)} for this x and up; got {tuple(y.shape)}")
    x = autocast(x)
    lora = part.low_rank(x, (n, k), down, up, scaling, rows, dropout, seed)
    # torch.func goes through what PyTorch knows: operators with a gradient have no rule for vmap
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return lora_update_reference(y, x, lora)
    return torch.ops.lora_kernels.lora_update(y, x, *lora)


def lora_update_reference(y: Tensor | None, x: Tensor, lora: LowRank) -> Tensor:
    """The definition, in differentiable PyTorch.

    Args:
        y: (..., N), or None.
        x: (..., K).
        lora: the low-rank part.

    Returns:
        (..., N) in the dtype of y, without y of x.
    """
    change = part.update(flatten(x), lora).view(*x.shape[:-1], lora.up.shape[1])
    return change if y is None else part.add(y, change.to(y.dtype))


# --- the operators -------------------------------------------------------------------------------


@torch.library.impl("lora_kernels::lora_update", "default")
def _lora_update(y: Tensor | None, x: Tensor, *args: Any) -> Tensor:
    lora, backend = LowRank(*args), backend_for(x, BACKENDS)
    part.check_values(lora)
    n = lora.up.shape[1]
    with inside(x):
        if backend != "triton" or x.dtype not in HALF:
            change = part.update(flatten(x), lora, drop_rows)
        else:
            from lora_kernels.gpu import low_rank as gpu

            if y is not None and y.dtype == x.dtype:
                y_rows = flatten(y).contiguous()
                z = gpu.add_update(y_rows, flatten(x), lora, in_place=False)
                return z.view(y.shape)
            change = gpu.update(flatten(x), lora)
        change = change.view(*x.shape[:-1], n)
        # without gaps, whatever the layout of y: so a compiler has been told
        return change if y is None else part.add(y, change.to(y.dtype)).contiguous()


@torch.library.impl("lora_kernels::lora_update_backward", "default")
def _lora_update_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    lora, wants = LowRank(*args[:WIDTH]), (args[-2], args[-1])
    dy_rows, x_rows = flatten(dy), flatten(x)
    with inside(x):
        if backend_for(x, BACKENDS) == "triton" and x.dtype in HALF:
            from lora_kernels.gpu import low_rank as gpu

            dx, ddown, dup = gpu.gradients(dy_rows, x_rows, lora, wants)
        else:
            dx, ddown, dup = part.gradients(dy_rows, x_rows, lora, wants, drop_rows)
    return x.new_empty(0) if dx is None else dx.view(x.shape), ddown, dup


def _fake(y: Tensor | None, x: Tensor, *args: Any) -> Tensor:
    like = x if y is None else y
    return like.new_empty((*x.shape[:-1], args[2].shape[1]))


def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return part.fake_gradients(x, args)


# --- derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what exists anyway, and x if A or B is trained."""
    _, x, *lora = inputs
    x = x if any(ctx.needs_input_grad[3:5]) else part.unread(x)
    ctx.save_for_backward(x, *lora[: WIDTH - 1])
    ctx.dropout = lora[-1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, *lora = ctx.saved_tensors
    wants_y, wants_dx = ctx.needs_input_grad[:2]
    wants_update = any(ctx.needs_input_grad[3:5])
    dx = ddown = dup = None
    if wants_dx or wants_update:
        dx, ddown, dup = torch.ops.lora_kernels.lora_update_backward(
            dy.to(x.dtype), x, *lora, ctx.dropout, wants_dx, wants_update
        )
    given = (dy if wants_y else None, dx if wants_dx else None, None)
    return (*given, *((ddown, dup) if wants_update else (None, None)), None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, *lora = inputs[:-2]
    ctx.save_for_backward(dy, x, *lora[: WIDTH - 1])
    ctx.dropout, ctx.wants = lora[-1], inputs[-2:]
    ctx.set_materialize_grads(False)


def _second(
    ctx: Any, gx: Tensor | None, ga: Tensor | None, gb: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Second and higher derivatives are taken through plain PyTorch."""
    dy, x, *lora = ctx.saved_tensors
    gx = flatten(gx) if gx is not None and ctx.wants[0] else None
    ga, gb = (ga, gb) if ctx.wants[1] else (None, None)
    with torch.autocast(x.device.type, enabled=False):
        pair = LowRank._make((*lora, ctx.dropout))
        d_dy, d_x, d_down, d_up = part.second(flatten(dy), flatten(x), pair, gx, ga, gb)
    given = (d_dy.view(dy.shape), d_x.view(x.shape), None, d_down, d_up)
    return (*given, *[None] * 5)


for _name, _fake_kernel, _gradient, _setup in (
    ("lora_update", _fake, _backward, _save),
    ("lora_update_backward", _fake_backward, _second, _save_backward),
):
    torch.library.register_fake(f"lora_kernels::{_name}", _fake_kernel)
    torch.library.register_autograd(f"lora_kernels::{_name}", _gradient, setup_context=_setup)
