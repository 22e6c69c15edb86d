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

Ref: Shazeer et al. 2017, arXiv:1701.06538, section 2; Qwen Team 2025, arXiv:2505.09388, section 2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_core.models.attention import cast_once
from lora_core.models.config import ModelConfig
from lora_core.models.gating import gated
from lora_core.models.routing import Router, route
from lora_core.quant import NF4Linear, NF4Stack, NF4Tensor
from lora_kernels import grouped_linear, grouped_matmul4, groups_of
from lora_kernels.grouped import Groups

__all__ = [
    "AnyExperts",
    "ExpertMLP",
    "Experts",
    "NF4Experts",
    "Update",
]

MATRICES = ("gate_proj", "up_proj", "down_proj")
"""Of each expert, by their names on disk."""

Product = Callable[[Tensor], Tensor]
Update = Callable[[str, Tensor, Tensor, Groups], Tensor]
"""What changes a product: (parameter, y (n, N), x (n, K), groups of the sorted rows) -> y."""


class AnyExperts(nn.Module):
    """The experts of one layer, dense or in 4 bits: what adapters and quantizers ask of them.

    Attributes:
        num_experts: E.
        act: name of the activation.
    """

    num_experts: int
    act: str

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int, int]]:
        """{parameter: (E, N, K)}, in the order of use; of a 4-bit layer, those it stands for."""
        raise NotImplementedError

    def products(self, expert: Tensor, dtype: torch.dtype) -> tuple[Groups, Product, Product]:
        """The two products of all experts with rows sorted by expert.

        Args:
            expert: (n,) int64, ascending: that of each row.
            dtype: of the rows.

        Returns:
            The groups of rows; functions from (n, C) to (n, 2 I) and from (n, I) to (n, C).
        """
        raise NotImplementedError

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
        groups, gate_up, down = self.products(expert, x.dtype)
        y = _updated(updates, "gate_up_proj", gate_up(rows), rows, groups)  # (M k, 2 I)
        gate, up = y.chunk(2, dim=-1)  # (M k, I)
        inner = gated(gate, up, self.act)
        y = _updated(updates, "down_proj", down(inner), inner, groups)  # (M k, C)
        back = torch.empty_like(order)
        back.scatter_(0, order, torch.arange(len(order), device=x.device))
        y = y.index_select(0, back).view(count, k, y.shape[-1])
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)

    def dense_module(self, dtype: torch.dtype = torch.float32) -> "Experts":
        """Frozen dense experts of the same weights in `dtype`."""
        raise NotImplementedError

    def changed(self, deltas: Mapping[str, Tensor], dtype: torch.dtype) -> "Experts":
        """Frozen dense experts with something added to their weights; these stay as they are.

        Args:
            deltas: by parameter, (E, N, K) in `dtype`.
            dtype: of the sum.
        """
        made = self.dense_module(dtype)
        for name, delta in deltas.items():
            weight = made.get_parameter(name)
            setattr(made, name, nn.Parameter(weight + delta, requires_grad=False))
        return made

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        count, width, inner = self.expert_shapes["down_proj"]
        return f"experts={count}, width={width}, inner={inner}"


class Experts(AnyExperts):
    """Dense experts.

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

    @classmethod
    def of(cls, gate_up_proj: Tensor, down_proj: Tensor, act: str) -> Self:
        """Frozen experts of given weights, which are not copied."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.num_experts, made.act = len(down_proj), act
        made.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)
        made.down_proj = nn.Parameter(down_proj, requires_grad=False)
        return made

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int, int]]:
        """See `AnyExperts`."""
        (e, n, k), (_, c, i) = self.gate_up_proj.shape, self.down_proj.shape
        return {"gate_up_proj": (e, n, k), "down_proj": (e, c, i)}

    def products(self, expert: Tensor, dtype: torch.dtype) -> tuple[Groups, Product, Product]:
        """See `AnyExperts`."""
        gate_up, down = (w.to(dtype) for w in (self.gate_up_proj, self.down_proj))
        groups = groups_of(expert, self.num_experts, gate_up)
        return (
            groups,
            lambda x: grouped_linear(x, gate_up, groups),
            lambda x: grouped_linear(x, down, groups),
        )

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Fresh weights, normal with deviation `std`."""
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(parameter, std=std, generator=generator)

    def dense_module(self, dtype: torch.dtype = torch.float32) -> "Experts":
        """See `AnyExperts`; weights of that dtype are shared."""
        gate_up, down = (w.detach().to(dtype) for w in (self.gate_up_proj, self.down_proj))
        return Experts.of(gate_up, down, self.act).train(self.training)

    def matrices(self) -> dict[str, Tensor]:
        """{"3.gate_proj": (I, C)}: each expert's matrices by their names on disk; views."""
        found: dict[str, Tensor] = {}
        whole = zip(self.gate_up_proj.detach(), self.down_proj.detach(), strict=True)
        for number, (gate_up, down) in enumerate(whole):
            gate, up = gate_up.chunk(2)
            named = zip(MATRICES, (gate, up, down), strict=True)
            found |= {f"{number}.{name}": matrix for name, matrix in named}
        return found

    def with_4bit(self, parts: Mapping[str, NF4Tensor]) -> "NF4Experts":
        """What takes this module's place in 4 bits.

        Args:
            parts: each expert's matrices, by the names of `matrices`.
        """
        count = range(self.num_experts)
        gate, up, down = (
            NF4Stack([parts[f"{number}.{name}"] for number in count]) for name in MATRICES
        )
        return NF4Experts(gate, up, down, self.act).train(self.training)


