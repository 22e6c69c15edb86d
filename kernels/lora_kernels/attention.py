"""Causal attention that stays within a document: the attention of packed rows.

    y = softmax(q kᵀ / sqrt(D) + M) v        M = 0 where key ≤ query and both are of one document

Why: packed rows hold many short documents (lora_core/data/packing.py). Under a dense mask attention
still computes all T² products of a row, n times too many where n documents share it, and reads T²
mask bytes. The blocks on the diagonal alone are wanted: with documents of length T / n that is
T² / n products and a list of n + 1 bounds.

A document is a run of equal ids in a row. What there is to know of them is made once for a forward
(`documents`) and handed to every layer. Three ways lead to the same numbers:

* a boolean mask and PyTorch's SDPA: the definition, and what runs on a CPU;
* PyTorch's variable-length flash attention (`torch.nn.attention.varlen`), on GPUs in 16 bits: the
  batch is one sequence of B T tokens, cut at the bounds. No padding, no mask, nothing of size T²;
* PyTorch's flex attention with a block mask, on GPUs in float32: blocks of 128 × 128 in which no
  pair is allowed are not computed.

The bounds come from the collator, on the CPU, since their number is a shape: found on the GPU it
would make the host wait for everything queued there. The longest document is not told to the
kernel, T is: a bound costs a few thread blocks that end at once, the number another wait.

The trade-off: dropout of attention's weights, head sizes above 256 or no multiple of 8, and a
prefix of trained keys have the dense mask alone. The known packers either need a further package
for variable lengths (flash-attn) or warn that documents see each other without it.

Ref: Dao 2023, arXiv:2307.08691, for the kernel; Krell et al. 2021, arXiv:2107.02027, for packing
that keeps documents apart.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.dispatch import OLDEST_GPU, requested

__all__ = [
    "Documents",
    "document_attention",
    "document_attention_reference",
    "document_mask",
    "documents",
]

HALF = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256  # of the flash kernels, whose heads are multiples of 8


class Documents(NamedTuple):
    """Packed rows' documents as the GPU's kernels want them, made by `documents`."""

    ids: Tensor
    """(B, T) integers; a document is a run of equal ones"""
    bounds: Tensor | None = None
    """(N + 1,) int32: where runs begin in the flattened batch, and B T; for variable lengths"""
    blocks: Any = None
    """flex attention's block mask"""


def document_mask(ids: Tensor) -> Tensor:
    """The definition of who sees whom: earlier tokens of the same run of ids, and oneself.

    Args:
        ids: (B, T) integers.

    Returns:
        (B, 1, T, T) bool, True where query t may look at key s.
    """
    runs = _runs(ids)
    index = torch.arange(ids.shape[1], device=ids.device)
    causal = index <= index[:, None]  # (T, T)
    return (causal & (runs[:, :, None] == runs[:, None, :]))[:, None]


def documents(ids: Tensor, bounds: Tensor | None, dtype: torch.dtype) -> "Documents | Tensor":
    """Prepare a batch's documents for attention, once for all layers.

    Args:
        ids: (B, T) integers.
        bounds: (N + 1,) int32 on the same device: where runs begin in the flattened batch, and B T
            at the end. None: they are counted, for which a GPU is waited for.
        dtype: of the queries to come.

    Returns:
        The dense mask (B, 1, T, T) on a CPU and under `LORA_KERNELS=reference`, else Documents. (A
        whole model in one graph has the dense mask too where flex attention would run, whose blocks
        are counted outside of graphs.)

    Raises:
        ValueError: ids of other dimensions, or bounds that cannot be the ids'.
    """
    if ids.dim() != 2:
        raise ValueError(f"document ids must be (B, T); got {tuple(ids.shape)}")
    if bounds is not None and (bounds.dim() != 1 or bounds.dtype != torch.int32):
        raise ValueError(
            f"document bounds must be int32 (N + 1,); got {bounds.dtype} {tuple(bounds.shape)}"
        )
    if not _fused(ids):
        return document_mask(ids)
    if dtype in HALF and varlen() is not None:
        return Documents(ids, _bounds(ids) if bounds is None else bounds)
    if flex() is not None and not torch.compiler.is_compiling():
        return Documents(ids, None, _blocks(ids))
    return document_mask(ids)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, given: "Documents | Tensor", dropout: float = 0.0
) -> Tensor:
    """Causal attention within documents.

    Args:
        q: (B, H, T, D).
        k: (B, Hkv, T, D); query head h reads head h // (H / Hkv).
        v: likewise.
        given: of `documents`, or the dense mask (B, 1, T, T).
        dropout: share of the weights that is dropped.

    Returns:
        (B, H, T, D), differentiable in q, k and v.
    """
    if isinstance(given, Tensor):
        return _dense(q, k, v, given, dropout)
    size = q.shape[-1]
    if dropout == 0.0:
        if given.bounds is not None and size % 8 == 0 and size <= LARGEST_HEAD and q.dtype in HALF:
            return _by_length(q, k, v, given.bounds)
        if given.blocks is not None:
            return _by_block(q, k, v, given.blocks)
    return _dense(q, k, v, document_mask(given.ids), dropout)


