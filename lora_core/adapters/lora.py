"""LoRA: a low-rank update beside a frozen layer.

    y = base(x) + s·B A dropout(x)      A (r, K), B (N, r), s = alpha / r  (rsLoRA: alpha / sqrt(r))

B starts at zero, so a new adapter changes nothing, to the bit: the update is added as
`y - (0 - update)`, which keeps the sign of a zero output where `y + 0` would not (-0 + 0 = +0).

A and B are float32 and are cast to the compute dtype at the multiply; s goes onto B in float32
first, so 16-bit runs round s·B once. PEFT multiplies the (tokens, N) product by s instead, which
costs a pass over the largest tensor and one more rounding.

Beside a linear layer the sum is one operator (lora_kernels.lora_update), which keeps for backward x
and a seed: x is shared by all layers that have the same input, and what dropout takes away is drawn
again from the seed. Other forms are written out in PyTorch and keep what autograd keeps.

Ref: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732), rsLoRA.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.forms import EmbeddingForm, Form
from lora_core.adapters.layers import compute_dtype
from lora_kernels.lora_update import lora_update

__all__ = ["LoRA", "check_lora"]

INITS = ("kaiming", "gaussian")
_LARGEST = torch.finfo(torch.float32).max


class LoRA(Adapter):
    """The low-rank pair at one layer: linear, embedding or convolution (forms.py).

    Args:
        in_features: K.
        out_features: N.
        r: rank, at least 1.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input element of the adapter in training, in [0, 1).
        init: start of A: "kaiming" (uniform in ±1/sqrt(K), PEFT's default), "gaussian" (normal
            with deviation 1/r, the paper's). B starts at zero. (An embedding's A starts at
            zero and its B as standard normals, as in PEFT: A's columns are the tokens'.)
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r.
        form: the layer's kind; None: linear.
        parts: sizes of the independent parts of a fused layer's output, N in sum: each has r rows
            of A for itself; None: one part.
        bias: start of a trained bias (N,), or None: the bias is not trained.
        up_bias: whether B has a bias of its own, scaled with it (PEFT's `lora_bias`).

    Attributes:
        A: (r, K) float32; (p·r, K) with p parts.
        B: (N, r) float32; (N, r / g) with g groups.
        scaling: s.
        bias: (N,) float32 or None; stands in the place of the base's.
        up_bias: (N,) float32 or None.

    Raises:
        ValueError: rank, dropout, init or parts out of range.
    """

    additive = True
    mixes = "grouped"
    new_base: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no child

    def __init__(  # noqa: PLR0913  # the settings of one pair
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        init: str = "kaiming",
        use_rslora: bool = False,
        *,
        form: Form | None = None,
        parts: Sequence[int] | None = None,
        bias: Tensor | None = None,
        up_bias: bool = False,
    ) -> None:
        super().__init__()
        check_lora(r, alpha, dropout, init)
        self.form = Form(in_features, out_features) if form is None else form
        self.parts = _checked_parts(self.form, parts)
        if r % self.form.groups:
            raise ValueError(f"r must be a multiple of the {self.form.groups} groups, got {r}")
        if up_bias and isinstance(self.form, EmbeddingForm):
            raise ValueError("an embedding has no bias: lora_bias cannot be used there")
        self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, dropout, use_rslora
        groups, rows = self.form.groups, r * max(1, len(self.parts))
        self.A = nn.Parameter(_zeros(rows, in_features))
        self.B = nn.Parameter(_zeros(out_features, r // groups))
        # rows of A and columns of B that are taken away again, where training starts elsewhere
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        self.A0: Tensor | None
        self.B0: Tensor | None
        start = None if bias is None else bias.detach().float().cpu()
        self.bias = None if start is None else nn.Parameter(start.clone())
        self.register_buffer("bias0", start)
        self.bias0: Tensor | None
        self.up_bias = nn.Parameter(_zeros(out_features)) if up_bias else None
        self._start(init)
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r

    def _start(self, init: str) -> None:
        if isinstance(self.form, EmbeddingForm):
            nn.init.normal_(self.B)
        elif init == "gaussian":
            nn.init.normal_(self.A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @torch.no_grad()
    def start_at(self, down: Tensor, up: Tensor, subtract: bool = True) -> None:
        """Start training from a pair that is not zero.

        Args:
            down: A, of its shape.
            up: B, of its shape.
            subtract: take s·B A of this start away again, so that the output does not change:
                y = W x + s (B A - B0 A0) x. PiSSA and its like write W - s·B0 A0 into the base
                instead, which rounds it and changes it for every other adapter.
        """
        self.A.copy_(down)
        self.B.copy_(up)
        if subtract:
            self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def begin(self, base: nn.Module) -> None:
        """Take from the layer what a kind needs of it; called once, when the pair is new."""

    @property
    def scaling(self) -> float:
        """Factor s."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = value
        self._place_scale()

    @torch.no_grad()
    def rescale(self, value: float) -> None:
        """Set s in place, as weights are: a compiled model or a captured graph sees the new one."""
        self._scaling = value
        self.alpha = value * (math.sqrt(self.r) if self.use_rslora else self.r)
        self.scale().fill_(value)

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

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the pair that is applied, differentiable: the update is s times their product.

        Returns:
            (down (R, K), up (N, R / g)): A and B themselves; with independent parts B block by
            block, R = p·r; with a start that is subtracted [A; A0] and [B, -B0], R = 2r.
        """
        if self.A0 is None or self.B0 is None:
            return self.A, self._spread(self.B)
        g, columns = self.form.groups, self.form.in_features
        pair = (self.A.view(g, -1, columns), self.A0.view(g, -1, columns))
        down = torch.cat(pair, dim=1).view(-1, columns)  # (2r, K)
        return down, torch.cat((self._spread(self.B), -self._spread(self.B0)), dim=1)

    def _spread(self, up: Tensor) -> Tensor:
        """B of a fused layer's parts (N, r) block by block, (N, p·r)."""
        if not self.parts:
            return up
        return torch.block_diag(*torch.split(up, list(self.parts)))  # type: ignore[no-untyped-call]

    @property
    def is_pair(self) -> bool:
        """Whether the whole update is s·B A, without a bias."""
        return self.bias is None and self.up_bias is None

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Add the update to the output.

        Args:
            x: input of the base: (…, K), token ids, or (B, C, …).
            y: output so far.
            base: the wrapped module.

        Returns:
            The output, in y's shape and dtype.
        """
        kind = type(self)
        own = kind.update is LoRA.update and kind.product is LoRA.product
        if not own or not self.form.is_product:  # a kind that computes its update otherwise
            return y - (0.0 - self.update(x, y, base).to(y.dtype))
        y = lora_update(y, x, *self.factors(), self.scale(), dropout=self.rate)
        change = self.bias_change()
        return y if change is None else y - (0.0 - change.to(y.dtype))

    @property
    def rate(self) -> float:
        """Probability of dropping an element now: 0 in evaluation."""
        return self.dropout if self.training else 0.0

    def update(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return what is added to the output, in the dtype of the computation.

        Args:
            x: input of the base.
            y: its output, whose dtype is computed in where x is token ids.
            base: the wrapped module.

        Returns:
            s·B A dropout(x), and the change of the biases, in y's shape.
        """
        product, bias = self.product(x, y, base), self.bias_change()
        return product if bias is None else product + self.form.along_output(bias.to(product.dtype))

    def product(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return s·B A dropout(x), the update without biases; arguments as `update`'s."""
        down, up = self.factors()
        if self.form.is_product:
            return lora_update(None, x, down, up, self.scale(), dropout=self.rate)
        dtype = compute_dtype(x) if x.is_floating_point() else y.dtype
        if x.is_floating_point():  # an embedding looks up float32 rows and casts those
            down = down.to(dtype)
        return self.form.apply(self.dropped(x, dtype), down, (up * self.scale()).to(dtype), base)

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x in the compute dtype after dropout; token ids as they are."""
        if not x.is_floating_point():
            return x
        x = x.to(dtype)
        return F.dropout(x, self.rate) if self.rate else x

    def bias_change(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Return what the trained biases add to the base's, (N,) in `dtype`, or None."""
        # the tensor, so that a compiled model does not depend on the number
        s = self.scale() if dtype == torch.float32 else self.scaling
        change = None if self.up_bias is None else self.up_bias.to(dtype) * s
        if self.bias is None or self.bias0 is None:
            return change
        new = self.bias.to(dtype) - self.bias0.to(dtype)
        return new if change is None else new + change

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return s·B A in the layout of the layer's weight.

        Args:
            dtype: of the computation and the result, never below float32 (autocast or not).

        Returns:
            (N, K) for a linear layer.
        """
        with torch.autocast(self.A.device.type, enabled=False):
            down, up = self.factors()
            return self.form.weight(self.form.delta(down.to(dtype), up.to(dtype) * self.scaling))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + s·B A, and the bias with its change."""
        change = self.bias_change(weight.dtype)
        if change is not None:
            bias = change if bias is None else bias + change
        return weight + self.delta_weight(weight.dtype), bias

    def tensors(self) -> dict[str, Tensor]:
        """Return A and B under PEFT's names, in PEFT's shapes, as they are applied."""
        names = self.form.names()
        saved = dict(zip(names, self.form.on_disk(*self.factors()), strict=True))
        if self.up_bias is not None:
            saved["lora_B.bias"] = self.up_bias
        if self.bias is not None:
            saved["base_layer.bias"] = self.bias
        return saved

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was saved; see `tensors`.

        Raises:
            ValueError: a fused layer's B has numbers outside its blocks; nothing is taken then.
        """
        first, second = self.form.names()
        down = tensors[first].reshape(self.form.groups, -1, self.form.in_features)  # (g, R/g, K)
        up = tensors[second].reshape(self.form.out_features, -1)  # (N, R/g)
        pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # ours, new; all checked first
        if self.A0 is not None and self.B0 is not None:
            (down, down0), (up, up0) = down.chunk(2, dim=1), up.chunk(2, dim=1)
            pairs.append((self.A0, down0, self.B0, self._gathered(-up0)))
        pairs.append((self.A, down, self.B, self._gathered(up)))
        for own_down, new_down, own_up, new_up in pairs:
            own_down.copy_(new_down.reshape(own_down.shape))
            own_up.copy_(new_up)
        for own, key in ((self.up_bias, "lora_B.bias"), (self.bias, "base_layer.bias")):
            if own is not None:
                own.copy_(tensors[key])

    def _gathered(self, up: Tensor) -> Tensor:
        """The blocks (N, r) of a fused layer's B (N, p·r), the way back from `_spread`."""
        if not self.parts:
            return up
        rows = torch.split(up, list(self.parts))
        own = torch.cat([part[:, i * self.r :][:, : self.r] for i, part in enumerate(rows)])
        if own.shape[1] != self.r or not torch.equal(self._spread(own), up):
            raise ValueError("B of a fused layer has numbers outside the blocks of its parts")
        return own

    def extra_repr(self) -> str:
        """Say rank, scaling and dropout."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def _zeros(*shape: int) -> Tensor:
    """Float32 zeros on the CPU, whatever default dtype or device is set."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _checked_parts(form: Form, parts: Sequence[int] | None) -> tuple[int, ...]:
    sizes = tuple(parts or ())
    if sizes and (type(form) is not Form or min(sizes) < 1 or sum(sizes) != form.out_features):
        raise ValueError(
            f"parts must be positive sizes that add up to the {form.out_features} outputs of a "
            f"linear layer, got {list(sizes)}"
        )
    return sizes


def check_lora(r: int, alpha: float, dropout: float, init: str) -> None:
    """Check the settings of one LoRA pair; ValueError names the one that is wrong."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be a whole number of at least 1, got {r!r}")
    if not isinstance(alpha, int | float) or alpha != alpha or abs(alpha) == math.inf:
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    if abs(alpha) > _LARGEST:
        raise ValueError(f"alpha must be in float32's range, up to {_LARGEST:.1e}; it is above")
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
