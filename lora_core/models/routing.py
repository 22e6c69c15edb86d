"""Which experts a token is sent to, and how evenly they are used.

The router is a linear layer that stays dense in a 4-bit model: it is 1/2300 of the weights of a
layer of Qwen3-30B-A3B, and its error is not an error of a product but another choice of experts.

Ref: Shazeer et al. 2017, arXiv:1701.06538, section 2; Fedus et al. 2021 (Switch Transformer),
arXiv:2101.03961, equations 4 to 6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_core.models.config import ModelConfig

__all__ = ["Router", "balance_loss", "route"]


class Router(nn.Linear):
    """Scores of the experts, (M, C) to (M, E); a linear layer that is never made 4-bit."""

    why_dense = "the router: its error is another choice of experts"
    """Read by `quantize_model`, for its report."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.num_experts is not None
        super().__init__(config.hidden_size, config.num_experts, bias=False)


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