def document_attention_reference(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """The definition: SDPA under `document_mask`.

    Args:
        q: (B, H, T, D).
        k: (B, Hkv, T, D).
        v: likewise.
        ids: (B, T) integers.

    Returns:
        (B, H, T, D).
    """
    return _dense(q, k, v, document_mask(ids), 0.0)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    # not enable_gqa: the memory-saving kernels of a GPU refuse it in float32 or with a mask
    return F.scaled_dot_product_attention(q, *_spread(q, k, v), mask, dropout)


def _spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head of their own for each query head."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _runs(ids: Tensor) -> Tensor:
    """Number of the run that each token belongs to, within its row: (B, T)."""
    first = torch.zeros_like(ids[:, :1], dtype=torch.bool)
    return torch.cat([first, ids[:, 1:] != ids[:, :-1]], 1).cumsum(1)


def _bounds(ids: Tensor) -> Tensor:
    """(N + 1,) int32 from (B, T) ids; a GPU is waited for."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]  # (N,)
    return torch.cat([starts, starts.new_full((1,), ids.numel())]).to(torch.int32)


# --- variable lengths ---


def _fused(ids: Tensor) -> bool:
    """Whether the GPU's kernels are to be used."""
    if not ids.is_cuda or requested() == "reference":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(ids.device) >= OLDEST_GPU


# PyTorch's operators, once `documents` has looked for them: the modules they are in take a second
# to import, and torch.compile cannot trace the search
_found: dict[str, Any] = {}


def varlen() -> tuple[Callable[..., Any], bool] | None:
    """PyTorch's operator, and whether it takes fewer key/value heads than queries have.

    Returns:
        None where this version of PyTorch has none, or none with a causal window.
    """
    if "varlen" not in _found and not torch.compiler.is_compiling():
        _found["varlen"] = _find_varlen()
    return _found.get("varlen")


def _find_varlen() -> tuple[Callable[..., Any], bool] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in names) if "window_size" in names else None


def _by_length(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    found = varlen()
    assert found is not None  # `documents` asked
    operator, takes_groups = found
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if takes_groups:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = _spread(q, k, v)
    batch, _, tokens, _ = q.shape
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H, D)
    out = operator(*flat, bounds, bounds, tokens, tokens, **options)  # (B T, H, D)
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)  # (B, H, T, D)


# --- blocks ---


def flex() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Flex attention for a graph, and compiled: it is a kernel only then. None: not looked for."""
    if "flex" not in _found and not torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        _found["flex"] = flex_attention, torch.compile(flex_attention, dynamic=False)
    return _found.get("flex")


def _blocks(ids: Tensor) -> Any:
    """Flex attention's block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    runs = _runs(ids)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (runs[b, query] == runs[b, key])

    tokens = ids.shape[1]
    return create_block_mask(seen, len(ids), None, tokens, tokens, device=str(ids.device))


def _by_block(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
    found = flex()
    assert found is not None  # `documents` asked
    in_graph, compiled = found
    operator = in_graph if torch.compiler.is_compiling() else compiled
    out: Tensor = operator(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return out
