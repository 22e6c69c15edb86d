"""config.json as a checked, frozen description of a decoder.

Which keys a family reads, what an absent one means and which parts it is made of is the family's
row in families.py; how the two dialects in circulation are read is reading.py's; whether the
values fit together is config_checks.py's. Here are the values themselves. The five sizes that say
which model it is must be there. What the decoder does not implement (an architecture, a RoPE type,
an activation) is refused by name, so no checkpoint is ever run as something it is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lora_core.models.config_checks import (
    DTYPES,
    check_experts,
    check_layers,
    check_ranges,
    check_read,
    check_sizes,
    check_types,
    checked_rope,
    required,
)
from lora_core.models.families import FAMILIES, Family
from lora_core.models.reading import from_config_json, read_values, unknown, write_values

__all__ = ["DTYPES", "ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a decoder, with Hugging Face's names.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
        TypeError: a value of the wrong type.
    """

    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the gated feed-forward layer."""
    num_hidden_layers: int
    """Number of decoder layers."""
    num_attention_heads: int
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (grouped-query attention); None: one per query head."""
    head_dim: int | None = None
    """Channels per head, even; None: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    """Activation of the feed-forward gate."""
    max_position_embeddings: int = 2048
    """Longest sequence of the pretraining, in tokens; not enforced."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    """`rope_type`, `rope_theta` and that type's own keys; or, where the family has it so, such a
    mapping for each layer type. Empty: the plain rotation with the family's theta."""
    no_rope_layers: tuple[int, ...] | None = None
    """1 for each layer that rotates queries and keys, 0 for one that does not; None: all do."""
    layer_types: tuple[str, ...] | None = None
    """"full_attention" or "sliding_attention" for each layer; None: as the family has it."""
    sliding_window: int | None = None
    """Tokens that a sliding layer sees, the present one included; None: no layer slides."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have a bias."""
    mlp_bias: bool = False
    """Whether gate, up and down projections have a bias."""
    attention_dropout: float = 0.0
    """Dropout of attention weights in training mode, a probability."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its square root; None: head_dim."""
    attention_multiplier: float | None = None
    """Factor on the scores, in the place of 1 / sqrt(head_dim); None: that."""
    attn_logit_softcapping: float | None = None
    """c: scores become c · tanh(score / c); None: no cap."""
    final_logit_softcapping: float | None = None
    """The same for the logits."""
    embedding_multiplier: float = 1.0
    """Factor on the embeddings."""
    residual_multiplier: float = 1.0
    """Factor on what a layer's two parts add to the residual stream."""
    logits_scaling: float = 1.0
    """What logits are divided by."""
    num_experts: int | None = None
    """Experts of a mixture-of-experts layer; None: the feed-forward layers are dense."""
    num_experts_per_tok: int = 8
    """Experts that each token is sent to."""
    moe_intermediate_size: int | None = None
    """Width of an expert."""
    norm_topk_prob: bool = False
    """Whether the chosen experts' weights are made to sum to 1."""
    decoder_sparse_step: int = 1
    """Every so many layers one has experts."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers without experts, by number."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss."""
    output_router_logits: bool = False
    """Whether the load-balancing loss is computed, and added to the loss."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding's own weight."""
    bos_token_id: int | None = 1
    """Token that starts a text, where the tokenizer adds one."""
    eos_token_id: int | tuple[int, ...] | None = 2
    """Token or tokens that end a text."""
    pad_token_id: int | None = None
    """Padding token."""
    dtype: str | None = None
    """Floating dtype of the weights on disk, a key of `DTYPES`; None: not said."""
    model_type: str = "llama"
    """Family: a key of `FAMILIES`."""

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(self)
        if self.model_type not in FAMILIES:
            raise ValueError(unknown("model_type", self.model_type, FAMILIES))
        check_read(self)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", tuple(self.family.layer_types(vars(self))))
        check_ranges(self)
        object.__setattr__(self, "rope_parameters", checked_rope(self))
        check_layers(self)
        check_experts(self)

    @property
    def family(self) -> Family:
        """What the sizes do not say."""
        return FAMILIES[self.model_type]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, channels per head."""
        assert self.num_key_value_heads is not None  # both are set by __post_init__
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """`layer_types`, which is always filled in."""
        assert self.layer_types is not None  # by __post_init__
        return self.layer_types

    @property
    def attention_scale(self) -> float | None:
        """Factor on the scores; None: 1 / sqrt(head_dim)."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        width = self.query_pre_attn_scalar
        return None if width is None else 1 / math.sqrt(width)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, () if there is none."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else ids

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is a mixture of experts."""
        if self.num_experts is None or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    def with_layers(self, count: int) -> Self:
        """The same with another number of layers: the first ones and the last; for more, in turn.

        Args:
            count: number of layers, at least 1.
        """
        layers = self.num_hidden_layers
        # a family whose kinds follow from the number has those of the first layers
        last = [layers - 1] if "layer_types" in self.family.keys and count <= layers else []
        order = [*(i % layers for i in range(count - len(last))), *last]
        kinds = tuple(self.kinds[i] for i in order)
        turns = self.no_rope_layers
        if turns is not None:
            turns = tuple(turns[i] for i in order)
        return dataclasses.replace(
            self, num_hidden_layers=count, layer_types=kinds, no_rope_layers=turns
        )

    @classmethod
    def from_folder(cls, directory: str | Path) -> Self:
        """Read `config.json` of a Hugging Face folder.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: it is no JSON object, or describes what this library cannot run.
        """
        return from_config_json(directory, cls.from_dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Build from config.json's content, in either dialect; unknown keys are left out.

        Raises:
            ValueError: unknown architecture, missing size, value out of range.
            TypeError: value of the wrong type.
        """
        values = read_values(raw)
        for key in required(cls):
            if key not in values:
                raise ValueError(f"the key {key} is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Content of a config.json that transformers 5 and this library load."""
        return write_values(self)
