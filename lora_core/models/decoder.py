"""A decoder-only language model, built from a `ModelConfig`, with Hugging Face's parameter names.

One model for a family of configurations instead of a file per family: what differs is a field of
the configuration. The names are those on disk (`model.layers.0.self_attn.q_proj.weight`), so a
checkpoint loads without a table of names and adapters trained here fit there, and the rotation is
Hugging Face's half layout, so no weight is permuted. Logits equal transformers' LlamaForCausalLM's
to rounding, cached or not, padded or not (tests/oracles/test_transformers.py).

Against transformers: no attention backends, no cache classes and no output recorders, so that the
whole path from ids to loss is the few functions below. Activation checkpointing, packing by
`document_ids` and an explicit cache are arguments, not global state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_core.losses import linear_token_cross_entropy, token_mean
from lora_core.models.attention import Attention, attention_rule, cast_once, default_positions
from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.rope import Rotary
from lora_kernels import Documents, rms_norm, swiglu

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# what `swiglu` calls those that it has
_FUSED = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass
class ModelOutput:
    """What a forward returns."""

    logits: Tensor | None
    """(B, T, V), or (B, logits_to_keep, V); None with `keep_logits=False`."""
    loss: Tensor | None = None
    """Mean cross-entropy over graded tokens, a scalar; None without labels."""
    hidden_states: tuple[Tensor, ...] | None = None
    """On request (B, T, C) each: the embeddings, then every layer's output, the last one normed."""
    token_losses: Tensor | None = None
    """(B, T) float32, without a gradient: each position's loss, 0 where not graded."""


class RMSNorm(nn.Module):
    """w · x / sqrt(mean(x²) + eps), in float32, rounded to x's dtype before the product with w.

    Kept for backward are x and w, which exist anyway.

    Ref: Zhang and Sennrich, arXiv:1910.07467, equation 4.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., C) along C."""
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x)).

    For SiLU and GELU's tanh form what is kept of the product is gate(x) and up(x) alone.

    Ref: Shazeer, arXiv:2002.05202, equation 6.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act = _ACTIVATIONS[config.hidden_act]
        self.fused = _FUSED.get(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        x = cast_once(x)
        gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, inner)
        gated = self.act(gate) * up if self.fused is None else swiglu(gate, up, self.fused)
        return self.down_proj(gated)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | Documents | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Map x (B, T, C) to (B, T, C); the other arguments are `Attention.forward`'s."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config.heads[2], config.rope_parameters)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        document_bounds: Tensor | None = None,
        keep_all: bool = False,
    ) -> list[Tensor]:
        """Run the layers; arguments as `CausalLM.forward`'s, x (B, T, C) being the embeddings.

        Returns:
            The normed output (B, T, C) as the last entry; with `keep_all`, the layers' inputs in
            order before it, L + 1 tensors in all.
        """
        tokens, past = x.shape[1], 0 if cache is None else cache.length
        mask = attention_rule(
            tokens,
            past,
            attention_mask,
            document_ids,
            x.device,
            document_bounds=document_bounds,
            dtype=x.dtype,
        )
        if position_ids is None:
            position_ids = default_positions(tokens, past, attention_mask, document_ids, x.device)
        rotary = self.rotary(position_ids)
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        states = [x]
        for layer in self.layers:
            if recompute:
                x = checkpoint(layer, x, rotary, mask, None, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
            states = [*states, x] if keep_all else [x]
        states[-1] = self.norm(x)
        return states


class CausalLM(nn.Module):
    """Decoder and language-model head.

    Args:
        config: sizes and switches.

    Ref: Touvron et al., arXiv:2302.13971, section 2.2.
    """

    grades = True
    """Says that the forward takes `normalizer`, `label_smoothing` and `keep_logits`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def forward(  # noqa: PLR0913  # transformers' arguments, and the loss's
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        document_bounds: Tensor | None = None,
        logits_to_keep: int | None = None,
        output_hidden_states: bool = False,
        normalizer: float | None = None,
        label_smoothing: float = 0.0,
        keep_logits: bool = True,
    ) -> ModelOutput:
        """Logits of the next token at every position, and the loss if there are labels.

        Args:
            input_ids: (B, T) token ids; or give inputs_embeds.
            attention_mask: (B, past + T), nonzero for real tokens; None: all are.
            position_ids: (B, T) or (1, T); None: counted over the real tokens.
            labels: (B, T), unshifted, -100 where not graded.
            inputs_embeds: (B, T, C) in place of input_ids.
            cache: keys and values of earlier tokens; the new ones are appended.
            document_ids: (B, T) integers for packed rows; a document is a run of equal ids, and
                tokens see only their own.
            document_bounds: (N + 1,) int32: where the runs begin in the flattened batch, and B T;
                spares a GPU the wait of counting them.
            logits_to_keep: only for the last so many positions; not with labels.
            output_hidden_states: also return the hidden states.
            normalizer: what the summed loss is divided by; None: the graded tokens of this batch.
            label_smoothing: of the loss; see `token_cross_entropy`.
            keep_logits: False with labels: the loss alone, and logits are never held whole.

        Returns:
            ModelOutput.

        Raises:
            ValueError: arguments that exclude one another, or an attention mask that does not fit.
        """
        self._check(input_ids, inputs_embeds, attention_mask, cache, document_ids)
        if labels is not None and logits_to_keep is not None:
            raise ValueError("labels need every position's logits: leave logits_to_keep out")
        if labels is None and not keep_logits:
            raise ValueError("without labels the logits are all there is: leave keep_logits True")
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(f"logits_to_keep must be at least 1; got {logits_to_keep}")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.model(
            x,
            attention_mask,
            position_ids,
            cache=cache,
            document_ids=document_ids,
            document_bounds=document_bounds,
            keep_all=output_hidden_states,
        )
        kept = states[-1] if logits_to_keep is None else states[-1][:, -logits_to_keep:]
        logits = self.lm_head(kept) if keep_logits else None  # (B, T, V)
        loss = by_token = None
        grading: dict[str, Any] = {"normalizer": normalizer, "label_smoothing": label_smoothing}
        if labels is not None and logits is not None:
            loss, by_token = token_mean(logits, labels, **grading)
        elif labels is not None:
            loss, by_token = linear_token_cross_entropy(kept, self.lm_head, labels, **grading)
        hidden = tuple(states) if output_hidden_states else None
        return ModelOutput(logits, loss, hidden, by_token)

    def _check(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        document_ids: Tensor | None,
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, tokens = given.shape[:2]
        seen = tokens + (0 if cache is None else cache.length)
        if attention_mask is not None and attention_mask.shape != (batch, seen):
            raise ValueError(
                f"attention_mask must have shape ({batch}, {seen}), past and new tokens; "
                f"got {tuple(attention_mask.shape)}"
            )
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids are for packed training rows: not with a cache")
        if document_ids is not None and document_ids.shape != (batch, tokens):
            raise ValueError(
                f"document_ids must have shape ({batch}, {tokens}); got {tuple(document_ids.shape)}"
            )

    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Fresh weights: normal with deviation `std`, biases 0, norms 1.

        Args:
            std: standard deviation.
            generator: source of randomness on the weights' device; None: torch's global one.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def tie_weights(self) -> None:
        """Make the head the embedding's own weight, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer's activations are recomputed in backward instead of kept."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.model.gradient_checkpointing = on

    @property
    def device(self) -> torch.device:
        """Where the embedding lies."""
        return self.model.embed_tokens.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head
