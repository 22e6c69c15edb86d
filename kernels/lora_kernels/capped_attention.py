"""Attention whose scores are capped, a few query rows at a time: Gemma 2's.

    y = softmax(c tanh(s q kᵀ / c) + M) v        M = 0 where a query may look, else -inf

Why an operator: PyTorch's fused attention has no room for a function of the scores, so the cap has
to be written out, and written out plainly it keeps three matrices of B H T S numbers for backward:
the tanh, the weights in float32, and the weights in 16 bits. At 8 heads and 8192 tokens those are
4 GB a layer. Here query rows are gone through in chunks of at most CHUNK scores, forward and
backward, and backward computes the scores again from q and k, which exist anyway:

    P = softmax(…)        dP = dy vᵀ        dA = P (dP - Σ P dP)        dv = Pᵀ dy
    dS = dA (1 - tanh²)   dq = s dS k       dk = s dSᵀ q

Kept between them are q, k, v and the mask; nothing else is of size T S beyond a chunk. Without a
mask, keys that lie after a chunk are not multiplied at all, which halves the products.

The numbers are those of the eager form that models with a cap are published with: the products in
the dtype of q, the softmax in float32, its weights rounded to the dtype of q. Cap and scale are
applied in float32 too, which the eager form does in 16 bits; dk and dv are summed in float32.

The trade-off: the backward pass multiplies q kᵀ once more, a fifth of attention's products. Heads
that share a key head are laid below each other as if they were rows, so keys are never repeated.
On GPUs, flex attention does the same in one kernel for packed rows (lora_kernels/attention.py).

Ref: Gemma Team 2024, arXiv:2408.00118, section 2, for the cap; Rabe and Staats 2021,
arXiv:2112.05682, for attention in chunks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.derivatives import through
from lora_kernels.operands import wide

__all__ = ["CHUNK", "capped_attention", "capped_attention_reference"]

CHUNK = 1 << 22  # scores that are held at once, 16 MB of float32

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap"
torch.library.define("lora_kernels::capped_attention", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "lora_kernels::capped_attention_backward", f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention with scores c tanh(s q kᵀ / c).

    Args:
        q: (B, H, T, D), floating-point.
        k: (B, Hkv, S, D) of the same dtype; query head h reads head h // (H / Hkv).
        v: likewise.
        mask: (B or 1, 1, T, S) bool, True where a query may look; None: causal, with T = S, or one
            token, T = 1, that sees everything.
        scale: s, of the products.
        softcap: c, positive: scores stay within ± c.

    Returns:
        (B, H, T, D) in the dtype of q, differentiable in q, k and v; tokens lie before heads in
        memory, as the projection behind it wants them.
    """
    return torch.ops.lora_kernels.capped_attention(q, k, v, mask, scale, softcap)


