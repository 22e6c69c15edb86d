"""A decoder-only language model, built from a `ModelConfig`, with Hugging Face's parameter names.

One model for all families instead of a file per family: what differs is a field of the
configuration or of the family's row (families.py). The names are those on disk
(`model.layers.0.self_attn.q_proj.weight`), so a checkpoint loads without a table of names and
adapters trained here fit there, and the rotation is Hugging Face's half layout, so no weight is
permuted. Logits equal those of transformers' models to rounding, cached or not, padded or not
(tests/oracles, and the table of docs/models.md).

Against transformers: no attention backends, no cache classes and no output recorders, so that the
whole path from ids to loss is the few functions below. Activation checkpointing, packing by
`document_ids` and an explicit cache are arguments, not global state.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_core.losses import (
    label_log_probs,
    linear_log_probs,
    linear_token_cross_entropy,
    token_mean,
)
from lora_core.models.attention import (
    attention_rule,
    branch_positions,
    branch_rule,
    default_positions,
)
from lora_core.models.cache import KVCache
from lora_core.models.config import ModelConfig
from lora_core.models.experts import Experts
from lora_core.models.families import FULL, SLIDING
from lora_core.models.layers import DecoderLayer, embedding_of
from lora_core.models.norm import RMSNorm, norm_of
from lora_core.models.rope import Rotary
from lora_core.models.routing import balance_loss
from lora_kernels import Documents


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
    log_probs: Tensor | None = None
    """With `token_log_probs`, (B, T), with a gradient: each position's log p of the next label, 0
    where not graded."""
    aux_loss: Tensor | None = None
    """With `output_router_logits`: how unevenly experts are used, a scalar; see `balance_loss`."""


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = embedding_of(config)
        self.multiplier = config.embedding_multiplier
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = norm_of(config, config.hidden_size)
        self.capped = config.attn_logit_softcapping is not None
        self.kinds, self.window = config.kinds, config.sliding_window
        self.turns = config.no_rope_layers or (1,) * len(self.layers)
        # the sliding layers' frequencies where they are their own
        ropes, size = config.rope_parameters, config.heads[2]
        local = ropes.get(SLIDING)
        self.rotary = Rotary(size, ropes.get(FULL, ropes))
        self.local_rotary = None if local is None else Rotary(size, local)
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
        branch_ids: Tensor | None = None,
        keep_all: bool = False,
        router_logits: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Run the layers; arguments as `CausalLM.forward`'s, x (B, T, C) being the embeddings.

        Returns:
            The normed output (B, T, C) as the last entry; with `keep_all`, the layers' inputs in
            order before it, L + 1 tensors in all.
        """
        if self.multiplier != 1:
            x = x * self.multiplier
        tokens, past = x.shape[1], 0 if cache is None else cache.length
        rule: Callable[..., Tensor | Documents | None] = functools.partial(
            attention_rule,
            *(tokens, past, attention_mask, document_ids, x.device),
            document_bounds=document_bounds,
            dtype=x.dtype,
            capped=self.capped,
            rows=len(x),
            fixed=None if cache is None else cache.fixed,
        )
        if branch_ids is not None:
            rule = functools.partial(branch_rule, branch_ids)
            position_ids = branch_positions(branch_ids) if position_ids is None else position_ids
        if position_ids is None:
            position_ids = default_positions(tokens, past, attention_mask, document_ids, x.device)
        masks, angles = self._by_kind(rule, position_ids)
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        states = [x]
        for layer, kind, turns in zip(self.layers, self.kinds, self.turns, strict=True):
            rotary, mask = angles[kind] if turns else None, masks[kind]
            if recompute:
                x = checkpoint(layer, x, rotary, mask, None, router_logits, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache, router_logits)
            states = [*states, x] if keep_all else [x]
        states[-1] = self.norm(x)
        return states

    def _by_kind(
        self, rule: Callable[..., Tensor | Documents | None], position_ids: Tensor
    ) -> tuple[dict[str, Tensor | Documents | None], dict[str, tuple[Tensor, Tensor]]]:
        """Mask and rotary angles for full and for sliding layers, each made once."""
        masks, angles = {}, {}
        for kind in dict.fromkeys(self.kinds):
            slides = kind == SLIDING
            masks[kind] = rule(window=self.window if slides else None)
            if slides and self.local_rotary is not None:
                angles[kind] = self.local_rotary(position_ids)
            elif not angles or self.local_rotary is not None:
                angles[kind] = self.rotary(position_ids)
            else:  # the same frequencies
                angles[kind] = next(iter(angles.values()))
        return masks, angles


