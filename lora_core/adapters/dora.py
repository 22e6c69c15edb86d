"""DoRA: the update changes the direction of each row of W, a trained vector its length.

    W' = m * V / c,   V = W + s·B A,   c = |V| by rows,   m = |V| at the start

    y' = y + (m/c - 1) (y - b) + (m/c) s·B A dropout(x)             y = W x + b, the base's output

c is a constant in backward (the paper's section 4.3), and comes from the low-rank identity

    c² = |W|² + 2 s (W Aᵀ · B) + s² (B (A Aᵀ) · B)                  row by row

whose dearest term is the base's own product with the r rows of A. So neither W + s·B A nor, of a
4-bit base, W itself is formed in training; |W| is measured once, and again when the layer loads
other weights. PEFT forms W + s·B A in every forward, dequantizing first. Dropout acts on the update
alone, where PEFT drops inputs of the base's share too and multiplies by W a second time. The price
of the identity: where s·B A takes most of a row of W away, the difference of large terms loses
digits, as much as c² is smaller than they are.

A row of zeros has no direction: its m is 0 and it stays zero (in PEFT its output is NaN). A layer
of zeros alone is refused by LoRAConfig.

Ref: Liu et al. 2024, arXiv:2402.09353, equation 5; 11 and section 4.3 (c as a constant).
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.forms import Form
from lora_core.adapters.layers import dense_weight
from lora_core.adapters.lora import LoRA
from lora_core.targets import unwrap

__all__ = ["DoRA"]

_SLICE = 1 << 24  # elements of a 16-bit weight that are widened at a time


class DoRA(LoRA):
    """LoRA with a trained length for every row of W: LoRA's arguments.

    `begin(base)` sets the lengths; until then they are ones.

    Attributes:
        magnitude: m, (N,) float32.
        lengths: |W| by rows, (N,) float32; measured, and no part of what `save_adapter` writes.
    """

    additive = False
    alone = True
    mixes = "loop"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ones = torch.ones(self.form.out_features, dtype=torch.float32, device="cpu")
        self.magnitude = nn.Parameter(ones)
        self.register_buffer("lengths", ones.clone())
        self.lengths: Tensor
        self._loaded = False  # whether the lengths came with the weights that were loaded last

    @torch.no_grad()
    def begin(self, base: nn.Module) -> None:
        """Take the lengths of the rows of V from the layer, whose device the pair moves to."""
        self.to(next(chain(base.parameters(), base.buffers())).device)
        self.measure(base)
        # through the identity, so that m / c is exactly 1 at the start
        self.magnitude.copy_(self.norms(base))

    @torch.no_grad()
    def measure(self, base: nn.Module) -> None:
        """Measure the rows of the base's weight, if not `load_state_dict` changed it."""
        self.lengths = _row_lengths(self.form.matrix(dense_weight(base))).to(self.magnitude)

    def rebase(self, base: nn.Module) -> None:
        """Measure weights that were loaded without their lengths."""
        if not self._loaded:
            self.measure(base)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._loaded = f"{prefix}lengths" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def norms(self, base: nn.Module) -> Tensor:
        """Return c = |W + s·B A| by rows, (N,) float32.

        Every row is counted in a unit of its own, above which none of the three terms lies, so that
        no square leaves float32's range.
        """
        g = self.form.groups
        with torch.autocast(self.A.device.type, enabled=False):
            down, up = self.factors()
            up = up * self.scale()  # (N, R/g)
            unit = torch.maximum(self.lengths, up.abs().sum(1) * down.norm())  # (N,)
            unit = torch.where(unit > 0, unit, 1.0)
            up = up / unit[:, None]
            cross = _times_weight(self.form, base, down) / unit[:, None]  # (N, R/g)
            blocks = down.view(g, -1, down.shape[1])  # (g, R/g, K)
            gram = blocks @ blocks.transpose(1, 2)  # (g, R/g, R/g)
            wide = up.view(g, -1, up.shape[1])  # (g, N/g, R/g)
            own = ((wide @ gram) * wide).sum(2).view(-1)  # (N,)
            squares = (self.lengths / unit).square() + 2 * (cross * up).sum(1) + own
        return unit * squares.clamp(min=0).sqrt()

    def gain(self, base: nn.Module) -> Tensor:
        """Return m / c, (N,) float32, a function of m alone to autograd."""
        norms = self.norms(base)
        return self.magnitude / torch.where(norms > 0, norms, 1.0)

    def update(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Return what is added to the base's output y: the formula above."""
        product, gain, change = self.product(x, y, base), self.gain(base), self.bias_change()
        dtype, along = product.dtype, self.form.along_output
        bias = getattr(base, "bias", None)
        free = y.to(dtype) if bias is None else y.to(dtype) - along(bias.detach().to(dtype))
        update = along((gain - 1).to(dtype)) * free + along(gain.to(dtype)) * product
        # a bias is no part of the direction
        return update if change is None else update + along(change.to(dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return m (W + s·B A) / |W + s·B A|, and the bias with its change."""
        whole, bias = super().merged(weight, bias)
        matrix = self.form.matrix(whole)  # (N, K)
        norms = _row_lengths(matrix)  # (N,)
        gain = self.magnitude.detach().to(weight.dtype) / torch.where(norms > 0, norms, 1)
        return self.form.weight(matrix * gain[:, None]), bias

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


def _row_lengths(matrix: Tensor) -> Tensor:
    """Lengths of the rows of a matrix (N, K), tiny and huge ones too."""
    unit = matrix.abs().amax(1).clamp(min=torch.finfo(matrix.dtype).tiny)  # (N,)
    return unit * torch.linalg.vector_norm(matrix / unit[:, None], dim=1)


def _times_weight(form: Form, base: nn.Module, down: Tensor) -> Tensor:
    """W Aᵀ, (N, R/g) in A's dtype, without a wide copy of W."""
    base = unwrap(base)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        # in 4 bits: the layer's own product, its bias taken off; no call, which hooks would see
        bias = getattr(base, "bias", None)
        product = base.forward(down)  # (R, N)
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
