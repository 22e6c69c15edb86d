"""What stands on an encoder: heads for sequences, tokens, spans, masked tokens; their losses.

    sequence    one label, several, or numbers for a whole text; from the first token
    token       a label for every token
    span        where an answer begins and ends
    masked      the word under a mask, as in pretraining

The names on disk are kept, so the heads differ by family where the checkpoints do: BERT classifies
the trunk's pooled first token, RoBERTa has a dense layer in the head; the masked-token head is
`cls.predictions` in one and `lm_head` in the other.

Ref: Devlin et al. 2019, arXiv:1810.04805, sections 3.1 (masked tokens) and 4 (the other heads; the
span's loss in 4.2).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.models.activations import ACTIVATIONS
from lora_core.models.encoder import Encoder, EncoderModel, EncoderOutput
from lora_core.models.encoder_config import EncoderConfig
from lora_core.models.encoder_files import has_pooler, head_attribute
from lora_core.models.encoder_losses import class_loss, sequence_loss, span_loss
from lora_core.targets import unwrap


class _WithHead(EncoderModel):
    """An encoder and a head."""

    head: ClassVar[str]

    def __init__(self, config: EncoderConfig) -> None:
        if config.head != self.head:
            raise ValueError(f"{type(self).__name__} has the head {self.head!r}; got {config.head}")
        super().__init__(config)
        self.add_module(config.family.prefix, Encoder(config, pooler=has_pooler(config)))

    def get_output_head(self) -> nn.Module | None:
        """The head."""
        name = head_attribute(self.config)
        return None if name is None else self.get_submodule(name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: as in `Encoder.forward`, like those that follow.
            attention_mask: (B, T).
            token_type_ids: (B, T).
            position_ids: (B, T) or (1, T).
            inputs_embeds: (B, T, C).
            labels: of a sequence (B,), or (B, labels) for several at once and for numbers; of
                tokens (B, T), -100 where not graded.
            output_hidden_states: also return every layer's output.

        Returns:
            EncoderOutput.

        Raises:
            ValueError: what `Encoder.forward` refuses, or labels that do not fit.
        """
        trunk = self.get_submodule(self.config.family.prefix)  # or a host around it
        out = trunk(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        logits = self.score(out)
        loss = None if labels is None else self.loss(logits, labels)
        return EncoderOutput(logits, loss, out.hidden_states)

    def score(self, out: EncoderOutput) -> Tensor:
        """Logits of the trunk's output."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (…, n), a scalar."""
        return class_loss(logits, labels)


class DenseHead(nn.Module):
    """out_proj(tanh(dense(x))) of the first token, with dropout before each: RoBERTa's."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, labels)."""
        x = torch.tanh(self.dense(self.dropout(x[:, 0])))
        return self.out_proj(self.dropout(x))


class SequenceClassifier(_WithHead):
    """A label, several labels or numbers for each text.

    Args:
        config: with head "sequence".
    """

    head = "sequence"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.classifier: nn.Module
        if config.family.pooled:
            self.dropout = nn.Dropout(config.head_dropout)
            self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        else:
            self.classifier = DenseHead(config)

    def score(self, out: EncoderOutput) -> Tensor:
        """(B, labels)."""
        if out.pooler_output is None:
            return self.classifier(out.last_hidden_state)
        return self.classifier(self.dropout(out.pooler_output))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, binary cross-entropy or mean square error, as the problem is."""
        return sequence_loss(logits, labels, self.config.problem_type)


class TokenClassifier(_WithHead):
    """A label for each token.

    Args:
        config: with head "token".
    """

    head = "token"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def score(self, out: EncoderOutput) -> Tensor:
        """(B, T, labels)."""
        return self.classifier(self.dropout(out.last_hidden_state))


class SpanFinder(_WithHead):
    """Where in a text an answer begins and ends.

    Args:
        config: with head "span".
    """

    head = "span"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)

    def score(self, out: EncoderOutput) -> Tensor:
        """(B, T, 2)."""
        return self.qa_outputs(out.last_hidden_state)

    def forward(  # type: ignore[override]  # a span's labels are two positions
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Logits of beginning and end at every token, and the loss if both are given.

        Args:
            input_ids: as in `Encoder.forward`, like those that follow.
            attention_mask: (B, T).
            token_type_ids: (B, T).
            position_ids: (B, T) or (1, T).
            inputs_embeds: (B, T, C).
            start_positions: (B,), the answer's first token; T and beyond: not graded, as the
                answer was cut off; below 0: 0, where texts without an answer point.
            end_positions: (B,), its last token.
            output_hidden_states: also return every layer's output.

        Returns:
            EncoderOutput.

        Raises:
            ValueError: what `Encoder.forward` refuses, or one position without the other.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither")
        out = super().forward(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        if start_positions is not None and end_positions is not None:
            assert out.logits is not None
            begin, end = out.logits.unbind(-1)  # (B, T) each
            out.loss = (span_loss(begin, start_positions) + span_loss(end, end_positions)) / 2
        return out


class Transform(nn.Module):
    """LayerNorm(act(dense(x))): the first half of BERT's masked-token head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        return self.LayerNorm(self.act(self.dense(x)))


class BertPredictions(nn.Module):
    """decoder(transform(x)): what `cls.predictions` is."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, V)."""
        return self.decoder(self.transform(x))


class BertMaskedHead(nn.Module):
    """What `cls` is: a name around the predictions."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.predictions = BertPredictions(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, V)."""
        return self.predictions(x)


class RobertaMaskedHead(nn.Module):
    """decoder(layer_norm(gelu(dense(x)))): what `lm_head` is."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(size, size)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, V)."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(x))))


class MaskedLM(_WithHead):
    """The word at every token, graded where it was masked.

    Args:
        config: with head "masked".
    """

    head = "masked"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        kind = BertMaskedHead if config.family.masked_head == "cls" else RobertaMaskedHead
        self.add_module(config.family.masked_head, kind(config))
        self.tie_weights()

    @property
    def predictions(self) -> BertPredictions | RobertaMaskedHead:
        """What holds the decoder, inside any hosts."""
        head = unwrap(self.get_submodule(self.config.family.masked_head))
        head = unwrap(head.predictions) if isinstance(head, BertMaskedHead) else head
        assert isinstance(head, BertPredictions | RobertaMaskedHead)
        return head

    def score(self, out: EncoderOutput) -> Tensor:
        """(B, T, V)."""
        return self.get_submodule(self.config.family.masked_head)(out.last_hidden_state)

    def tie_weights(self) -> None:
        """Make the decoder's weight the embedding's own, and its bias the head's, if so configured.

        Untied, the head's own bias is a parameter that nothing reads, as in transformers' files.
        """
        if self.config.tie_word_embeddings:
            self.predictions.decoder.weight = self.trunk.embeddings.word_embeddings.weight
            self.predictions.decoder.bias = self.predictions.bias

    def get_output_embeddings(self) -> nn.Module:
        """The decoder."""
        return self.predictions.decoder