class CausalLM(nn.Module):
    """Decoder and language-model head.

    Args:
        config: sizes and switches.

    Ref: Touvron et al., arXiv:2302.13971, section 2.2; the families' papers are in families.py.
    """

    grades = True
    """Says that the forward takes `normalizer`, `label_smoothing` and `keep_logits`."""
    kept_dense = (r".*\.mlp\.gate",)
    """Linear layers that are not made 4-bit on load: routers (routing.py)."""

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
        branch_ids: Tensor | None = None,
        logits_to_keep: int | None = None,
        output_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        normalizer: float | None = None,
        label_smoothing: float = 0.0,
        keep_logits: bool = True,
        token_log_probs: bool = False,
        temperature: float = 1.0,
    ) -> ModelOutput:
        """Logits of the next token at every position, and the loss if there are labels.

        Args:
            input_ids: (B, T) token ids; or give inputs_embeds.
            attention_mask: (B, past + T), nonzero for real tokens; None: all are.
            position_ids: (B, T) or (1, T); None: counted over the real tokens.
            labels: (B, T), unshifted, -100 where not graded.
            inputs_embeds: (B, T, C) in place of input_ids.
            cache: keys and values of earlier tokens; the new ones are appended. See
                `switches_after`.
            document_ids: (B, T) integers for packed rows; a document is a run of equal ids, and
                tokens see only their own.
            document_bounds: (N + 1,) int32: where the runs begin in the flattened batch, and B T;
                spares a GPU the wait of counting them.
            branch_ids: (B, T) integers for a prompt with several continuations (data/branches.py):
                0 what all of them share, k > 0 the k-th one, -1 padding; each is a run.
            logits_to_keep: only for the last so many positions; not with labels.
            output_hidden_states: also return the hidden states.
            output_router_logits: also return the experts' load-balancing loss, and add it to the
                loss, times `router_aux_loss_coef`; None: what the configuration says.
            normalizer: what the summed loss is divided by; None: the graded tokens of this batch.
            label_smoothing: of the loss; see `token_cross_entropy`.
            keep_logits: False with labels: the loss alone, and logits are never held whole.
            token_log_probs: with labels: their log-probabilities token by token, with a gradient,
                in place of the loss.
            temperature: of these; logits are divided by it.

        Returns:
            ModelOutput.

        Raises:
            ValueError: arguments that exclude one another, or an attention mask that does not fit.
        """
        self._check(input_ids, inputs_embeds, attention_mask, cache, document_ids, branch_ids)
        if labels is not None and logits_to_keep is not None:
            raise ValueError("labels need every position's logits: leave logits_to_keep out")
        if labels is None and not keep_logits:
            raise ValueError("without labels the logits are all there is: leave keep_logits True")
        if logits_to_keep is not None and logits_to_keep < 1:
            raise ValueError(f"logits_to_keep must be at least 1; got {logits_to_keep}")
        routed = self._routed(output_router_logits)
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.model(
            x,
            attention_mask,
            position_ids,
            cache=cache,
            document_ids=document_ids,
            document_bounds=document_bounds,
            branch_ids=branch_ids,
            keep_all=output_hidden_states,
            router_logits=routed,
        )
        kept = states[-1] if logits_to_keep is None else states[-1][:, -logits_to_keep:]
        logits = self._logits(kept) if keep_logits else None  # (B, T, V)
        loss = by_token = log_probs = None
        grading: dict[str, Any] = {"normalizer": normalizer, "label_smoothing": label_smoothing}
        if labels is not None and token_log_probs:
            log_probs = self._log_probs(kept, logits, labels, temperature)
        elif labels is not None and logits is not None:
            loss, by_token = token_mean(logits, labels, **grading)
        elif labels is not None:
            loss, by_token = linear_token_cross_entropy(
                kept, self.lm_head, labels, **grading, **self._scaling()
            )
        hidden = tuple(states) if output_hidden_states else None
        aux = None
        if routed:
            mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :]
            aux = balance_loss(routed, self.config.num_experts_per_tok, mask)
        if aux is not None and loss is not None and labels is not None:
            share = 1.0 if normalizer is None else (labels[:, 1:] != -100).sum() / normalizer
            loss = loss + self.config.router_aux_loss_coef * share * aux
        return ModelOutput(logits, loss, hidden, by_token, log_probs, aux)

    def _scaling(self) -> dict[str, Any]:
        """What becomes of the head's output, for losses that take the hidden states."""
        config = self.config
        return {"softcap": config.final_logit_softcapping, "scale": 1 / config.logits_scaling}

    def _log_probs(
        self, hidden: Tensor, logits: Tensor | None, labels: Tensor, temperature: float
    ) -> Tensor:
        """(B, T): each position's log p of the next label, from logits where there are."""
        if logits is not None:
            return label_log_probs(logits, labels, temperature=temperature)
        scaling = self._scaling()
        return linear_log_probs(hidden, self.lm_head, labels, temperature=temperature, **scaling)

    def _routed(self, asked: bool | None) -> list[Tensor] | None:
        """Where the layers put their routers' outputs, if these are asked for."""
        if not (self.config.output_router_logits if asked is None else asked):
            return None
        if not any(layer.has_experts for layer in self.model.layers):
            raise ValueError(f"output_router_logits: this {self.config.model_type} has no experts")
        return []

    def _logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V): the head's output, divided and capped as the configuration says."""
        logits, cap = self.lm_head(hidden), self.config.final_logit_softcapping
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _check(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
        document_ids: Tensor | None,
        branch_ids: Tensor | None,
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, tokens = given.shape[:2]
        seen = tokens + (0 if cache is None else cache.length)
        if cache is not None and cache.fixed is not None:
            seen = cache.fixed[1]  # a buffer of constant shape: the mask covers all of it
        if attention_mask is not None and attention_mask.shape != (batch, seen):
            raise ValueError(
                f"attention_mask must have shape ({batch}, {seen}), past and new tokens; "
                f"got {tuple(attention_mask.shape)}"
            )
        for name, ids in (("document_ids", document_ids), ("branch_ids", branch_ids)):
            if ids is not None and cache is not None:
                raise ValueError(f"{name} are for training rows: not with a cache")
            if ids is not None and ids.shape != (batch, tokens):
                raise ValueError(
                    f"{name} must have shape ({batch}, {tokens}); got {tuple(ids.shape)}"
                )
        if document_ids is not None and branch_ids is not None:
            raise ValueError("give either document_ids or branch_ids: a row is packed or branches")

    def init_weights(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Fresh weights: normal with deviation `std`, biases 0, norms that only normalise.

        Args:
            std: standard deviation.
            generator: source of randomness on the weights' device; None: torch's global one.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Experts):
                module.init_weights(std, generator)
            if isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, module.neutral)

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
    def switches_after(self) -> int | None:
        """Tokens up to which a text's cached keys stay good; None: they always do.

        A longer one turns all of them by other frequencies (longrope), so that whoever lets a
        cached text grow past it runs it anew, as `generate` does.
        """
        return self.model.rotary.switches_after

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
