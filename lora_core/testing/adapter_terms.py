"""The mathematics of an adapted linear layer in float64, and what its roundings are relative to.

    y = x (W + dW)^T + b'          M = g * (|x| |W|^T + |b| + |x| |A|^T |sB|^T)

`Terms.read` takes W, dW and b' off a layer: from its factors where it has a pair (several stacked,
for parts and starts that are subtracted), else from what its adapters merge to. g is 1 for sums of
such terms. DoRA multiplies rows by m/c, where c² is a sum of terms that may cancel, so there

    g = 3 + |m|/c (1 + k)       k = (|(|W| + |sB| |A|)_row| / c)²: the condition of c

and 3 for the output itself, (m/c - 1) of it, and the base's bias that is taken off and put back.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import DoRA
from lora_core.adapters.host import Adapted
from lora_core.adapters.layers import dense_weight
from lora_core.adapters.lora import LoRA
from lora_core.testing.bounds import allowance, exceeds

__all__ = ["Terms"]


@dataclass(frozen=True)
class Terms:
    """The layer in float64.

    Attributes:
        weight: W, (N, K).
        delta: dW, (N, K).
        bias: b', (N,).
        sizes: what adds up to the bias, in magnitude, (N,).
        factors: A (r, K) and s B (N, r) with dW = s B A; None for a kind without.
        gain: g, (N,).
        extra: roundings to 16 bits beside those of a sum of two products.
        tiny: smallest normal number of the dtype that is computed in.
    """

    weight: Tensor
    delta: Tensor
    bias: Tensor
    sizes: Tensor
    factors: tuple[Tensor, Tensor] | None
    gain: Tensor
    extra: int
    tiny: float

    @classmethod
    def read(cls, layer: Any, base: nn.Module, dtype: torch.dtype) -> "Terms":
        """Read the mathematics off a layer, and hold its `delta_weight` to its factors.

        Args:
            layer: with LoRALinear's interface, or a host that `add_adapter` made.
            base: the module it wraps.
            dtype: in which it computes.

        Returns:
            The terms.

        Raises:
            AssertionError: no `delta_weight` and no host, or a `delta_weight` that is not s B A.
        """
        weight = dense_weight(base).double()
        bias = getattr(base, "bias", None)
        own = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().double()
        plain = cls(
            weight=weight,
            delta=torch.zeros_like(weight),
            bias=own,
            sizes=own.abs(),
            factors=None,
            gain=torch.ones_like(own),
            extra=0,
            tiny=torch.finfo(dtype).tiny,
        )
        if not isinstance(layer, Adapted):
            return plain._of_a_pair(layer)
        adapters = [cast(Adapter, layer.adapters[name]) for name in layer.active]
        terms = plain._merged(adapters)
        if len(adapters) == 1 and isinstance(adapters[0], LoRA):
            terms = terms._with_factors(adapters[0])
        if hasattr(layer, "delta_weight"):
            terms._hold(layer.delta_weight())
        return terms

    def _of_a_pair(self, layer: Any) -> "Terms":
        """The terms of a user's own layer: its A, B and scaling, or its `delta_weight`."""
        assert hasattr(layer, "delta_weight"), (
            f"{type(layer).__name__} has no delta_weight() and is no host that add_adapter made"
        )
        if not (hasattr(layer, "A") and hasattr(layer, "B")):
            return replace(self, delta=layer.delta_weight().detach().double())
        down, up = layer.A.detach().double(), layer.B.detach().double() * float(layer.scaling)
        terms = replace(self, delta=up @ down, factors=(down, up))
        terms._hold(layer.delta_weight())
        return terms

    def _merged(self, adapters: list[Adapter]) -> "Terms":
        """The terms of what adapters merge to, one after the other."""
        weight, bias = self.weight, cast("Tensor | None", self.bias)
        for adapter in adapters:
            weight, bias = adapter.merged(weight, bias)
        assert bias is not None, "merged(weight, bias) dropped the bias"
        new = bias.detach()
        # a trained bias is a difference from the base's
        sizes = self.sizes + torch.where(new == self.bias, 0.0, self.sizes + 2 * new.abs())
        return replace(self, delta=(weight - self.weight).detach(), bias=new, sizes=sizes)

    def _with_factors(self, pair: LoRA) -> "Terms":
        down, up = (factor.detach().double() for factor in pair.factors())
        up = up * pair.scaling
        if not isinstance(pair, DoRA):
            return replace(self, delta=up @ down, factors=(down, up))
        V = self.weight + up @ down  # (N, K)
        norms = V.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        sizes = (self.weight.abs() + up.abs() @ down.abs()).norm(dim=1)
        gain = pair.magnitude.detach().double() / norms
        delta = gain[:, None] * V - self.weight
        g = 3 + gain.abs() * (1 + (sizes / norms).square())
        return replace(self, delta=delta, factors=(down, up), gain=g, extra=4)

    def _hold(self, delta: Tensor) -> None:
        """Compare what `delta_weight` returned."""
        size = self.weight.abs() + self.delta.abs() if self.extra else self.delta.abs()
        if self.factors is not None:
            size = size + self.factors[1].abs() @ self.factors[0].abs()
        depth = self.operations if self.extra else self.rank + 1
        bound = allowance(depth, torch.float32, 0) * self.gain[:, None] * size
        fault = exceeds(delta.detach(), self.delta, bound + torch.finfo(torch.float32).tiny)
        assert fault is None, f"delta_weight() {fault}; it should be scaling * B @ A"

    @property
    def rank(self) -> int:
        """Rank of the factors, 0 without."""
        return self.factors[0].shape[0] if self.factors else 0

    @property
    def operations(self) -> int:
        """K + r + 3, the roundings in a row (N for K in backward, where N is larger)."""
        return max(self.weight.shape) + self.rank + 3 + 4 * self.extra

    def output(self, x: Tensor) -> Tensor:
        """Exact y of float64 x (…, K)."""
        return x @ (self.weight + self.delta).T + self.bias

    def magnitude(self, x: Tensor) -> Tensor:
        """M above, every term padded by the smallest normal number."""
        x, t = x.abs(), self.tiny
        m = x @ (self.weight.abs() + t).T + self.sizes + 4 * t  # (…, N)
        if self.factors is None:
            return m + x @ self.delta.abs().T
        A, B = (f.abs() + t for f in self.factors)
        return self.gain * (m + (x @ A.T + t) @ B.T)

    def pull(self, dy: Tensor) -> Tensor:
        """Magnitudes of the gradient of x for a gradient dy (rows, N), (rows, K)."""
        t = self.tiny
        D = dy.abs() * self.gain
        pull = D @ (self.weight.abs() + self.delta.abs() + t) + t
        if self.factors is None:
            return pull
        A, B = (f.abs() + t for f in self.factors)
        return pull + (D @ B + t) @ A
