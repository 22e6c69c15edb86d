"""DoRA: the update changes the direction of each row of W, a trained vector its length.

    W' = m * V / c,   V = W + s·B A,   c = |V| by rows,   m = |W| at the start

    y' = y + (m/c - 1) (y - b) + (m/c) s·B A dropout(x)             y = W x + b, the base's output

c is a constant in backward (the paper's section 4.3), and comes from the low-rank identity

    |V|² = |W|² + 2 s (W Aᵀ · B) + s² (B (A Aᵀ) · B)                 row by row

whose dearest term is the base's own product with the r rows of A. So neither W + s·B A nor, of a
4-bit base, W itself is formed in training; |W|² is taken once. PEFT forms W + s·B A in every
forward, dequantizing first. Dropout acts on the update alone, where PEFT drops inputs of the base's
share too and multiplies by W a second time.

Ref: Liu et al. 2024, arXiv:2402.09353, equations 5 and 11, section 4.3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.base import dense_weight
from lora_core.adapters.forms import Form
from lora_core.adapters.lora import LoRA
from lora_core.targets import unwrap

__all__ = ["DoRA"]

_SLICE = 1 << 24  # elements of a 16-bit weight that are widened at a time


class DoRA(LoRA):
    """LoRA with a trained length for every row of W: LoRA's arguments.

    `begin(base)` sets the lengths; until then they are ones.

    Attributes:
        magnitude: m, (N,) float32.
    """

    additive = False
    alone = True
    mixes = "loop"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.magnitude = nn.Parameter(torch.ones(self.form.out_features, device="cpu"))
        self.register_buffer("squares", torch.ones(len(self.magnitude)), persistent=False)
        self.squares: Tensor  # |W|² by rows, (N,)

    @torch.no_grad()
    def begin(self, base: nn.Module) -> None:
        """Take the lengths of the rows of the base's weight."""
        weight = self.form.matrix(dense_weight(base).float())  # (N, K)
        self.squares = weight.square().sum(1).to(self.magnitude.device)
        # through the identity, so that m / c is exactly 1 while B is 0
        self.magnitude.copy_(self.norms(base))

    @torch.no_grad()
    def norms(self, base: nn.Module) -> Tensor:
        """Return c = |W + s·B A| by rows, (N,) float32, 1 for rows of zeros."""
        g = self.form.groups
        with torch.autocast(self.A.device.type, enabled=False):
            down, up = self.factors()
            up = up * self.scale()  # (N, R/g)
            cross = (_times_weight(self.form, base, down) * up).sum(1)  # (N,)
            blocks = down.view(g, -1, down.shape[1])  # (g, R/g, K)
            gram = blocks @ blocks.transpose(1, 2)  # (g, R/g, R/g)
            wide = up.view(g, -1, up.shape[1])  # (g, N/g, R/g)
            own = ((wide @ gram) * wide).sum(2).view(-1)  # (N,)
            squares = (self.squares + 2 * cross + own).clamp(min=0)
        return torch.where(squares > 0, squares, 1.0).sqrt()

    def update(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return what is added to the base's output y: the formula above."""
        low_rank = super().update(x, y, base)
        gain = self.magnitude / self.norms(base)  # (N,)
        bias, change = getattr(base, "bias", None), self.bias_change()
        dtype, along = low_rank.dtype, self.form.along_output
        free = y.to(dtype) if bias is None else y.to(dtype) - along(bias.detach().to(dtype))
        if change is None:
            return along((gain - 1).to(dtype)) * free + along(gain.to(dtype)) * low_rank
        change = along(change.to(dtype))
        low_rank = low_rank - change  # a bias is no part of the direction
        return along((gain - 1).to(dtype)) * free + along(gain.to(dtype)) * low_rank + change

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return m (W + s·B A) / |W + s·B A|, and the bias with its change."""
        whole, bias = super().merged(weight, bias)
        matrix = self.form.matrix(whole)  # (N, K)
        norms = matrix.norm(dim=1, keepdim=True)
        gain = self.magnitude.detach().to(weight.dtype)[:, None] / torch.where(norms > 0, norms, 1)
        return self.form.weight(matrix * gain), bias

    def tensors(self) -> dict[str, Tensor]:
        """Return LoRA's tensors and the lengths, under PEFT's names."""
        return {**super().tensors(), "lora_magnitude_vector": self._on_disk()}

    @torch.no_grad()
    def load(self, tensors: Any) -> None:
        """Take what was saved."""
        super().load(tensors)
        self.magnitude.copy_(tensors["lora_magnitude_vector"].reshape(-1))

    def _on_disk(self) -> Tensor:
        """The lengths in PEFT's shape: (1, N, 1, …) for a convolution."""
        vector = self.form.along_output(self.magnitude)
        return vector if vector.dim() == 1 else vector[None]


def _times_weight(form: Form, base: nn.Module, down: Tensor) -> Tensor:
    """W Aᵀ, (N, R/g) float32, without a wide copy of W."""
    base = unwrap(base)
    weight = base._parameters.get("weight")
    if weight is None:  # in 4 bits: the layer's own product, its bias taken off
        bias = getattr(base, "bias", None)
        product = base(down)  # (R, N)
        return (product if bias is None else product - bias.to(product.dtype)).t()
    matrix = form.matrix(weight.detach())  # (N, K)
    blocks = down.view(form.groups, -1, down.shape[1])  # (g, R/g, K)
    rows = max(1, _SLICE // matrix.shape[1])
    products = [
        part.to(down.dtype) @ block.t()
        for group, block in zip(matrix.chunk(form.groups), blocks, strict=True)
        for part in torch.split(group, rows)
    ]
    return torch.cat(products)
