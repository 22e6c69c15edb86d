"""Which token may see which, and grouped-query attention.

The mask is boolean, (B, 1, T, S), True where a query may look, and is built once per forward for
each type of layer. If nothing is padded and nothing is packed, and no window is shorter than the
text, there is none: the operator's own causal path is taken, or no mask at all when a single new
token looks back at a whole cache. Packed rows have `Documents` in place of a mask where a GPU has
kernels that compute the documents' blocks alone (lora_kernels/packed_attention.py).

A sliding layer of window W sees key s from query t if 0 <= t - s < W, both counted in the row: its
own token and the W - 1 before it. The cache keeps what has slid out of sight, since the layers
that see everything, if there are any, are what sets its size.
"""

import torch
from torch import Tensor, nn

from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.norm import norm_of
from lora_core.models.rope import rotate
from lora_kernels import Documents, document_mask, documents, masked_attention, row_documents


def attention_rule(  # noqa: PLR0913  # all that a forward knows of its tokens
    tokens: int,
    past: int,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    device: torch.device | None = None,
    *,
    document_bounds: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    capped: bool = False,
    rows: int = 1,
    fixed: tuple[Tensor, int] | None = None,
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
        window: W, tokens that a query sees, its own included; None: all earlier ones.
        capped: whether scores are capped, for which a GPU has another kernel.
        rows: B; where nothing is padded, packed or past, a window's rows are documents to a GPU.
        fixed: of a cache of constant shape: where the one new token stands, an int64 scalar, and
            S; attention_mask (B, S) then says what it sees. No value is read from the device.

    Returns:
        (B or 1, 1, T, S) bool, or None; or Documents for a GPU's kernels. A padded query sees
        itself, since a row that sees nothing would be 0/0.
    """
    if fixed is not None:
        return _fixed_rule(fixed, attention_mask, window, device)
    if window is not None and window >= past + tokens:
        window = None
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    # several new tokens after a cache: the operator's causal path would align them to its start
    plain = attention_mask is None and document_ids is None and window is None
    if plain and (past == 0 or tokens == 1):
        return None
    if attention_mask is None and document_ids is not None and past == 0:
        kept = _computed_in(dtype, device)
        return documents(document_ids, document_bounds, kept, window, capped)
    if attention_mask is None and document_ids is None and window is not None and past == 0:
        return row_documents(rows, tokens, _computed_in(dtype, device), window, capped, device)
    query = torch.arange(past, past + tokens, device=device)[:, None]  # (T, 1)
    key = torch.arange(past + tokens, device=device)  # (S,)
    allowed = (key <= query)[None]  # (1, T, S)
    if window is not None:
        allowed = allowed & (query - key < window)
    if document_ids is not None:
        allowed = allowed & document_mask(document_ids)[:, 0]
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, :]  # (B, T, S)
        allowed = allowed | (key == query)
    return allowed[:, None]  # (B, 1, T, S)


def _fixed_rule(
    fixed: tuple[Tensor, int],
    attention_mask: Tensor | None,
    window: int | None,
    device: torch.device | None,
) -> Tensor:
    """(B or 1, 1, 1, S) for one new token at a position that only the device knows."""
    position, size = fixed
    key = torch.arange(size, device=device)
    allowed = (key <= position)[None]  # (1, S)
    if window is not None and window < size:
        allowed = allowed & (position - key < window)
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()  # (B, S)
        allowed = allowed | (key == position)  # a row that has ended sees itself: no 0/0
    return allowed[:, None, None]


def branch_rule(branch_ids: Tensor, *, window: int | None = None) -> Tensor:
    """The boolean mask of rows in which a prompt has several continuations (data/branches.py).

    Args:
        branch_ids: (B, T) integers: tokens of branch 0 are seen by all later ones, those of another
            branch by their own, those below 0 by themselves alone.
        window: W, tokens that a query sees, counted by position; None: all.

    Returns:
        (B, 1, T, T) bool.
    """
    index = torch.arange(branch_ids.shape[1], device=branch_ids.device)
    theirs = branch_ids[:, None, :]  # (B, 1, S)
    allowed = (theirs == 0) | (theirs == branch_ids[:, :, None])  # (B, T, S)
    allowed = allowed & (theirs >= 0) & (index <= index[:, None])
    if window is not None:
        position = branch_positions(branch_ids)
        allowed = allowed & (position[:, :, None] - position[:, None, :] < window)
    return (allowed | (index == index[:, None]))[:, None]


def branch_positions(branch_ids: Tensor) -> Tensor:
    """Position of each token: every branch goes on where branch 0 ends.

    Args:
        branch_ids: (B, T), each branch a run of equal ids, branch 0 first.

    Returns:
        (B, T) int64.
    """
    common = (branch_ids == 0).sum(dim=1, keepdim=True)  # (B, 1)
    return _counted_in_runs(branch_ids) + common * (branch_ids > 0)


def _counted_in_runs(ids: Tensor) -> Tensor:
    """How many tokens before it a token has in its run of equal ids, (B, T)."""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


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
        return _counted_in_runs(document_ids)
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
    """Grouped-query self-attention with rotary positions: Hugging Face's `self_attn`.

    What a family adds: one matrix for q, k and v; a norm of queries and keys, over each head or
    over all of them; a factor on the scores, or a cap.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.heads
        hidden, bias, family = config.hidden_size, config.attention_bias, config.family
        inward = bias if family.qkv_bias is None else family.qkv_bias
        self.layer = layer
        self.config = config
        self.head_dim = dim
        self.dropout = config.attention_dropout
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.fused = family.fused_projections
        if self.fused:
            self.qkv_proj = nn.Linear(hidden, sum(self.sizes), bias=inward)
        else:
            self.q_proj = nn.Linear(hidden, heads * dim, bias=inward)
            self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=inward)
            self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=inward)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=bias)
        self.qk_norm = family.qk_norm
        if self.qk_norm is not None:
            by_head = self.qk_norm == "head"
            self.q_norm = norm_of(config, dim if by_head else self.sizes[0])
            self.k_norm = norm_of(config, dim if by_head else self.sizes[1])

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | Documents | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, T, C).
            rotary: cosine and sine, (B or 1, 1, T, R) float32, of the R channels that turn; None:
                none do.
            mask: `attention_rule`'s result.
            cache: earlier keys and values; this layer's new ones are appended.

        Returns:
            (B, T, C).
        """
        q, k, v = self._project(cast_once(x))  # (B, H, T, D), (B, Hkv, T, D) twice
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, Hkv, S, D)
        dropout = self.dropout if self.training else 0.0
        out = masked_attention(
            q, k, v, mask, scale=self.scale, softcap=self.softcap, dropout=dropout
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, C)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, C), by head."""
        if self.fused:
            q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (B, T, H, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
