"""Attention of a decoder layer: one entry for every mask, head grouping, scale and cap.

    y = softmax(f(s q kᵀ) + M) v        M = 0 where a query may look, else -inf

f is the identity, or Gemma 2's cap c tanh(x / c) (lora_kernels/capped_attention.py). PyTorch's SDPA
does the rest, and three things are decided here so that layers need not:

* Without a mask attention is causal, SDPA's cheapest path; or a single new token looks back at a
  whole cache. Then the query heads of a group stand where rows of a sequence would, so that the
  cache is read in place: SDPA with heads of their own would copy it G times for each token.
* Grouped heads are else repeated, not left to `enable_gqa`: the memory-saving kernels of a GPU
  refuse it in float32 or with a mask.
* Packed rows and windows take the kernel that computes their blocks alone, where there is one
  (lora_kernels/packed_attention.py), and the dense mask where not.

No shape depends on values and nothing waits for a GPU, so a step over a cache of fixed size can be
captured in a CUDA graph.

Ref: Ainslie et al. 2023, arXiv:2305.13245, for grouped heads.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.capped_attention import capped_attention, capped_attention_reference
from lora_kernels.operands import autocast
from lora_kernels.packed_attention import Documents, by_kernel, spread

__all__ = ["masked_attention"]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: "Tensor | Documents | None",
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under any of the decoder's masks.

    Args:
        q: (B, H, T, D).
        k: (B, Hkv, S, D); query head h reads head h // (H / Hkv).
        v: likewise.
        mask: (B or 1, 1, T, S) bool, True where a query may look; or of `documents`; or None:
            causal, with T = S, or one token, T = 1, that sees everything.
        scale: of the products; None: 1 / sqrt(D).
        softcap: c; scores become c tanh(scores / c) before the mask (Gemma 2). None: no cap.
        dropout: share of the weights that is dropped. With a cap the weights are held whole then,
            B H T S numbers, and kept for backward.

    Returns:
        (B, H, T, D) in the dtype of q, differentiable in q, k and v.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: sizes that do not fit each other, or a cap that is not positive.
    """
    _check(q, k, mask, softcap)
    if isinstance(mask, Documents):
        if dropout == 0.0 and (out := by_kernel(q, k, v, mask, scale, softcap)) is not None:
            return out
        mask = mask.dense()
    if softcap is not None:
        return _capped(q, k, v, mask, scale, softcap, dropout)
    if q.shape[2] == 1:
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, Hkv, G, D)
        out = F.scaled_dot_product_attention(rows, k, v, mask, dropout, scale=scale)
        return out.reshape(*q.shape[:3], -1)
    return _dense(q, k, v, mask, scale, dropout)


def _check(q: Tensor, k: Tensor, mask: "Tensor | Documents | None", softcap: float | None) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads; got {q.shape[1]} over {k.shape[1]}"
        )
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a query may look; got {mask.dtype}")
    if mask is None and q.shape[2] not in (1, k.shape[2]):
        raise ValueError(
            f"{q.shape[2]} queries over {k.shape[2]} keys need a mask: without one there are as "
            "many of both, or one query"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive; got {softcap}: leave it out for no cap")


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    # not enable_gqa: the memory-saving kernels of a GPU refuse it in float32 or with a mask
    k, v = spread(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scale
    )


def _capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    q, k, v = (autocast(t) for t in (q, k, v))  # as SDPA does
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if dropout:
        return capped_attention_reference(q, k, v, mask, scale, softcap, dropout)
    return capped_attention(q, k, v, mask, scale, softcap)
