"""Mixture of experts: each token goes through a few of many feed-forward layers (Qwen3-MoE).

    p = softmax(x Wᵣᵀ)                            in float32, (M, E)
    y = sum over the k largest p_e of  p_e expert_e(x)      p divided by their sum, if so configured
    expert(x) = down(act(gate(x)) * up(x))

The parameters are transformers 5's: all experts of a layer are two tensors, `experts.gate_up_proj`
(E, 2 I, C), gate's rows over up's, and `experts.down_proj` (E, C, I); on disk each matrix lies by
itself (checkpoint/names.py). Tokens are sorted by expert, so that an expert's rows are a slice, and
each product is one operator over all experts (lora_kernels/grouped.py). The way there and back is a
permutation and a sum over k, not an index with repetitions, whose gradient a GPU would add up in an
order of its own.

Against transformers' loop over experts: one gather for all of them, no mask per expert, the k
contributions of a token added in float32 and rounded once.

The router stays dense in a 4-bit model: it is 1/2300 of a Qwen3-30B-A3B layer's weights, and its
error is not an error of a product but another choice of experts.

Ref: Shazeer et al. 2017, arXiv:1701.06538, section 2; Fedus et al. 2021 (Switch Transformer),
arXiv:2101.03961, equations 4 to 6; Qwen Team 2025, arXiv:2505.09388, section 2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_core.models.attention import cast_once
from lora_core.models.config import ModelConfig
from lora_core.models.gating import gated
from lora_kernels import grouped_linear, groups_of

__all__ = ["ExpertMLP", "Experts", "Router", "Update", "balance_loss"]

Update = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""What changes an expert's product: (parameter, y (n, N), x (n, K), expert of each row (n,)) -> y.
"""


class Router(nn.Linear):
    """Scores of the experts, (M, C) to (M, E); a linear layer that is never made 4-bit."""

    kept_dense = "the router: its error is another choice of experts"

    def __init__(self, config: ModelConfig) -> None:
        assert config.num_experts is not None
        super().__init__(config.hidden_size, config.num_experts, bias=False)


class Experts(nn.Module):
    """The experts of one layer.

    Args:
        config: sizes.

    Attributes:
        gate_up_proj: (E, 2 I, C).
        down_proj: (E, C, I).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, inner, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
        assert count is not None
        assert inner is not None
        self.num_experts, self.act = count, config.hidden_act
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        self.init_weights(config.initializer_range)

    def forward(
        self, x: Tensor, index: Tensor, weights: Tensor, updates: Sequence[Update] = ()
    ) -> Tensor:
        """Send each row through its experts.

        Args:
            x: (M, C).
            index: (M, k) int64, k different experts for each row.
            weights: (M, k), what their outputs are multiplied by.
            updates: what adapters add to the products, in order.

        Returns:
            (M, C), in the dtype of x (autocast's when active).
        """
        x = cast_once(x)
        count, k = index.shape
        expert, order = index.flatten().sort(stable=True)  # (M k,)
        rows = x.repeat_interleave(k, dim=0).index_select(0, order)  # (M k, C)
        gate_up, down = self.products(expert, x.dtype)
        y = _updated(updates, "gate_up_proj", gate_up(rows), rows, expert)  # (M k, 2 I)
        gate, up = y.chunk(2, dim=-1)  # (M k, I)
        inner = gated(gate, up, self.act)
        y = _updated(updates, "down_proj", down(inner), inner, expert)  # (M k, C)
        every = torch.arange(len(order), device=x.device)
        back = torch.empty_like(order).scatter_(0, order, every)
        y = y.index_select(0, back).view(count, k, -1)
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)

    def products(
        self, expert: Tensor, dtype: torch.dtype
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The two products of all experts with rows sorted by expert.

        Args:
            expert: (n,) int64, ascending: that of each row.
            dtype: of the rows.

        Returns:
            Functions from (n, C) to (n, 2 I) and from (n, I) to (n, C).
        """
        gate_up, down = (w.to(dtype) for w in (self.gate_up_proj, self.down_proj))
        groups = groups_of(expert, self.num_experts, gate_up)
        return (
            lambda x: grouped_linear(x, gate_up, groups),
            lambda x: grouped_linear(x, down, groups),
        )

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Fresh weights, normal with deviation `std`."""
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=std, generator=generator)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        (_, inner, width) = self.gate_up_proj.shape
        return f"experts={self.num_experts}, width={width}, inner={inner // 2}"


def _updated(updates: Sequence[Update], name: str, y: Tensor, x: Tensor, expert: Tensor) -> Tensor:
    for update in updates:
        y = update(name, y, x, expert)
    return y


class ExpertMLP(nn.Module):
    """A layer's feed-forward part: a router and experts, under transformers' names.

    Args:
        config: sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)
        self.top_k, self.normalized = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """Map x (B, T, C) to (B, T, C).

        Args:
            x: (B, T, C).
            router_logits: gets the router's (M, E), M = B T.
        """
        rows = cast_once(x).flatten(0, -2)
        logits = self.gate(rows)
        if router_logits is not None:
            router_logits.append(logits)
        index, weights = route(logits, self.top_k, self.normalized)
        return self.experts(rows, index, weights).view(x.shape)


def route(logits: Tensor, count: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts of each row.

    Args:
        logits: (M, E).
        count: k.
        normalized: whether the chosen weights are divided by their sum.

    Returns:
        Index (M, k) int64 and weights (M, k) in the dtype of the logits, differentiable.
    """
    # float32 for float64 too, as transformers has it
    weights, index = logits.softmax(-1, dtype=torch.float32).topk(count, dim=-1)
    if normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return index, weights.to(logits.dtype)


def balance_loss(
    router_logits: Sequence[Tensor], count: int, attention_mask: Tensor | None
) -> Tensor:
    """How unevenly the experts are used: E sum_e f_e P_e over the tokens of all layers.

    f_e is the share of tokens that are sent to expert e (k in sum over e), P_e the mean of its
    probability; only P_e has a gradient. Even use gives k.

    Args:
        router_logits: of each layer with experts, (M, E).
        count: k.
        attention_mask: (B, T), nonzero for real tokens, M = B T; None: all are.

    Returns:
        A float32 scalar.

    Ref: Switch Transformer, arXiv:2101.03961, equations 4 to 6.
    """
    logits = torch.stack(list(router_logits)).float()  # (L, M, E)
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities)
    chosen.scatter_(-1, probabilities.detach().topk(count, dim=-1).indices, 1.0)
    if attention_mask is None:
        share, mean = chosen.mean((0, 1)), probabilities.mean((0, 1))  # (E,)
    else:
        real = attention_mask.flatten().to(logits)[None, :, None]
        tokens = real.sum() * len(logits)
        share = (chosen * real).sum((0, 1)) / tokens
        mean = (probabilities * real).sum((0, 1)) / tokens
    return logits.shape[-1] * (share * mean).sum()
