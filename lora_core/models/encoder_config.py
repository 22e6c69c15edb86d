"""config.json as a checked, frozen description of an encoder: BERT's and RoBERTa's shape.

What differs between the families is a row of a table (encoder_families.py). Which head a folder has
is said by `architectures` alone ("BertForTokenClassification"), so it is a field here, and another
head can be asked for (build.py). As with decoders, the five sizes that say which model it is must
be there; every other absent key takes the default of transformers' configuration class, and what is
not implemented (cross-attention, relative positions, pruned heads) is refused by name, so that no
checkpoint is run as something it is not.

Against transformers: one configuration for all families, where they have a class each; the number
of labels is a field of its own and not counted from `id2label` at each use; and a loss that was
told by the labels' dtype is not written into the configuration, where it would outlive the batch.

Ref: Devlin et al. 2019 (BERT), arXiv:1810.04805; Liu et al. 2019 (RoBERTa), arXiv:1907.11692.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lora_core.models.activations import ACTIVATIONS
from lora_core.models.config_checks import DTYPES, LARGEST, check_types, required
from lora_core.models.encoder_families import (
    ENCODERS,
    HEADS,
    LABELLED,
    EncoderFamily,
    encoder_of,
)
from lora_core.models.reading import unknown

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_LAYERS = 10_000


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and switches of an encoder, with Hugging Face's names.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
        TypeError: a value of the wrong type.
    """

    vocab_size: int
    """Rows of the token embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward layer."""
    num_hidden_layers: int
    """Number of layers."""
    num_attention_heads: int
    """Number of heads; hidden_size / num_attention_heads channels each."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward layer; "gelu" is the exact form."""
    hidden_dropout_prob: float = 0.1
    """Dropout of embeddings and of what a layer's parts add, in training, a probability."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout of attention weights in training, a probability."""
    classifier_dropout: float | None = None
    """Dropout before the head, in training; None: hidden_dropout_prob."""
    max_position_embeddings: int = 512
    """Rows of the position table; RoBERTa's first pad_token_id + 1 belong to no token."""
    type_vocab_size: int = 2
    """Rows of the token type table: sentence A, sentence B."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""
    layer_norm_eps: float = 1e-12
    """Added to the variance inside LayerNorm."""
    pad_token_id: int | None = 0
    """Padding token: its row of the embedding gets no gradient."""
    tie_word_embeddings: bool = True
    """Whether the masked-token head's matrix is the embedding's own weight."""
    num_labels: int = 2
    """Outputs of a classification head; 2 for spans, start and end."""
    labels: tuple[str, ...] | None = None
    """Their names; None: LABEL_0, LABEL_1, …"""
    problem_type: str | None = None
    """The sequence head's loss, one of `PROBLEMS`; None: told by num_labels and labels' dtype."""
    dtype: str | None = None
    """Floating dtype of the weights on disk, a key of `DTYPES`; None: not said."""
    head: str | None = None
    """A key of `HEADS`; None: config.json names no architecture, and none is built."""
    model_type: str = "bert"
    """Family: a key of `ENCODERS`."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_names(self)
        _check_sizes(self)
        _check_ranges(self)

    @property
    def family(self) -> EncoderFamily:
        """What the sizes do not say."""
        return ENCODERS[self.model_type]

    @property
    def first_position(self) -> int:
        """Position of a text's first token."""
        assert self.pad_token_id is not None or not self.family.counts_tokens  # `_check_ranges`
        return (self.pad_token_id or 0) + 1 if self.family.counts_tokens else 0

    @property
    def head_dropout(self) -> float:
        """Dropout before the head, in training, a probability."""
        rate = self.classifier_dropout
        return self.hidden_dropout_prob if rate is None else rate

    @property
    def label_names(self) -> tuple[str, ...]:
        """A name for each output of a classification head."""
        return self.labels or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build from config.json's content; unknown keys are left out.

        Raises:
            ValueError: unknown architecture, missing size, value out of range.
            TypeError: value of the wrong type.
        """
        model_type, head = encoder_of(raw)
        _refuse(raw)
        values: dict[str, Any] = {"pad_token_id": ENCODERS[model_type].pad_token_id}
        missing = dataclasses.MISSING
        for f in dataclasses.fields(cls):
            if raw.get(f.name) is not None and f.name not in ("labels", "head", "dtype"):
                values[f.name] = raw[f.name]
            elif f.default is missing:
                raise ValueError(f"the key {f.name} is missing")
        if "pad_token_id" in raw:  # here null has a meaning
            values["pad_token_id"] = raw["pad_token_id"]
        values["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
        values |= _labels(raw)
        return cls(**values | {"model_type": model_type, "head": head})

    def to_dict(self) -> dict[str, Any]:
        """Content of a config.json that transformers and this library load."""
        raw = dataclasses.asdict(self)
        for key in ("head", "labels", "num_labels"):
            del raw[key]
        if self.problem_type is None:
            del raw["problem_type"]
        raw["architectures"] = [self.family.architecture + HEADS[self.head or "none"]]
        if self.head in LABELLED:
            raw["id2label"] = {str(i): name for i, name in enumerate(self.label_names)}
            raw["label2id"] = {name: i for i, name in enumerate(self.label_names)}
        return dict(sorted(raw.items()))

    def with_head(self, head: str | None, num_labels: int | None) -> Self:
        """The same with another head.

        Args:
            head: a key of `HEADS`; None: the same.
            num_labels: its outputs; None: as many as now.

        Returns:
            The configuration; labels' names and the kind of problem stay where the head does.

        Raises:
            ValueError: an unknown head, or labels for one that has none.
        """
        if head is not None and head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, or None; got {head!r}")
        wanted = head or self.head
        if num_labels is not None and wanted not in LABELLED:
            raise ValueError(
                f"num_labels is for the heads {', '.join(LABELLED)}; this one is {wanted or 'none'}"
            )
        count = num_labels
        if count is None:
            count = 2 if wanted == "span" else self.num_labels
        if wanted == self.head and count == self.num_labels:
            return self
        same_kind = wanted == self.head
        return dataclasses.replace(
            self,
            head=wanted,
            num_labels=count,
            labels=None,
            problem_type=self.problem_type if same_kind else None,
        )


def _refuse(raw: Mapping[str, Any]) -> None:
    """What would make it another model than the one that is built here."""
    for key, plain in (("is_decoder", False), ("add_cross_attention", False), ("pruned_heads", {})):
        if raw.get(key):
            raise ValueError(
                f"{key} {raw[key]!r} is not implemented: an encoder here has {key} {plain!r}"
            )
    if (kind := raw.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(unknown("position_embedding_type", kind, ("absolute",)))


def _labels(raw: Mapping[str, Any]) -> dict[str, Any]:
    """How many labels there are, and their names."""
    names, count = raw.get("id2label"), raw.get("num_labels")
    if names is None:
        return {} if count is None else {"num_labels": count}
    try:
        labels = tuple(names[key] for key in sorted(names, key=int))
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"id2label must map numbers to names; got {names!r}") from None
    if count is not None and count != len(labels):
        raise ValueError(f"num_labels is {count}, and id2label has {len(labels)}: correct one")
    return {"num_labels": len(labels), "labels": labels}


def _check_names(config: EncoderConfig) -> None:
    for key, known in (
        ("model_type", tuple(ENCODERS)),
        ("head", (None, *HEADS)),
        ("hidden_act", tuple(ACTIVATIONS)),
        ("problem_type", (None, *PROBLEMS)),
        ("dtype", (None, *DTYPES)),
    ):
        if getattr(config, key) not in known:
            raise ValueError(unknown(key, getattr(config, key), tuple(filter(None, known))))


def _check_sizes(config: EncoderConfig) -> None:
    for key in (
        *required(type(config)),
        "max_position_embeddings",
        "type_vocab_size",
        "num_labels",
    ):
        size = getattr(config, key)
        most = _LAYERS if key == "num_hidden_layers" else LARGEST
        if not 1 <= size <= most:
            rule = "at least 1" if size < 1 else f"at most {most}"
            raise ValueError(f"{key} must be {rule}; got {size}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if config.labels is not None and len(config.labels) != config.num_labels:
        raise ValueError(f"{config.num_labels} labels need as many names; got {config.labels}")
    if config.problem_type == PROBLEMS[1] and config.num_labels == 1:
        raise ValueError(f"problem_type {PROBLEMS[1]!r} needs num_labels above 1; got 1")
    if config.head == "span" and config.num_labels != 2:
        raise ValueError(f"a span head has 2 outputs, start and end; got {config.num_labels}")


def _check_ranges(config: EncoderConfig) -> None:
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        rate = getattr(config, key)
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"{key} must lie in [0, 1); got {rate}")
    if not 0 < config.layer_norm_eps < 1:
        raise ValueError(f"layer_norm_eps must lie in (0, 1); got {config.layer_norm_eps}")
    if not 0 <= config.initializer_range < float("inf"):
        raise ValueError(
            f"initializer_range must be finite and 0 or more; got {config.initializer_range}"
        )
    pad, rows = config.pad_token_id, config.vocab_size
    if config.family.counts_tokens:
        if pad is None:
            raise ValueError(f"{config.model_type} counts positions from pad_token_id: give it")
        rows = min(rows, config.max_position_embeddings - 1)
    if pad is not None and not 0 <= pad < rows:
        raise ValueError(
            f"pad_token_id must lie in 0 … {rows - 1} (vocab_size {config.vocab_size}, "
            f"max_position_embeddings {config.max_position_embeddings}); got {pad}"
        )
