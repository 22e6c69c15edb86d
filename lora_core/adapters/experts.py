"""LoRA on experts: a pair for each of the many matrices that one parameter holds.

    y_i = W_e x_i + s·B_e A_e D(x_i)     e the expert of row i;  A (E, r, K), B (E, N, r)

The experts of a layer are one module with a parameter for each of their products, and what happens
between the products is not linear. So the adapter does not add to the module's output: it stands in
the module's call (`replace`) and hands down what is to be added to each product. Several add up.

The module is known by what it can do: `expert_shapes` {parameter: (E, N, K)}, a call that takes
`updates`, and `changed(deltas, dtype)`, itself with something added to its weights, for merging.
4-bit experts do as well as dense ones, and the adapter is the same.

On disk (PEFT's `target_parameters`): PEFT wraps the module once for each parameter, so that the
last one's pair lies at the module's name and the one before under `base_layer`:

    lora_A.weight (E r, K), expert by expert      lora_B.weight (N, r E), rank by rank

PEFT adds s·B A to all of W in every forward, E N K numbers, and so allows no dropout; here the two
small products follow the rows, and D is the usual dropout.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1, expert by expert.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.lora import check_lora
from lora_kernels import grouped_linear
from lora_kernels.grouped import Groups

__all__ = ["ExpertLoRA", "ExpertPair", "has_experts"]


def has_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the sense of this file."""
    return callable(getattr(module, "changed", None)) and isinstance(
        getattr(module, "expert_shapes", None), dict
    )


class ExpertPair(nn.Module):
    """The pairs of all experts for one parameter.

    Args:
        shape: E, N, K of the parameter.
        r: rank of each expert's pair.
        alpha: numerator of the scaling.
        init: start of A: "kaiming" or "gaussian", expert by expert as LoRA's; B starts at zero.
        use_rslora: scale by alpha / sqrt(r).

    Attributes:
        A: (E, r, K) float32.
        B: (E, N, r) float32.
        scaling: s.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, shape: tuple[int, int, int], r: int, alpha: float, init: str, use_rslora: bool
    ) -> None:
        super().__init__()
        check_lora(r, alpha, 0.0, init)
        experts, rows, columns = shape
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.A = nn.Parameter(torch.empty(experts, r, columns, **options))
        self.B = nn.Parameter(torch.zeros(experts, rows, r, **options))
        bound = 1 / math.sqrt(columns)
        if init == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.uniform_(self.A, -bound, bound)

    def add(self, y: Tensor, x: Tensor, groups: Groups, dropout: float) -> Tensor:
        """y (n, N) and the update of x (n, K), rows sorted by expert; with B = 0 y, bit for bit."""
        dtype = x.dtype
        inner = grouped_linear(F.dropout(x, dropout) if dropout else x, self.A.to(dtype), groups)
        update = grouped_linear(inner, (self.B * self.scaling).to(dtype), groups)
        return y - (0.0 - update.to(y.dtype))

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s·B A of every expert, (E, N, K)."""
        return torch.bmm(self.B.to(dtype) * self.scaling, self.A.to(dtype))

    def on_disk(self) -> dict[str, Tensor]:
        """PEFT's two matrices; copies."""
        return {
            "lora_A.weight": self.A.flatten(0, 1),
            "lora_B.weight": self.B.permute(1, 2, 0).flatten(1),
        }

    def take(self, down: Tensor, up: Tensor) -> None:
        """Fill from PEFT's two matrices."""
        experts, rows, r = self.B.shape
        self.A.copy_(down.view_as(self.A))
        self.B.copy_(up.view(rows, r, experts).permute(2, 0, 1))

    def extra_repr(self) -> str:
        """Say how many, rank and scaling."""
        return f"experts={len(self.A)}, r={self.r}, scaling={self.scaling:g}"


class ExpertLoRA(Adapter):
    """LoRA at the experts of one layer.

    Args:
        pairs: by parameter, in the module's order.
        dropout: probability of dropping an element of what the pairs see, in training.
    """

    additive = True
    replaces = True
    mixes = None

    def __init__(self, pairs: Mapping[str, ExpertPair], dropout: float = 0.0) -> None:
        super().__init__()
        self.pairs = nn.ModuleDict(pairs)
        self.dropout = dropout

    def check_ranks(self, site: str) -> None:
        """Refuse a rank above the size of an expert's matrix; ValueError names the parameter."""
        for name in self.pairs:
            pair = self.pair(name)
            if pair is not None and pair.r > (least := min(pair.B.shape[1], pair.A.shape[2])):
                raise ValueError(
                    f"r = {pair.r} is above the size of an expert's matrix in '{site}.{name}', "
                    f"{least}: lower it with rank_pattern, or exclude {site!r}"
                )

    def pair(self, name: str) -> ExpertPair | None:
        """The pairs for a parameter, if there are any."""
        found = self.pairs._modules.get(name)
        assert found is None or isinstance(found, ExpertPair)
        return found

    def replace(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the experts with these pairs among what is added, before those of later adapters."""
        return base(*args, **{**kwargs, "updates": (self.update, *kwargs.get("updates", ()))})

    def update(self, name: str, y: Tensor, x: Tensor, groups: Groups) -> Tensor:
        """A product's output with the update added; see `lora_core.models.experts.Update`."""
        pair = self.pair(name)
        rate = self.dropout if self.training else 0.0
        return y if pair is None else pair.add(y, x, groups, rate)

    def forward(self, x: Any, y: Any, base: nn.Module) -> Any:
        """Return y: the pairs were added inside."""
        return y

    def merged_module(self, base: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return dense experts with the updates in their weights."""
        names = list(self.pairs)
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            deltas = {n: pair.delta(dtype) for n in names if (pair := self.pair(n)) is not None}
            changed = getattr(base, "changed")  # noqa: B009  # an experts module's
            made = changed(deltas, dtype)
        assert isinstance(made, nn.Module)
        return made

    def tensors(self) -> dict[str, Tensor]:
        """Return all pairs under PEFT's names, in PEFT's shapes."""
        return {
            f"{prefix}{key}": tensor
            for name, prefix in self._prefixes().items()
            if (pair := self.pair(name)) is not None
            for key, tensor in pair.on_disk().items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was saved; see `tensors`."""
        for name, prefix in self._prefixes().items():
            if (pair := self.pair(name)) is not None:
                pair.take(tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"])

    def _prefixes(self) -> dict[str, str]:
        """What stands before each parameter's keys: the last is outermost."""
        depth = len(self.pairs) - 1
        return {name: "base_layer." * (depth - number) for number, name in enumerate(self.pairs)}

    def extra_repr(self) -> str:
        """Say the dropout."""
        return f"dropout={self.dropout:g}"
