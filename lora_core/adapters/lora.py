"""LoRA: a low-rank update beside a frozen linear layer.

    y = base(x) + s·B A dropout(x)      A (r, K), B (N, r), s = alpha / r  (rsLoRA: alpha / sqrt(r))

B starts at zero, so a new adapter changes nothing, to the bit: the update is added as
`y - (0 - update)`, which keeps the sign of a zero output where `y + 0` would not (-0 + 0 = +0).

A and B are float32 and are cast to the compute dtype at the multiply; s goes onto B in float32
first, so 16-bit runs round s·B once. PEFT multiplies the (tokens, N) product by s instead, which
costs a pass over the largest tensor and one more rounding.

A base that can take the update into its own product does: one with a method

    linear_with_update(x, down, up, scaling) -> y       A, B and s (1,) as they are, float32

as NF4Linear's, which multiplies, adds and rounds in one operator (lora_kernels.lora_linear). It is
used for exactly one active pair without dropout; several pairs, other kinds, a merged layer, and
anything that has to see the base's output by itself take the sum written out below.

Ref: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732), rsLoRA.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

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
        self.A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32, device="cpu"))
        self.B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device="cpu"))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.A, std=1 / r)
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r

    @property
    def scaling(self) -> float:
        """Factor s."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = value
        self._place_scale()

    def _place_scale(self) -> None:
        """Keep s beside A as a tensor, so that no step has to send it to the device."""
        with torch.inference_mode(False):  # or training could not use what evaluation made
            self._scale = torch.full((1,), self._scaling, dtype=torch.float32, device=self.A.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves, s included; it is no buffer, which a model made on meta would lose."""
        super()._apply(fn, recurse)
        self._place_scale()
        return self

    def scale(self) -> Tensor:
        """Factor s as float32 (1,) where A is."""
        if self._scale.device != self.A.device:  # A's data was replaced by hand
            self._place_scale()
        return self._scale

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


def _takes_updates(base: nn.Module) -> bool:
    """Whether the base's class has `linear_with_update` and no forward of a later class beside it.

    Asked of the class: a host would pass the question on to its own base, past its adapters.
    """
    for kind in type(base).__mro__:
        if "linear_with_update" in vars(kind):
            return True
        if "forward" in vars(kind) or "__call__" in vars(kind):
            return False
    return False


def _watched(module: nn.Module) -> bool:
    """Whether something would notice that the module is not called."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(map(len, hooks)) or "forward" in vars(module) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Multiply with the update in one operator where the base has it, else as any host does."""
        pair = self._taken_by_base()
        if pair is None or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        base: Any = self.base
        return base.linear_with_update(args[0], pair.A, pair.B, pair.scale())

    def _taken_by_base(self) -> LoRA | None:
        """The only active pair, if the base takes it into its product and nothing looks between.

        A hook on the base or on the pair, one for all modules, and a forward that was replaced or
        overridden expect to be called, so they get the base and the adapter one after the other.
        """
        if not self.enabled or self.merged is not None or len(self.active) != 1:
            return None
        pair = self.adapters[self.active[0]]
        # exactly LoRA: another kind, even one derived from it, has a forward of its own
        if type(pair) is not LoRA or (pair.dropout and pair.training):
            return None
        if not _takes_updates(self.base) or _watched(self.base) or _watched(pair):
            return None
        return pair

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
