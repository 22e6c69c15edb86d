"""Attention within documents and windows: what GPUs have for packed rows.

Packed rows hold many short documents (lora_core/data/packing.py), and layers with a sliding window
see the last W tokens alone. Under a dense mask attention still computes all T² products of a row, n
times too many where n documents share it, and reads T² mask bytes. The blocks on the diagonal alone
are wanted: with documents of length T / n that is T² / n products and a list of n + 1 bounds; with
a window, T W.

A document is a run of equal ids in a row. What there is to know of them is made once for a forward
(`documents`; `row_documents` where each row is one) and handed to every layer. Three ways lead to
the same numbers:

* a boolean mask and PyTorch's SDPA: the definition, and what runs on a CPU;
* PyTorch's variable-length flash attention (`torch.nn.attention.varlen`), on GPUs in 16 bits: the
  batch is one sequence of B T tokens, cut at the bounds. No padding, no mask, nothing of size T²;
* PyTorch's flex attention with a block mask, on GPUs in float32 and for capped scores: blocks of
  128 × 128 in which no pair is allowed are not computed.

The bounds come from the collator, on the CPU, since their number is a shape: found on the GPU it
would make the host wait for everything queued there. The longest document is not told to the
kernel, T is: a bound costs a few thread blocks that end at once, the number another wait.

The trade-off: dropout of attention's weights, head sizes above 256 or no multiple of 8, and a
prefix of trained keys have the dense mask alone. The known packers either need a further package
for variable lengths (flash-attn) or warn that documents see each other without it. Windows and caps
in the GPU's kernels are tested with stand-ins for them, and have not been timed.

Ref: Dao 2023, arXiv:2307.08691, for the kernel; Krell et al. 2021, arXiv:2107.02027, for packing
that keeps documents apart.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import OLDEST_GPU, requested

__all__ = ["Documents", "by_kernel", "document_mask", "documents", "row_documents", "spread"]

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
    window: int | None = None
    """tokens that a query sees, itself included; None: all before it"""

    def dense(self) -> Tensor:
        """The same as a mask, (B, 1, T, T) bool."""
        return document_mask(self.ids, self.window)


def document_mask(ids: Tensor, window: int | None = None) -> Tensor:
    """The definition of who sees whom: earlier tokens of the same run of ids, and oneself.

    Args:
        ids: (B, T) integers.
        window: W, of which query t sees keys t - W + 1 to t; None: all before it.

    Returns:
        (B, 1, T, T) bool, True where query t may look at key s.

    Raises:
        ValueError: a window below 1.
    """
    runs = _runs(ids)
    near = _near(ids.shape[1], window, ids.device)
    return (near & (runs[:, :, None] == runs[:, None, :]))[:, None]


def _near(tokens: int, window: int | None, device: torch.device | None) -> Tensor:
    """(T, T) bool: 0 <= t - s < W."""
    _check_window(window)
    index = torch.arange(tokens, device=device)
    back = index[:, None] - index
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least 1 token; got {window}")


def documents(
    ids: Tensor,
    bounds: Tensor | None,
    dtype: torch.dtype,
    window: int | None = None,
    capped: bool = False,
) -> "Documents | Tensor":
    """Prepare a batch's documents for attention, once for all layers with the same window.

    Args:
        ids: (B, T) integers.
        bounds: (N + 1,) int32 on the same device: where runs begin in the flattened batch, and B T
            at the end. None: they are counted, for which a GPU is waited for.
        dtype: of the queries to come.
        window: W, tokens that a query sees within its document, itself included; None: all.
        capped: whether the scores to come are capped, which variable lengths have no room for.

    Returns:
        The dense mask (B, 1, T, T) on a CPU and under `LORA_KERNELS=reference`, else Documents. (A
        whole model in one graph has the dense mask too where flex attention would run, whose blocks
        are counted outside of graphs.)

    Raises:
        ValueError: ids of other dimensions, bounds that cannot be the ids', or a window below 1.
    """
    if ids.dim() != 2:
        raise ValueError(f"document ids must be (B, T); got {tuple(ids.shape)}")
    if bounds is not None and (bounds.dim() != 1 or bounds.dtype != torch.int32):
        raise ValueError(
            f"document bounds must be int32 (N + 1,); got {bounds.dtype} {tuple(bounds.shape)}"
        )
    _check_window(window)
    if not _fused(ids):
        return document_mask(ids, window)
    if _by_lengths(dtype, capped):
        return Documents(ids, _bounds(ids) if bounds is None else bounds, None, window)
    if flex() is not None and not torch.compiler.is_compiling():
        return Documents(ids, None, _blocks(ids, window), window)
    return document_mask(ids, window)


def row_documents(
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    window: int | None,
    capped: bool = False,
    device: torch.device | None = None,
) -> "Documents | Tensor":
    """`documents` for rows that are one document each: a sliding window without packing.

    Nothing is counted, so a GPU is never waited for: the bounds are multiples of T. T changes from
    call to call here (prompts, batches of whole texts), and flex attention is compiled anew for
    each; so where variable lengths cannot be used, the mask is dense.

    Args:
        batch: B.
        tokens: T.
        dtype: as `documents`', like the next two.
        window: see there.
        capped: see there.
        device: of the queries to come; None: the CPU.

    Returns:
        See there; a dense mask is (1, 1, T, T).

    Raises:
        ValueError: a window below 1.
    """
    ids = torch.zeros((1, 1), dtype=torch.int64, device=device).expand(batch, tokens)
    if not _fused(ids) or not _by_lengths(dtype, capped):
        return _near(tokens, window, device)[None, None]
    ends = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
    return documents(ids, ends, dtype, window, capped)


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


def _by_lengths(dtype: torch.dtype, capped: bool) -> bool:
    """Whether variable lengths serve scores of queries of this dtype."""
    return dtype in HALF and not capped and varlen() is not None


class Varlen(NamedTuple):
    """PyTorch's operator for variable lengths, and what this version of it takes."""

    operator: Callable[..., Any]
    groups: bool
    """fewer key/value heads than queries have"""
    scale: bool
    """a scale of one's own"""


