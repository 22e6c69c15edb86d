"""LoRA: a low-rank update beside a frozen linear layer.

    y = base(x) + s·B A dropout(x)      A (r, K), B (N, r), s = alpha / r  (rsLoRA: alpha / sqrt(r))

B starts at zero, so a new adapter changes nothing, to the bit: the update is added as
`y - (0 - update)`, which keeps the sign of a zero output where `y + 0` would not (-0 + 0 = +0).

A and B are float32 and are cast to the compute dtype at the multiply; s goes onto B in float32
first, so 16-bit runs round s·B once. PEFT multiplies the (tokens, N) product by s instead, which
costs a pass over the largest tensor and one more rounding.

Ref: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732), rsLoRA.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.base import Adapted, Adapter, compute_dtype, is_linear, linear_features

__all__ = ["LoRA", "LoRALinear"]

INITS = ("kaiming", "gaussian")


class LoRA(Adapter):
    """The low-rank pair at one linear-like module.

    Args:
        in_features: K.
        out_features: N.
        r: rank, at least 1.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input element of the adapter in training, in [0, 1).
        init: start of A: "kaiming" (uniform in ±1/sqrt(K), PEFT's default) or "gaussian"
            (normal with deviation 1/r, the paper's). B starts at zero.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.

    Attributes:
        A: (r, K) float32.
        B: (N, r) float32.
        scaling: s.

    Raises:
        ValueError: rank, dropout or init out of range.
    """

    additive = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        init: str = "kaiming",
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        check_lora(r, alpha, dropout, init)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32, device="cpu"))
        self.B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device="cpu"))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=1 / r)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Add the update to the output.

        Args:
            x: (…, K) input of the base.
            y: (…, N) output so far.
            base: the wrapped module (not needed here).

        Returns:
            (…, N) in y's dtype.
        """
        dtype = compute_dtype(x)
        x = x.to(dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        h = F.linear(x, self.A.to(dtype))  # (…, r)
        update = F.linear(h, (self.B * self.scaling).to(dtype))  # (…, N)
        return y - (0.0 - update.to(y.dtype))

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return s·B A, (N, K), computed in `dtype` (never below float32, autocast or not)."""
        with torch.autocast(self.A.device.type, enabled=False):
            return (self.B.to(dtype) * self.scaling) @ self.A.to(dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + s·B A, and the bias as it is."""
        return weight + self.delta_weight(weight.dtype), bias

    def tensors(self) -> dict[str, Tensor]:
        """Return A and B under PEFT's names."""
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def extra_repr(self) -> str:
        """Say rank, scaling and dropout."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def check_lora(r: int, alpha: float, dropout: float, init: str) -> None:
    """Check the settings of one LoRA pair; ValueError names the one that is wrong."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be a whole number of at least 1, got {r!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")


class LoRALinear(Adapted):
    """Host of a linear-like module, with shortcuts to its LoRA pair.

    `LoRALinear(linear)` is the layer for use by hand: base frozen, one adapter, active.
    `add_adapter` makes the same host in a whole model.

    Args:
        base: an nn.Linear, NF4Linear, or any linear-like (base.py); its parameters are frozen.
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
        """Return the update of all active pairs, (N, K) float32."""
        out_features, in_features = self.out_features, self.in_features
        total = torch.zeros(
            out_features, in_features, dtype=torch.float32, device=self._lora().A.device
        )
        for name in self.active:
            adapter = self.adapters[name]
            if isinstance(adapter, LoRA):
                total = total + adapter.delta_weight()
        return total

    def _lora(self) -> LoRA:
        pairs = {n: a for n, a in self.adapters.items() if isinstance(a, LoRA)}
        if not pairs:
            raise AttributeError("this layer has no LoRA adapter")
        return pairs[next((n for n in self.active if n in pairs), next(iter(pairs)))]