class NF4Experts(AnyExperts):
    """Experts in 4 bits, frozen; differentiable in x.

    Args:
        gate_proj: of matrices (I, C).
        up_proj: of matrices (I, C).
        down_proj: of matrices (C, I).
        act: name of the activation.
    """

    def __init__(
        self, gate_proj: NF4Stack, up_proj: NF4Stack, down_proj: NF4Stack, act: str
    ) -> None:
        super().__init__()
        self.num_experts, self.act = len(gate_proj), act
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int, int]]:
        """See `AnyExperts`."""
        inner, width = self.gate_proj.out_features, self.gate_proj.in_features
        count = self.num_experts
        return {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}

    @property
    def precision(self) -> str:
        """The format in words."""
        return self.gate_proj.precision

    @property
    def format_4bit(self) -> dict[str, Any]:
        """The format as options of `quantize_4bit`, for those that make such experts anew."""
        stack = self.gate_proj
        double = stack.scale_absmax is not None
        return {"code": stack.codebook, "block_size": stack.block_size, "double_quant": double}

    def products(self, expert: Tensor, dtype: torch.dtype) -> tuple[Groups, Product, Product]:
        """See `AnyExperts`; gate and up are 4-bit matrices of their own, multiplied one by one."""
        groups = groups_of(expert, self.num_experts)
        gate, up, down = (s.weight4 for s in (self.gate_proj, self.up_proj, self.down_proj))

        def gate_up(x: Tensor) -> Tensor:
            both = (grouped_matmul4(x, gate, groups), grouped_matmul4(x, up, groups))
            return torch.cat(both, dim=-1)

        return groups, gate_up, lambda x: grouped_matmul4(x, down, groups)

    def matrix_layer(self, name: str) -> NF4Linear:
        """One matrix as a layer, by its name on disk ("3.gate_proj"); shares memory."""
        number, _, matrix = name.partition(".")
        stack = getattr(self, matrix)
        assert isinstance(stack, NF4Stack)
        return stack.layer(int(number))

    def dense_module(self, dtype: torch.dtype = torch.float32) -> Experts:
        """See `AnyExperts`: what the codes stand for."""
        both = (self.gate_proj.dense(dtype), self.up_proj.dense(dtype))
        made = Experts.of(torch.cat(both, dim=1), self.down_proj.dense(dtype), self.act)
        return made.train(self.training)


def _updated(updates: Sequence[Update], name: str, y: Tensor, x: Tensor, groups: Groups) -> Tensor:
    for update in updates:
        y = update(name, y, x, groups)
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
        self.out_features = config.hidden_size  # the last layer inside, the router, has another
        self.top_k, self.normalized = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor, router_logits: list[Tensor] | None = None) -> Tensor:
        """Map x (B, T, C) to (B, T, C).

        Args:
            x: (B, T, C).
            router_logits: gets the router's (M, E), M = B T.
        """
        x = cast_once(x)
        logits = self.gate(x).flatten(0, -2)  # (M, E)
        if router_logits is not None:
            router_logits.append(logits)
        index, weights = route(logits, self.top_k, self.normalized)
        return self.experts(x.flatten(0, -2), index, weights).view(x.shape)
