"""The low-rank part of LoRA, as the operators that have it take it and compute it.

    update = s f (D(x) Aᵀ) Bᵀ       D puts zeros in the place of dropped elements (dropout.py),
                                    f = 1 / (1 - p) makes up for them, 1 without dropout

    h = D(x) Aᵀ     dh = s f dy B     dx = D(dh A)     dA = dhᵀ D(x)     dB = s f dyᵀ h

Saved between forward and backward are x, A, B and a seed: x is the layer's input, which all layers
that share it save as the same tensor, A and B are parameters. Neither h nor casts of A and B nor a
mask is, nor x where A and B are frozen: dA and dB alone need it. Backward computes h again,
2 M K r operations for M rows beside the 2 M N K of dy W, and draws the mask again.

Each row of x may name its own adapter: A and B are then stacks, and `rows` an index.

Here are the argument list, its checks, and the definition in PyTorch; kernels are in gpu/lora4.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.dropout import check_dropout, draw_seed, drop, drop_reference, kept_scale

__all__ = [
    "HALF",
    "SCHEMA",
    "WIDTH",
    "LowRank",
    "add",
    "check_values",
    "fake_gradients",
    "gradients",
    "low_rank",
    "outer",
    "scaled_up",
    "second",
    "times",
    "unread",
    "update",
]

HALF = (torch.bfloat16, torch.float16)
SCHEMA = "Tensor? rows, Tensor down, Tensor up, Tensor scaling, Tensor? seed, float dropout"
WIDTH = 6  # arguments that are the low-rank part
Drop = Callable[[Tensor, Tensor, float], Tensor]


class LowRank(NamedTuple):
    """The low-rank part in the order of the schema.

    Attributes:
        rows: int32 (M,), which adapter each row takes, -1 for none; None: all take the only one.
        down: A, (L, r, K).
        up: B, (L, N, r).
        scaling: s, (L,).
        seed: int64 (1,), or None: nothing is dropped.
        dropout: p.
    """

    rows: Tensor | None
    down: Tensor
    up: Tensor
    scaling: Tensor
    seed: Tensor | None = None
    dropout: float = 0.0

    @property
    def factor(self) -> Tensor:
        """s f, (L,)."""
        return self.scaling if self.seed is None else self.scaling * kept_scale(self.dropout)

    def dropped(self, x: Tensor, by: Drop) -> Tensor:
        """D(x) of x (M, K)."""
        return x if self.seed is None else by(x, self.seed, self.dropout)


def low_rank(
    x: Tensor,
    size: tuple[int, int],
    down: Tensor,
    up: Tensor,
    scaling: float | Tensor,
    rows: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> LowRank:
    """Check the arguments of an operator and put them together.

    Args:
        x: (..., K), floating-point.
        size: N and K.
        down: A, (r, K), or (L, r, K) for L adapters.
        up: B, (N, r) or (L, N, r).
        scaling: s, a number for all adapters or (L,).
        rows: which adapter each row of x takes, of x's leading shape or one a sequence; or None.
        dropout: p.
        seed: int64 (1,), or None: a new one is drawn if p is above 0.

    Returns:
        The low-rank part.

    Raises:
        TypeError: rows are not integers.
        ValueError: shapes or devices that do not fit, scaling that requires a gradient, p out of
            range.
    """
    check_dropout(dropout, seed, x)
    if down.dim() == 2 and up.dim() == 2:
        down, up = down[None], up[None]
    if not isinstance(scaling, Tensor):
        dtype = torch.promote_types(up.dtype, torch.float32)
        scaling = torch.full((len(down),), scaling, dtype=dtype, device=x.device)
    _check_pair(*size, down, up, scaling)
    index = _index(rows, x, len(down))
    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    return LowRank(index, down, up, scaling.reshape(-1), seed, float(dropout))


def _check_pair(n: int, k: int, down: Tensor, up: Tensor, scaling: Tensor) -> None:
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


def check_values(lora: LowRank) -> None:
    """Refuse an index without an adapter, where looking at it waits for no device."""
    rows, adapters = lora.rows, len(lora.down)
    if rows is None or rows.device.type != "cpu" or not rows.numel():
        return
    least, most = int(rows.min()), int(rows.max())
    if least < -1 or most >= adapters:
        wrong = least if least < -1 else most
        raise ValueError(
            f"rows must lie in -1 ... {adapters - 1} for {adapters} adapters; got {wrong}"
        )


# --- the definition, in differentiable PyTorch ---------------------------------------------------


def update(x: Tensor, lora: LowRank, by: Drop = drop_reference) -> Tensor:
    """`s f (D(x) Aᵀ) Bᵀ`.

    Args:
        x: (M, K).
        lora: the low-rank part.
        by: what drops: the definition, or a faster one that cannot be differentiated.

    Returns:
        (M, N) in the dtype of x.
    """
    h = times(lora.dropped(x, by), lora.down, lora.rows)  # (M, r)
    return times(h, scaled_up(lora), lora.rows)


def add(y: Tensor, change: Tensor) -> Tensor:
    """y + change, but with the sign of a zero y kept under a change of zero."""
    return y - (0.0 - change)


def gradients(
    dy: Tensor, x: Tensor, lora: LowRank, wants: tuple[bool, bool], by: Drop = drop_reference
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The update's part of dx, and dA and dB.

    Args:
        dy: (M, N) in the dtype of x.
        x: (M, K).
        lora: the low-rank part.
        wants: whether dx is wanted, and whether dA and dB are.
        by: as `update`'s.

    Returns:
        (M, K) or None, and dA and dB in the shapes and dtypes of A and B; empty if not wanted.
    """
    dh = times(dy, scaled_up(lora).transpose(1, 2), lora.rows)  # (M, r)
    dx, ddown, dup = None, lora.down.new_empty(0), lora.up.new_empty(0)
    if wants[0]:
        dx = lora.dropped(times(dh, lora.down.transpose(1, 2), lora.rows), by)
    if wants[1]:
        adapters, x = len(lora.down), lora.dropped(x, by)
        h = times(x, lora.down, lora.rows)  # (M, r)
        ddown = outer(dh, x, lora.rows, adapters).to(lora.down.dtype)
        dup = outer(dy, h, lora.rows, adapters).to(lora.up.dtype)
        dup = dup * lora.factor.to(dup.dtype)[:, None, None]
    return dx, ddown, dup


