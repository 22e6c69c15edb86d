"""The layers of a decoder: attention and a gated feed-forward part, with norms around them."""

import math

import torch
from torch import Tensor, nn

from lora_core.models.attention import Attention, cast_once
from lora_core.models.cache import KVCache
from lora_core.models.config import DTYPES, ModelConfig
from lora_core.models.experts import ExpertMLP
from lora_core.models.families import PLACES
from lora_core.models.gating import gated
from lora_core.models.norm import norm_of
from lora_kernels import Documents


class MLP(nn.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x)).

    For SiLU and GELU's tanh form what is kept of the product is gate(x) and up(x) alone.

    Ref: Shazeer, arXiv:2002.05202, equation 6.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.is_one = config.family.fused_projections
        if self.is_one:
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(hidden, inner, bias=bias)
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C)."""
        x = cast_once(x)
        if self.is_one:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (B, T, inner)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up, self.act))


class ScaledEmbedding(nn.Embedding):
    """An embedding times a constant, which is rounded to the weight's dtype first, as Gemma's is.

    Ref: Gemma Team 2024, arXiv:2403.08295; Vaswani et al. 2017, arXiv:1706.03762, section 3.4.
    """

    def __init__(self, rows: int, size: int, scale: float) -> None:
        super().__init__(rows, size)
        self.embed_scale = scale
        # rounded here: a tensor made in forward would be copied to a GPU at each call
        floats = (torch.float64, *DTYPES.values())
        self._rounded = {d: torch.tensor(scale, dtype=d, device="cpu").item() for d in floats}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Embedding's name
        """Look up ids (B, T): (B, T, C)."""
        return self.scaled(super().forward(input))

    def scaled(self, rows: Tensor) -> Tensor:
        """What is made of rows (…, C) of the weight: what stands in their place asks for it."""
        return rows * self._rounded[rows.dtype]


def embedding_of(config: ModelConfig) -> nn.Embedding:
    """The embedding of a model, scaled by sqrt(hidden_size) if its family's is."""
    rows, size = config.vocab_size, config.hidden_size
    if config.family.scaled_embedding:
        return ScaledEmbedding(rows, size, math.sqrt(size))
    return nn.Embedding(rows, size)


class DecoderLayer(nn.Module):
    """x + attention, then x + feed-forward, each with a norm before it, behind it, or both.

        y = x + m norm_2(attention(norm_1(x)))        y + m norm_4(mlp(norm_3(y)))

    Which of the four norms there are is the family's `placement`; m is `residual_multiplier`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.has_experts = config.has_experts(layer)
        self.mlp = ExpertMLP(config) if self.has_experts else MLP(config)
        self.multiplier = config.residual_multiplier
        self.places = PLACES[config.family.placement]
        for name in filter(None, self.places):
            self.add_module(name, norm_of(config, config.hidden_size))

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | Documents | None,
        cache: KVCache | None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Map x (B, T, C) to (B, T, C).

        The next three arguments are `Attention.forward`'s; `router_logits`, if given, gets the
        router's output where the layer has experts.
        """
        x = self._add(x, 1, self.self_attn(self._norm(0, x), rotary, mask, cache))
        asked = () if router_logits is None or not self.has_experts else (router_logits,)
        return self._add(x, 3, self.mlp(self._norm(2, x), *asked))

    def _norm(self, place: int, x: Tensor) -> Tensor:
        name = self.places[place]
        return x if name is None else getattr(self, name)(x)

    def _add(self, x: Tensor, place: int, y: Tensor) -> Tensor:
        y = self._norm(place, y)
        return x + (y if self.multiplier == 1 else y * self.multiplier)