def capped_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """The definition, whole, in differentiable PyTorch.

    Args:
        q: as `capped_attention`'s, like the next five.
        k: see there.
        v: see there.
        mask: see there.
        scale: see there.
        softcap: see there.
        dropout: share of the weights that is dropped.

    Returns:
        (B, H, T, D).
    """
    scores = (_grouped(q, k) @ k.mT).to(wide(q.dtype))  # (B, Hkv, G T, S)
    capped = softcap * torch.tanh(scores * (scale / softcap))
    capped = _ungrouped(capped, q.shape[2])
    seen = _seen(q, k, mask, 0, q.shape[2], k.shape[2])
    if seen is not None:
        capped = capped.masked_fill(~seen, -torch.inf)
    weights = F.dropout(capped.softmax(-1).to(q.dtype), dropout).flatten(2, 3)
    return (weights @ v).view(*q.shape[:3], -1)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """Heads that share a key head below each other: (B, H, t, D) as (B, Hkv, G t, D)."""
    batch, heads, rows, size = q.shape
    return q.reshape(batch, k.shape[1], heads // k.shape[1] * rows, size)


def _ungrouped(scores: Tensor, rows: int) -> Tensor:
    """(B, Hkv, G t, S) as (B, Hkv, G, t, S), t = `rows`."""
    return scores.view(*scores.shape[:2], -1, rows, scores.shape[-1])


def _chunks(q: Tensor, k: Tensor, mask: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Query rows `begin` to `end`, and how many keys there are for them to look at."""
    batch, heads, tokens, _ = q.shape
    every = k.shape[2]
    step = max(1, CHUNK // max(1, batch * heads * every))
    for begin in range(0, tokens, step):
        end = min(begin + step, tokens)
        yield begin, end, end if _causal(q, mask) else every


def _causal(q: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q.shape[2] > 1


def _seen(
    q: Tensor, k: Tensor, mask: Tensor | None, begin: int, end: int, keys: int
) -> Tensor | None:
    """Who sees whom in a chunk, to be broadcast to (B, Hkv, G, t, keys); None: all see all."""
    if mask is not None:
        return mask[:, :, None, begin:end, :keys]
    if not _causal(q, mask):
        return None
    query = torch.arange(begin, end, device=q.device)[:, None]
    return torch.arange(keys, device=q.device) <= query


def _weights(
    q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Softmax of the capped scores, and the tanh in them: (B, Hkv, G t, keys) in wide sums.

    q is (B, Hkv, G t, D) with t = `rows`.
    """
    tanh = (q @ k.mT).to(wide(q.dtype)).mul_(scale / softcap).tanh_()
    capped = _ungrouped(tanh * softcap, rows)
    if seen is not None:
        capped.masked_fill_(~seen, -torch.inf)
    return capped.softmax(-1).flatten(2, 3), tanh


# --- the operators -------------------------------------------------------------------------------


def _empty(q: Tensor, size: int) -> Tensor:
    """(B, H, T, size) whose heads lie side by side in memory."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, size)).transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    y = _empty(q, v.shape[3])

    def chunk(begin: int, end: int, keys: int) -> None:
        rows, some = end - begin, _grouped(q[:, :, begin:end], k)
        seen = _seen(q, k, mask, begin, end, keys)
        weights = _weights(some, k[:, :, :keys], seen, scale, softcap, rows)[0].to(q.dtype)
        out = weights @ v[:, :, :keys]  # (B, Hkv, G t, D)
        y[:, :, begin:end] = out.view(*q.shape[:2], rows, -1)

    with torch.autocast(q.device.type, enabled=False):
        for piece in _chunks(q, k, mask):
            chunk(*piece)  # a function, so that nothing of one lives on into the next
    return y


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = _empty(q, q.shape[3])
    dk, dv = (torch.zeros_like(t, dtype=wide(q.dtype)) for t in (k, v))

    def chunk(begin: int, end: int, keys: int) -> None:
        rows = end - begin
        some, some_dy = (_grouped(t[:, :, begin:end], k) for t in (q, dy))
        seen, near = _seen(q, k, mask, begin, end, keys), k[:, :, :keys]
        weights, tanh = _weights(some, near, seen, scale, softcap, rows)
        dv[:, :, :keys] += weights.to(q.dtype).mT @ some_dy
        slope = (some_dy @ v[:, :, :keys].mT).to(weights.dtype)  # dP (B, Hkv, G t, keys)
        slope -= (weights * slope).sum(-1, keepdim=True)
        slope.mul_(weights).mul_(1 - tanh.square_()).mul_(scale)
        slope = slope.to(q.dtype)
        dq[:, :, begin:end] = (slope @ near).view(*q.shape[:2], rows, -1)
        dk[:, :, :keys] += slope.mT @ some

    with torch.autocast(q.device.type, enabled=False):
        for piece in _chunks(q, k, mask):
            chunk(*piece)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    return _empty(q, v.shape[3])


def _fake_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv = (torch.empty_like(t, dtype=wide(q.dtype)).to(t.dtype) for t in (k, v))
    return _empty(q, q.shape[3]), dk, dv


# --- derivatives ---------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.lora_kernels.capped_attention_backward(dy, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _second(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of `<grads, (dq, dk, dv)>`, through plain PyTorch."""
    dy, q, k, v, mask = ctx.saved_tensors

    def wanted(dy: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y = capped_attention_reference(q, k, v, mask, *ctx.numbers)
        return torch.autograd.grad(y, (q, k, v), dy, create_graph=True)

    with torch.autocast(q.device.type, enabled=False):
        return (*through(wanted, (dy, q, k, v), grads), None, None, None)


for _name, _run, _shapes, _slope, _setup in (
    ("capped_attention", _forward, _fake, _gradient, _save),
    ("capped_attention_backward", _backward, _fake_backward, _second, _save_backward),
):
    torch.library.impl(f"lora_kernels::{_name}", "default", _run)
    torch.library.register_fake(f"lora_kernels::{_name}", _shapes)
    torch.library.register_autograd(f"lora_kernels::{_name}", _slope, setup_context=_setup)
