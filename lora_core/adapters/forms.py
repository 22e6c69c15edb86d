"""How a low-rank matrix acts in a layer: linear, transposed linear, embedding, convolution.

LoRA is one formula on a matrix, W' = W + s·B A with W (N, K). A layer of another kind is that
matrix in another layout, and its forward a product with it on other slices of the input:

* linear         weight (N, K)                   u = (x Aᵀ) Bᵀ
* transposed     weight (K, N), GPT-2's Conv1D   the same
* embedding      weight (V, D): K = V, N = D     u = A[:, ids]ᵀ Bᵀ: a row of A per token
* convolution    weight (N, C/g, *kernel): K = C/g · |kernel|; a convolution by A's r kernels, then
                 one by B of size 1. With g groups, group j has r/g rows of A and N/g rows of B

A `Form` knows these layouts and products, and nothing of ranks, scalings or starts; LoRA, DoRA and
the mixing of adapters in a batch are written once, on matrices. PEFT has a class for each pair of
method and layer.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1; convolutions and embeddings as in its code.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.layers import is_linear, linear_features, scaled_as

__all__ = ["ConvForm", "EmbeddingForm", "Form", "TransposedForm", "form_of"]

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Form:
    """A linear layer's matrix, and the base of the other forms.

    Attributes:
        in_features: K, columns of the matrix.
        out_features: N, rows of the matrix.
        groups: g, blocks of rows that have their own A; A is (r, K), B (N, r / g).
        is_product: whether the layer multiplies (…, K) by its matrix, so that its update is the
            operator `lora_update`.
    """

    is_product: ClassVar[bool] = True

    in_features: int
    out_features: int
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the layer's weight as its matrix (N, K); shares memory."""
        return weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (N, K) in the layout of the layer's weight; shares memory."""
        return matrix

    def delta(self, down: Tensor, up: Tensor) -> Tensor:
        """Return B A.

        Args:
            down: A, (r, K).
            up: B, (N, r / g).

        Returns:
            (N, K).
        """
        if self.groups == 1:
            return up @ down
        g = self.groups
        blocks = up.view(g, -1, up.shape[-1]) @ down.view(g, -1, down.shape[-1])  # (g, N/g, K)
        return blocks.view(self.out_features, self.in_features)

    def apply(self, x: Tensor, down: Tensor, up: Tensor, base: nn.Module) -> Tensor:
        """Return the update of the layer's output.

        Args:
            x: the layer's input, (…, K).
            down: A (r, K) in the compute dtype.
            up: s·B (N, r / g), likewise.
            base: the layer.

        Returns:
            What the matrix s·B A adds to the output, (…, N).
        """
        return F.linear(F.linear(x, down), up)

    def apply_rows(
        self, x: Tensor, down: Tensor, up: Tensor, base: nn.Module, slots: Tensor | None = None
    ) -> Tensor:
        """Return the update of a batch whose entries have an A and a B each.

        Args:
            x: (B, …, K).
            down: (B, r, K), an A for each entry; (L, r, K) with slots.
            up: s·B, (B, N, r / g), likewise.
            base: the layer.
            slots: (B,) int64, which of the L each entry takes; None: its own.

        Returns:
            (B, …, N).
        """
        down, up = _taken(down, slots), _taken(up, slots)
        rows = x.reshape(len(x), -1, x.shape[-1])  # (B, T, K)
        update = torch.bmm(torch.bmm(rows, down.transpose(1, 2)), up.transpose(1, 2))  # (B, T, N)
        return update.view(*x.shape[:-1], update.shape[-1])

    def along_output(self, vector: Tensor) -> Tensor:
        """Return a vector (N,) so that it broadcasts with the layer's output."""
        return vector

    def names(self) -> tuple[str, str]:
        """Names of A and B on disk: PEFT's."""
        return "lora_A.weight", "lora_B.weight"

    def on_disk(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B in the shapes that they have on disk; shares memory."""
        return down, up


@dataclass(frozen=True)
class TransposedForm(Form):
    """transformers' Conv1D, a linear layer that stores (K, N)."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (N, K) of a weight (K, N)."""
        return weight.t()

    def weight(self, matrix: Tensor) -> Tensor:
        """Return (K, N) of a matrix (N, K)."""
        return matrix.t()


@dataclass(frozen=True)
class EmbeddingForm(Form):
    """An embedding (V, D): the matrix is its transpose, and a token picks a column."""

    is_product: ClassVar[bool] = False

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (D, V) of a weight (V, D)."""
        return weight.t()

    def weight(self, matrix: Tensor) -> Tensor:
        """Return (V, D) of a matrix (D, V)."""
        return matrix.t()

    def apply(self, x: Tensor, down: Tensor, up: Tensor, base: nn.Module) -> Tensor:
        """Return the update (…, D) for token ids x (…).

        `down` may be wider than `up`: the rows of the tokens are cast, not all V of them, and their
        gradients add up in its dtype. The padding token's row gets no gradient, as in the base.
        """
        pad = getattr(base, "padding_idx", None)
        h = F.embedding(x, down.t(), pad).to(up.dtype)  # (…, r)
        return scaled_as(base, F.linear(h, up))

    def apply_rows(
        self, x: Tensor, down: Tensor, up: Tensor, base: nn.Module, slots: Tensor | None = None
    ) -> Tensor:
        """Return the update (B, …, D) for token ids x (B, …): of A, only the tokens' columns."""
        ids = x.reshape(len(x), -1)  # (B, T)
        if slots is None:
            slots = torch.arange(len(x), device=x.device)
        h = down[slots[:, None], :, ids].to(up.dtype)  # (B, T, r)
        if (pad := getattr(base, "padding_idx", None)) is not None:
            h = torch.where((ids == pad)[..., None], h.detach(), h)
        update = torch.bmm(h, up.index_select(0, slots).transpose(1, 2))  # (B, T, D)
        return scaled_as(base, update.view(*x.shape, update.shape[-1]))

    def names(self) -> tuple[str, str]:
        """Names of A and B on disk: PEFT's."""
        return "lora_embedding_A", "lora_embedding_B"


@dataclass(frozen=True)
class ConvForm(Form):
    """A convolution in one to three dimensions, grouped or not.

    Attributes:
        kernel: its size in each dimension.
    """

    is_product: ClassVar[bool] = False

    kernel: tuple[int, ...] = ()

    def matrix(self, weight: Tensor) -> Tensor:
        """Return (N, C/g · |kernel|) of a weight (N, C/g, *kernel)."""
        return weight.reshape(self.out_features, self.in_features)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return (N, C/g, *kernel) of a matrix (N, C/g · |kernel|)."""
        return matrix.reshape(len(matrix), -1, *self.kernel)

    def apply(self, x: Tensor, down: Tensor, up: Tensor, base: Any) -> Tensor:
        """Return the update (B, N, *out) for x (B, C, *in), or without B for both."""
        down, up = self.on_disk(down, up)
        h = self._convolve(_padded(x, base), down, base, self.groups)  # (B, r, *out)
        return _CONVOLUTIONS[len(self.kernel)](h, up, groups=self.groups)

    def apply_rows(
        self, x: Tensor, down: Tensor, up: Tensor, base: Any, slots: Tensor | None = None
    ) -> Tensor:
        """Return the update (B, N, *out) for x (B, C, *in): entries are groups of one convolution.

        A grouped convolution runs every group with its own kernels, so a batch laid along the
        channels runs every entry with its own adapter.
        """
        down, up = _taken(down, slots), _taken(up, slots)
        batch, ones = len(x), (1,) * len(self.kernel)
        x = _padded(x, base)
        wide = x.reshape(1, -1, *x.shape[2:])  # (1, B·C, *in)
        kernels = down.reshape(batch * down.shape[1], -1, *self.kernel)  # (B·r, C/g, *kernel)
        h = self._convolve(wide, kernels, base, batch * self.groups)  # (1, B·r, *out)
        points = up.reshape(batch * up.shape[1], -1, *ones)  # (B·N, r/g, 1, …)
        y = _CONVOLUTIONS[len(self.kernel)](h, points, groups=batch * self.groups)
        return y.view(batch, -1, *y.shape[2:])

    def along_output(self, vector: Tensor) -> Tensor:
        """Return (N, 1, …)."""
        return vector.view(-1, *(1,) * len(self.kernel))

    def on_disk(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return A as kernels (r, C/g, *kernel) and B as kernels of size 1, (N, r/g, 1, …)."""
        return self.weight(down), up.view(*up.shape, *(1,) * len(self.kernel))

    def _convolve(self, x: Tensor, kernels: Tensor, base: Any, groups: int) -> Tensor:
        padding = 0 if base.padding_mode != "zeros" else base.padding
        function = _CONVOLUTIONS[len(self.kernel)]
        return function(x, kernels, None, base.stride, padding, base.dilation, groups)


def _taken(stack: Tensor, slots: Tensor | None) -> Tensor:
    """An entry of a stack for each slot."""
    return stack if slots is None else stack.index_select(0, slots)


def _padded(x: Tensor, base: Any) -> Tensor:
    """x with the border that a convolution's `padding_mode` makes; zeros are the operator's."""
    if base.padding_mode == "zeros":
        return x
    return F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)


def form_of(module: nn.Module) -> Form | None:
    """Say how a low-rank matrix acts in a module.

    Args:
        module: any, without its hosts.

    Returns:
        The form; None for a module that has no matrix known here, or one that changes its weight
        by itself (an embedding with `max_norm`).
    """
    if is_linear(module):
        return Form(*linear_features(module))
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return None
        return EmbeddingForm(module.num_embeddings, module.embedding_dim)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel = module.kernel_size
        columns = module.in_channels // module.groups
        for size in kernel:
            columns *= size
        return ConvForm(columns, module.out_channels, module.groups, tuple(kernel))
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers'
        columns, rows = getattr(module, "weight").shape  # noqa: B009
        return TransposedForm(columns, rows)
    return None
