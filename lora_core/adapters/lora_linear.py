"""The host of a linear layer, with shortcuts to its LoRA pair.

A base that can take the update into its own product does: one with a method

    linear_with_update(x, down, up, scaling, dropout=p) -> y      A, B and s (1,) as float32

as NF4Linear's, which multiplies, adds and rounds in one operator (lora_kernels.lora_linear) and
draws the seed of its dropout; outside training it is called without `dropout`. It is used for
exactly one active pair (and, with stacked pairs and an index for each row of x, inside
`adapter_rows`); several pairs, other kinds, a merged layer, and anything that has to see the base's
output by itself take the sum that `Adapted` writes out.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_core.adapters.host import Adapted
from lora_core.adapters.layers import dense_weight, is_linear, linear_features
from lora_core.adapters.lora import LoRA
from lora_core.calls import offers, watched

__all__ = ["LoRALinear", "dtypes_with_rows"]


def dtypes_with_rows(base: nn.Module) -> tuple[torch.dtype, ...]:
    """In which dtypes a base takes a batch whose rows name their pairs into its product now.

    Args:
        base: any module.

    Returns:
        Dtypes of x, as the base's `row_dtypes()` says; none where it has no such product, or
        where something expects the base to be called.
    """
    if not offers(base, "linear_with_update") or watched(base):
        return ()
    ask = getattr(base, "row_dtypes", None)
    return tuple(ask()) if callable(ask) else ()


class LoRALinear(Adapted):
    """Host of a linear-like module, with shortcuts to its LoRA pair.

    `LoRALinear(linear)` is the layer for use by hand: base frozen, one adapter, active.
    `add_adapter` makes the same host in a whole model.

    Args:
        base: an nn.Linear, NF4Linear, or any linear-like (layers.py); its parameters are frozen.
        r: rank.
        alpha: scaling is alpha / r.
        dropout: on the adapter's input, in training.
        init: "kaiming" or "gaussian".
        name: name of the adapter.

    Raises:
        TypeError: base is not linear-like.
        ValueError: rank, dropout or init out of range.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        init: str = "kaiming",
        name: str = "default",
    ) -> None:
        if not is_linear(base):
            raise TypeError(
                f"LoRALinear needs a linear-like base (in_features, out_features, dense_weight()), "
                f"got {type(base).__name__}"
            )
        super().__init__(base)
        base.requires_grad_(False)
        self.attach(name, LoRA(*linear_features(base), r, alpha, dropout, init))
        self.active = [name]

    @classmethod
    def around(cls, base: nn.Module) -> Self:
        """Make a host with no adapter yet."""
        host = cls.__new__(cls)
        Adapted.__init__(host, base)
        return host

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Multiply with the update in one operator where the base has it, else as any host does."""
        pair = self._taken_by_base()
        if pair is None or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        base: Any = self.base
        options = {"dropout": pair.rate} if pair.rate else {}
        return base.linear_with_update(args[0], *pair.factors(), pair.scale(), **options)

    def linear_parts(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor] | None:
        """Weight, bias, A, B and s, if the layer is x Wᵀ + b + s (x Aᵀ) Bᵀ of an nn.Linear.

        What multiplies by them itself (lora_core.losses) calls neither the base nor the pair.

        Returns:
            The five, differentiable, or None for a layer that has to be called.
        """
        pair = self._only_pair()
        if pair is None or pair.rate or type(self.base) is not nn.Linear or watched(self.base):
            return None
        return self.base.weight, self.base.bias, *pair.factors(), pair.scale()

    def _taken_by_base(self) -> LoRA | None:
        """The only active pair, if the base takes it into its product and nothing looks between.

        A hook on the base or on the pair, one for all modules, and a forward that was replaced or
        overridden expect to be called, so they get the base and the adapter one after the other.
        """
        pair = self._only_pair()
        return pair if offers(self.base, "linear_with_update") and not watched(self.base) else None

    def _only_pair(self) -> LoRA | None:
        """The only active adapter, if it is a plain pair and nothing looks at it."""
        if not self.enabled or self.merged is not None or self.mixture is not None:
            return None
        if len(self.active) != 1:
            return None
        pair = self.adapters[self.active[0]]
        # exactly LoRA: another kind, even one derived from it, has a forward of its own
        if type(pair) is not LoRA or not pair.is_pair:
            return None
        return None if watched(pair) else pair

    @property
    def A(self) -> nn.Parameter:
        """(r, K), of the first active LoRA pair (or the first there is)."""
        return self._lora().A

    @property
    def B(self) -> nn.Parameter:
        """(N, r), of the first active LoRA pair (or the first there is)."""
        return self._lora().B

    @property
    def scaling(self) -> float:
        """Factor s of the first active LoRA pair (or the first there is)."""
        return self._lora().scaling

    def delta_weight(self) -> Tensor:
        """Return the update of all active adapters, (N, K) float32."""
        active = [self.adapter(name) for name in self.active]
        pairs = [adapter for adapter in active if type(adapter) is LoRA]
        if len(pairs) < len(active):  # a kind whose update depends on the weight, such as DoRA
            old = weight = dense_weight(self.base)
            for adapter in active:
                weight, _ = adapter.merged(weight, None)
            return weight - old
        device = next(self.adapters.parameters()).device
        total = torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=device)
        for pair in pairs:
            total = total + pair.delta_weight()
        return total

    def _lora(self) -> LoRA:
        """The first active adapter whose update is s·B A (or the first there is)."""
        pairs = {
            name: adapter
            for name, adapter in self.adapters.items()
            if type(adapter) is LoRA and not adapter.parts and adapter.A0 is None
        }
        if not pairs:
            raise AttributeError("this layer has no plain LoRA pair")
        return pairs[next((n for n in self.active if n in pairs), next(iter(pairs)))]
