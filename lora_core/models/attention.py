"""Which token may see which, and grouped-query attention on PyTorch's fused operator.

The mask is boolean, (B, 1, T, S), True where a query may look, and is built once per forward. If
nothing is padded and nothing is packed there is none: the operator's own causal path is taken, or
no mask at all when a single new token looks back at a whole cache. Packed rows have `Documents` in
place of a mask where a GPU has kernels that compute the documents' blocks alone
(lora_kernels/attention.py).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.rope import rotate
from lora_kernels import Documents, document_attention, document_mask, documents


def attention_rule(
    tokens: int,
    past: int,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    device: torch.device | None = None,
    *,
    document_bounds: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | Documents | None:
    """The boolean mask of a forward, or None where plain causal attention is meant.

    Args:
        tokens: T, new tokens.
        past: tokens in the cache; S = past + T.
        attention_mask: (B, S), nonzero for real tokens; or None.
        document_ids: (B, T) integers, or None. A document is a run of equal ids, and a token sees
            only its own.
        device: where the mask is made; None: the CPU.
        document_bounds: (N + 1,) int32: where the documents begin in the flattened batch, and B T;
            None: they are counted if needed.
        dtype: of the embeddings; autocast's counts where it is active.

    Returns:
        (B or 1, 1, T, S) bool, or None; or Documents for a GPU's kernels. A padded query sees
        itself, since a row that sees nothing would be 0/0.
    """
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    # several new tokens after a cache: the operator's causal path would align them to its start
    if attention_mask is None and document_ids is None and (past == 0 or tokens == 1):
        return None
    if attention_mask is None and document_ids is not None and past == 0:
        return documents(document_ids, document_bounds, _computed_in(dtype, device))
    query = torch.arange(past, past + tokens, device=device)[:, None]  # (T, 1)
    key = torch.arange(past + tokens, device=device)  # (S,)
    allowed = (key <= query)[None]  # (1, T, S)
    if document_ids is not None:
        allowed = allowed & document_mask(document_ids)[:, 0]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, :]  # (B, T, S)
        allowed = allowed | (key == query)
    return allowed[:, None]  # (B, 1, T, S)


def default_positions(
    tokens: int,
    past: int,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    device: torch.device | None = None,
) -> Tensor:
    """Position of each new token: counted over real tokens, from 0 again in each document.

    Args:
        tokens: T, new tokens.
        past: tokens in the cache.
        attention_mask: (B, past + T), or None.
        document_ids: (B, T), or None.
        device: where the positions are made; None: the CPU.

    Returns:
        (B or 1, T) int64.
    """
    if document_ids is not None:
        index = torch.arange(tokens, device=device).expand_as(document_ids)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return index - torch.where(starts, index, 0).cummax(dim=1).values
    if attention_mask is not None:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
    return torch.arange(past, past + tokens, device=device)[None]


def _computed_in(dtype: torch.dtype, device: torch.device | None) -> torch.dtype:
    """The dtype of projections of an input: autocast's where it is active."""
    kind = "cpu" if device is None else device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) if dtype != torch.float64 else dtype
    return dtype


def cast_once(x: Tensor) -> Tensor:
    """Cast the input that several projections share to autocast's dtype, if it is active.

    Each would cast it for itself, to the same numbers, and keep a copy of its own for backward.

    Args:
        x: any tensor.

    Returns:
        x, or x in autocast's dtype.
    """
    return x.to(_computed_in(x.dtype, x.device))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions: Hugging Face's `self_attn`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.heads
        hidden, bias = config.hidden_size, config.attention_bias
        self.layer = layer
        self.head_dim = dim
        self.groups = heads // kv_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(hidden, heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | Documents | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, C).
            rotary: cosine and sine, (B or 1, 1, T, D) float32.
            mask: `attention_rule`'s result.
            cache: earlier keys and values; this layer's new ones are appended.

        Returns:
            (B, T, C).
        """
        x = cast_once(x)
        q, k, v = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)  # (B, H, T, D), (B, Hkv, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, Hkv, S, D)
        return self.o_proj(self._attend(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, T, C)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None) -> Tensor:
        """(B, H, T, D); query head h reads key/value head h // groups."""
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Documents):
            return document_attention(q, k, v, mask, dropout)
        if q.shape[2] == 1:
            # one new token: the query heads of a group stand where rows of a sequence would, so
            # the whole cache is read in place
            rows = q.reshape(q.shape[0], k.shape[1], self.groups, self.head_dim)  # (B, Hkv, G, D)
            return F.scaled_dot_product_attention(rows, k, v, mask, dropout).reshape_as(q)
        if self.groups > 1:
            # not enable_gqa: the memory-saving kernels of a GPU refuse it in float32 or with a mask
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))  # (B, H, S, D)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