def second(
    dy: Tensor,
    x: Tensor,
    lora: LowRank,
    gx: Tensor | None,
    ga: Tensor | None,
    gb: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of `<gx, D(dh A)> + <ga, dA> + <gb, dB>`, every step differentiable again.

    Args:
        dy: (M, N).
        x: (M, K).
        lora: the low-rank part.
        gx: (M, K) or None.
        ga: (L, r, K) or None.
        gb: (L, N, r) or None.

    Returns:
        What dy, x, A and B get.
    """
    rows, adapters = lora.rows, len(lora.down)
    ga = torch.zeros_like(lora.down) if ga is None else ga
    gb = torch.zeros_like(lora.up) if gb is None else gb
    s = lora.factor[:, None, None]
    up, gb = lora.up * s, gb * s
    gx = torch.zeros_like(x) if gx is None else lora.dropped(gx, drop)
    x = lora.dropped(x, drop)
    dh, h = times(dy, up.transpose(1, 2), rows), times(x, lora.down, rows)  # (M, r)
    d_h = times(dy, gb.transpose(1, 2), rows)  # (M, r)
    through = times(gx, lora.down, rows) + times(x, ga, rows)  # what dh gets
    d_dy = times(through, up, rows) + times(h, gb, rows)
    both = times(dh, ga.transpose(1, 2), rows) + times(d_h, lora.down.transpose(1, 2), rows)
    d_down = outer(dh, gx, rows, adapters) + outer(d_h, x, rows, adapters)
    d_up = outer(dy, through, rows, adapters) * s
    return d_dy, lora.dropped(both, drop), d_down.to(lora.down.dtype), d_up.to(lora.up.dtype)


def times(x: Tensor, mats: Tensor, rows: Tensor | None) -> Tensor:
    """`x_i M^T` with the matrix of row i, x (M, D) and mats (L, E, D) to (M, E); 0 without one."""
    mats = mats.to(x.dtype)
    if rows is None:
        return F.linear(x, mats[0])
    out = x.new_zeros(len(x), mats.shape[1])
    for i, mat in enumerate(mats):
        out = torch.where((rows == i)[:, None], F.linear(x, mat), out)
    return out


def outer(u: Tensor, v: Tensor, rows: Tensor | None, adapters: int) -> Tensor:
    """`sum of u_i^T v_i` over the rows of each adapter: (M, D) and (M, E) to (L, D, E)."""
    if rows is None:
        return (u.t() @ v)[None]
    chosen = [(rows == i)[:, None] for i in range(adapters)]
    return torch.stack([torch.where(c, u, 0).t() @ torch.where(c, v, 0) for c in chosen])


def unread(x: Tensor) -> Tensor:
    """In the place of an x whose values nothing reads: its shape, and one number."""
    return x.new_zeros(()).expand(x.shape)


def scaled_up(lora: LowRank) -> Tensor:
    """s f B, in the dtype of B: what a 16-bit product rounds once."""
    return lora.up * lora.factor[:, None, None]


def fake_gradients(x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of a gradient operator's results: `args` end in the low-rank part and wants."""
    down, up, wants_dx, wants_update = args[-7], args[-6], args[-2], args[-1]
    return (
        x.new_empty(x.shape if wants_dx else 0),
        down.new_empty(down.shape if wants_update else 0),
        up.new_empty(up.shape if wants_update else 0),
    )
