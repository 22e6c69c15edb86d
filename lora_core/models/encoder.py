"""A bidirectional encoder, built from an `EncoderConfig`, with Hugging Face's parameter names.

    h = LayerNorm(words + types + positions)
    h = LayerNorm(h + dense(attention(h)));  h = LayerNorm(h + dense(act(dense(h))))    each layer

BERT and RoBERTa are one shape: what differs is where positions begin (encoder_layers.py) and what
stands on top (encoder_heads.py). BERT's names are kept, down to `attention.self` and `LayerNorm`,
so that checkpoints load without a table and adapters trained here fit there. Logits equal
transformers' to rounding (tests/oracles/test_encoder.py).

Against transformers: attention is PyTorch's fused operator and nothing else, there are no output
recorders, and no buffers, so that a model built on the meta device lacks nothing but its weights.

Ref: Devlin et al. 2019, arXiv:1810.04805, section 3; Liu et al. 2019, arXiv:1907.11692.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.models.encoder_config import EncoderConfig
from lora_core.models.encoder_files import file_rules
from lora_core.models.encoder_layers import Embeddings, Layers, Pooler, padding_mask
from lora_core.targets import unwrap


@dataclass
class EncoderOutput:
    """What a forward returns."""

    logits: Tensor | None = None
    """(B, labels) of a sequence, (B, T, labels or V) of tokens, (B, T, 2) of spans; or None."""
    loss: Tensor | None = None
    """A scalar, float32; None without labels."""
    hidden_states: tuple[Tensor, ...] | None = None
    """On request (B, T, C) each: the embeddings, then every layer's output."""
    last_hidden_state: Tensor | None = None
    """(B, T, C), of a model without a head."""
    pooler_output: Tensor | None = None
    """(B, C), of a model without a head that has a pooler."""

    @property
    def start_logits(self) -> Tensor | None:
        """(B, T), of a span head: how well each token begins the span."""
        return None if self.logits is None else self.logits[..., 0]

    @property
    def end_logits(self) -> Tensor | None:
        """(B, T), of a span head: how well each token ends the span."""
        return None if self.logits is None else self.logits[..., 1]


class EncoderModel(nn.Module):
    """What encoders with and without a head have in common: weights, and where they come from.

    Args:
        config: sizes and switches.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.expect(config)

    def expect(self, on_disk: EncoderConfig) -> None:
        """Say how names in a folder's files are this model's; what `load_model` asks.

        Args:
            on_disk: the configuration that the folder has.
        """
        rules = file_rules(self.config, on_disk)
        self.names_in_files = rules.names_in_files
        self.unread_in_files = rules.unread_in_files
        self.left_out_in_files = rules.left_out_in_files
        self.fresh_if_absent = rules.fresh_if_absent
        self.kept_dense = rules.kept_dense

    @property
    def trunk(self) -> "Encoder":
        """The encoder under the head."""
        trunk = unwrap(self.get_submodule(self.config.family.prefix))
        assert isinstance(trunk, Encoder)
        return trunk

    def init_weights(
        self, std: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Fresh weights: normal, biases and padding's rows 0, norms 1.

        Args:
            std: standard deviation; None: the configuration's `initializer_range`.
            generator: source of randomness on the weights' device; None: torch's global one.
        """
        self.init_fresh((name for name, _ in self.named_parameters()), std, generator)

    @torch.no_grad()
    def init_fresh(
        self,
        names: Iterable[str],
        std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fresh weights for some parameters: a head that a checkpoint has not.

        Args:
            names: the parameters, which have memory already.
            std: as in `init_weights`.
            generator: as in `init_weights`.
        """
        for name in names:
            parameter = self.get_parameter(name)
            owner = self.get_submodule(name.rpartition(".")[0])
            if name.endswith("bias"):
                parameter.zero_()
            elif isinstance(owner, nn.LayerNorm):
                parameter.fill_(1)
            else:
                parameter.normal_(
                    0, self.config.initializer_range if std is None else std, generator=generator
                )
                if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
                    parameter[owner.padding_idx].zero_()

    def tie_weights(self) -> None:
        """Make the masked-token head's matrix the embedding's own; other heads have none."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer's activations are recomputed in backward instead of kept."""
        return self.trunk.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.trunk.encoder.gradient_checkpointing = on

    @property
    def device(self) -> torch.device:
        """Where the embedding lies."""
        return self.trunk.embeddings.word_embeddings.weight.device

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.trunk.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that ends in the vocabulary, None but for the masked-token head."""
        return None

    def get_output_head(self) -> nn.Module | None:
        """The module that makes logits of the trunk's output, None without one."""
        return None


class Encoder(EncoderModel):
    """Embeddings, layers and pooler: everything but the head.

    Args:
        config: sizes and switches.
        pooler: whether there is one.
    """

    def __init__(self, config: EncoderConfig, pooler: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.pooler = Pooler(config) if pooler else None

    @property
    def trunk(self) -> "Encoder":
        """Itself."""
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Hidden states of all tokens.

        Args:
            input_ids: (B, T) token ids; or give inputs_embeds.
            attention_mask: (B, T), nonzero for real tokens; None: all are.
            token_type_ids: (B, T), which sentence each token is of; None: the first.
            position_ids: (B, T) or (1, T), rows of the position table; None: columns, or, in
                RoBERTa, counted over ids other than padding.
            inputs_embeds: (B, T, C) in place of input_ids.
            output_hidden_states: also return every layer's output.

        Returns:
            EncoderOutput with `last_hidden_state`, and `pooler_output` where there is a pooler.

        Raises:
            ValueError: both or neither of ids and embeddings, shapes that do not fit, or a text
                that is longer than the position table.
        """
        _check(input_ids, inputs_embeds, attention_mask, token_type_ids)
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        states = self.encoder(x, padding_mask(attention_mask), output_hidden_states)
        return EncoderOutput(
            hidden_states=tuple(states) if output_hidden_states else None,
            last_hidden_state=states[-1],
            pooler_output=None if self.pooler is None else self.pooler(states[-1]),
        )


def _check(ids: Tensor | None, x: Tensor | None, mask: Tensor | None, types: Tensor | None) -> None:
    if (ids is None) == (x is None):
        raise ValueError("give either input_ids or inputs_embeds")
    given = ids if ids is not None else x
    assert given is not None
    shape = tuple(given.shape[:2])
    for name, tensor in (("attention_mask", mask), ("token_type_ids", types)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
