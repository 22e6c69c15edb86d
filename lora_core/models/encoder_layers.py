"""The parts of a BERT-shaped encoder: embeddings, attention, feed-forward layer, pooler.

BERT counts positions by columns, from 0. RoBERTa counts ids other than padding, from padding + 1
on, so that a left-padded row gives what it gives alone, and a padding id inside a text has the
padding's position. It goes by ids and not by the attention mask, because the weights were trained
so. Norms come after the residual sum.

A row that is padding throughout sees all of itself: its numbers mean nothing, but they are numbers
in every kernel of attention. Self-attention takes an object with `update`, though an encoder has no
cache: prefix tuning comes in that way (adapters/prefix.py).

Ref: Vaswani et al. 2017, arXiv:1706.03762, section 3.1 (post-norm); Devlin et al. 2019,
arXiv:1810.04805, figure 2 (embeddings).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_core.models.activations import ACTIVATIONS
from lora_core.models.encoder_config import EncoderConfig


class Embeddings(nn.Module):
    """LayerNorm of words, token types and positions, added up."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, pad = config.hidden_size, config.pad_token_id
        counts = config.family.counts_tokens
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=pad)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, size, padding_idx=pad if counts else None
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.first = config.first_position
        self.padding = pad if counts else None
        self.rows = config.max_position_embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Embed ids (B, T), or embeddings (B, T, C), to (B, T, C); see encoder.Encoder."""
        if inputs_embeds is None:
            assert input_ids is not None  # encoder.py has checked
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = self._positions(input_ids, inputs_embeds)
        if token_type_ids is None:  # through the module all the same: it may be adapted
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=inputs_embeds.device)
        x = inputs_embeds + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))

    def _positions(self, ids: Tensor | None, x: Tensor) -> Tensor:
        """(B or 1, T) int64."""
        tokens = x.shape[1]
        if ids is None or self.padding is None:
            index = torch.arange(self.first, self.first + tokens, device=x.device)[None]
        else:
            real = (ids != self.padding).long()
            index = real.cumsum(1) * real + self.padding
        # columns are a bound; positions are looked at only where it is passed, as reading waits
        too_long = self.first + tokens > self.rows and not torch.compiler.is_compiling()
        if too_long and int(index.max()) >= self.rows:
            raise ValueError(
                f"the text has {tokens} tokens; the model has {self.rows - self.first} positions "
                "(max_position_embeddings): cut it"
            )
        return index


class SelfAttention(nn.Module):
    """Every token attends to every real token of its row."""

    is_causal = False

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.layer = layer
        self.head_dim = size // config.num_attention_heads
        self.rate = config.attention_probs_dropout_prob
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Attend.

        Args:
            x: (B, T, C).
            mask: (B, 1, T, T) bool, True where a query may look, or None: everywhere.
            cache: an object whose `update(layer, keys, values)` returns what to attend to, or None.

        Returns:
            (B, T, C).
        """
        q, k, v = (self._split(part(x)) for part in (self.query, self.key, self.value))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, P + T, D)
        dropout = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)


class Output(nn.Module):
    """LayerNorm(x + dropout(dense(h))): how both parts of a layer end."""

    def __init__(self, config: EncoderConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """Add h (B, T, width), projected, to x (B, T, C)."""
        return self.LayerNorm(self.dropout(self.dense(h)) + x)


class Attention(nn.Module):
    """Self-attention and how it ends."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, layer)
        self.output = Output(config, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    """act(dense(x)): the wide half of the feed-forward part."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, inner)."""
        return self.act(self.dense(x))


class Layer(nn.Module):
    """Attention, then the feed-forward part; each ends in a norm."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Layers(nn.Module):
    """The stack, in a module of its own because the names have `encoder.layer.0`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, mask: Tensor | None, keep_all: bool = False) -> list[Tensor]:
        """Map x (B, T, C) to the last layer's output, or to itself and every layer's."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        states = [x]
        for layer in self.layer:
            x = checkpoint(layer, x, mask, use_reentrant=False) if recompute else layer(x, mask)
            states = [*states, x] if keep_all else [x]
        return states


class Pooler(nn.Module):
    """tanh(dense(x)) of the first token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, C)."""
        return torch.tanh(self.dense(x[:, 0]))


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Where queries may look.

    Args:
        attention_mask: (B, T), nonzero for real tokens; or None.

    Returns:
        (B, 1, T, T) bool, True for keys that are real tokens, and throughout in a row that has
        none; None where no token is padding.
    """
    if attention_mask is None:
        return None
    real = attention_mask != 0
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    seen = real | ~real.any(1, keepdim=True)  # (B, T)
    return seen[:, None, None].expand(-1, 1, seen.shape[1], -1)