def varlen() -> Varlen | None:
    """PyTorch's operator; None where this version has none, or none with a window."""
    if "varlen" not in _found and not torch.compiler.is_compiling():
        _found["varlen"] = _find_varlen()
    return _found.get("varlen")


def _find_varlen() -> Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if "window_size" not in names:
        return None
    return Varlen(varlen_attn, "enable_gqa" in names, "scale" in names)


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, given: Documents, scale: float | None, softcap: float | None
) -> Tensor | None:
    """Of the GPU's kernels the one that was prepared for; None where it cannot do this."""
    size = q.shape[-1]
    fits = size % 8 == 0 and size <= LARGEST_HEAD and q.dtype in HALF and softcap is None
    if given.bounds is not None and fits:
        return _by_length(q, k, v, given.bounds, given.window, scale)
    if given.blocks is not None:
        return _by_block(q, k, v, given.blocks, scale, softcap)
    return None


def _by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    found = varlen()
    assert found is not None  # `documents` asked
    # keys before and after a query that it sees besides its own, -1 for all
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if found.groups:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = spread(q, k, v)
    if scale is not None and found.scale:
        options["scale"] = scale
    elif scale is not None:  # an older version divides by sqrt(D) in any case
        q = q * (scale * math.sqrt(q.shape[-1]))
    batch, _, tokens, _ = q.shape
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H, D)
    out = found.operator(*flat, bounds, bounds, tokens, tokens, **options)  # (B T, H, D)
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)  # (B, H, T, D)


# --- blocks ---


def flex() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Flex attention for a graph, and compiled: it is a kernel only then. None: not looked for."""
    if "flex" not in _found and not torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        _found["flex"] = flex_attention, torch.compile(flex_attention, dynamic=False)
    return _found.get("flex")


def _blocks(ids: Tensor, window: int | None) -> Any:
    """Flex attention's block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    runs, tokens = _runs(ids), ids.shape[1]
    most = tokens if window is None else window

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (query - key < most)
        return near & (runs[b, query] == runs[b, key])

    return create_block_mask(seen, len(ids), None, tokens, tokens, device=str(ids.device))


def _by_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Any,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    found = flex()
    assert found is not None  # `documents` asked
    in_graph, compiled = found
    operator = in_graph if torch.compiler.is_compiling() else compiled
    cap: dict[str, Any] = {} if softcap is None else {"score_mod": _cap(softcap, q)}
    groups = q.shape[1] != k.shape[1]
    out: Tensor = operator(q, k, v, block_mask=blocks, scale=scale, enable_gqa=groups, **cap)
    return out


def _cap(softcap: float, q: Tensor) -> Callable[..., Tensor]:
    """Flex attention's `score_mod`."""
    # a tensor, one entry a head: a second number would be no constant to torch.compile any more,
    # and of what is not constant flex attention takes tensors alone
    caps = torch.full(q.shape[1:2], softcap, dtype=torch.float32, device=q.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return caps[h] * torch.tanh(score / caps[h])

    return capped


def spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head of their own for each query head."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
