r"""The linear update of an adapter at one layer, ΔW, held as it is: a thin product or a matrix.

Every kind that can be merged is a change of one weight, ΔW = W' - W, and so has singular values and
a best approximation of any rank. LoRA's change is s·B A with R columns in B, and all of that comes
from its factors: with B = Q_B R_B and Aᵀ = Q_A R_A,

    s·B A = Q_B (s R_B R_Aᵀ) Q_Aᵀ          Q orthonormal, the core R × R

so the core has ΔW's singular values, and its singular vectors times Q_B and Q_A are ΔW's. That
costs O((N + K) R²) where an SVD of the matrix costs O(N K min(N, K)), and no matrix is formed. All
of it is in float64, to which float32 factors are exact. Values that cannot be told from rounding
are 0: a start that is subtracted (PiSSA) has an update of exactly 0, whose computed values are not.

A kind without factors (DoRA, a full copy, one's own) is asked for its merged weight, in float64,
and the difference is taken. A grouped convolution is block-diagonal, as its groups see inputs of
their own: the values are those of the blocks, together.

Ref: Golub and Van Loan 2013, "Matrix Computations", 4th ed., section 2.4 (SVD, Eckart-Young).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.forms import Form, form_of
from lora_core.adapters.full import FullCopy
from lora_core.adapters.layers import dense_weight
from lora_core.adapters.lora import LoRA

__all__ = ["Update", "difference", "low_rank", "minus", "update_of", "with_bias"]

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Update:
    """ΔW of one layer as the matrix (N, K) that forms.py describes, and the change of its bias.

    Attributes:
        shape: (N, K).
        groups: g, blocks of rows that have inputs of their own.
        down: A, (R, K) float64, or None where the update is a matrix.
        up: s·B, (N, R / g) float64, or None.
        matrix: (N, K) float64, or None where the update is a product.
        bias: (N,) float64, or None for no change.
    """

    shape: tuple[int, int]
    groups: int = 1
    down: Tensor | None = None
    up: Tensor | None = None
    matrix: Tensor | None = None
    bias: Tensor | None = None

    def norm(self) -> float:
        """Return the Frobenius norm of ΔW."""
        if self.matrix is not None:
            return float(torch.linalg.vector_norm(self.matrix))
        return float(torch.linalg.vector_norm(self.singular_values()))

    def singular_values(self) -> Tensor:
        """Return the singular values of ΔW, zeros among them: float64 on the CPU, descending."""
        values = torch.cat([s for _, s, _ in self._factored(vectors=False)])
        return values.sort(descending=True)[0].cpu()

    def svd(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the thin singular value decomposition of each group's block.

        Returns:
            For each group (U (N/g, k), S (k,) descending, Vh (k, K)), float64.
        """
        return list(self._factored(vectors=True))

    def _factored(self, vectors: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.matrix is not None:
            for block in self.matrix.chunk(self.groups):
                yield _svd(block, max(block.shape) * _EPS, vectors)
            return
        assert self.down is not None
        assert self.up is not None
        downs, ups = self.down.chunk(self.groups), self.up.chunk(self.groups)
        for down, up in zip(downs, ups, strict=True):
            basis, small = torch.linalg.qr(up)  # (N/g, k), (k, R/g)
            rows, thin = torch.linalg.qr(down.t())  # (K, m), (m, R/g)
            # rounding of the products is relative to the factors, not to what is left of them
            size = float(small.norm()) * float(thin.norm())
            u, s, vh = _svd(small @ thin.t(), 0.0, vectors)
            s = torch.where(s <= 4 * len(down) * _EPS * size, 0.0, s)
            yield (basis @ u, s, vh @ rows.t()) if vectors else (u, s, vh)


def _svd(matrix: Tensor, relative: float, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
    """SVD, with values below `relative` times the largest set to 0; without vectors empty ones.

    Of a matrix that is not finite, whose decomposition would not converge, all values are NaN.
    """
    if not bool(matrix.isfinite().all()):
        k = min(matrix.shape)
        empty = matrix.new_full((matrix.shape[0], k), torch.nan)
        return (
            empty,
            empty.new_full((k,), torch.nan),
            matrix.new_full((k, matrix.shape[1]), torch.nan),
        )
    if vectors:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        s = torch.linalg.svdvals(matrix)
        u = vh = s.new_empty(0)
    return u, torch.where(s <= relative * s[:1], 0.0, s), vh


def low_rank(down: Tensor, up: Tensor, scaling: float, groups: int = 1) -> Update:
    """Make the update s·B A.

    Args:
        down: A, (R, K).
        up: B, (N, R / g).
        scaling: s.
        groups: g.

    Returns:
        The update.
    """
    return Update(
        (len(up), down.shape[1]),
        groups,
        down=down.detach().double(),
        up=up.detach().double() * scaling,
    )


def difference(form: Form | None, new: Tensor, old: Tensor) -> Update:
    """Make the update new - old from two weights of one layer.

    Args:
        form: the layer's, or None: rows are those of the weight's first dimension.
        new: weight, in the layer's layout.
        old: weight of the same shape.

    Returns:
        The update.
    """
    change = new.detach().double() - old.detach().double()
    matrix = form.matrix(change) if form is not None else change.reshape(len(change), -1)
    shape = (matrix.shape[0], matrix.shape[1])
    return Update(shape, 1 if form is None else form.groups, matrix=matrix)


@torch.no_grad()
def update_of(adapter: Adapter, base: nn.Module) -> Update:
    """Return what an adapter does to its layer's weight.

    Args:
        adapter: of any kind that can be merged.
        base: the layer, without hosts.

    Returns:
        The update: a product for LoRA, a matrix for other kinds.

    Raises:
        ValueError: a kind that cannot be merged, or a layer without one weight.
    """
    if adapter.unmergeable is not None:
        raise ValueError(f"it has no linear update: {adapter.unmergeable}")
    # a class derived from LoRA (DoRA) may do more with its factors
    if type(adapter) is LoRA:
        update = low_rank(*adapter.factors(), adapter.scaling, adapter.form.groups)
        return with_bias(update, adapter.bias_change(torch.float64))
    if not isinstance(getattr(base, "weight", None), Tensor) and not hasattr(base, "dense_weight"):
        raise ValueError(f"{type(base).__name__} has no weight of its own to compare")
    old = dense_weight(base).double()
    bias = getattr(base, "bias", None)
    old_bias = None if bias is None else bias.detach().double()
    with torch.autocast(old.device.type, enabled=False):
        new, new_bias = _merged(adapter, base, old, old_bias)
    if new.shape != old.shape:
        raise ValueError(f"it makes a weight of shape {tuple(new.shape)} of {tuple(old.shape)}")
    change = new_bias
    if new_bias is not None and old_bias is not None:
        change = new_bias - old_bias
    return with_bias(difference(form_of(base), new, old), change)


def _merged(
    adapter: Adapter, base: nn.Module, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that an adapter leaves, in float64."""
    if isinstance(adapter, FullCopy):
        own = getattr(adapter.copy, "bias", None)
        return dense_weight(adapter.copy).double(), None if own is None else own.detach().double()
    return adapter.merged(weight, bias)


def with_bias(update: Update, bias: Tensor | None) -> Update:
    """Return the same with a change (N,) of the bias, unless that is zero."""
    if bias is None or not bool(bias.any()):
        return update
    return replace(update, bias=bias.detach().double())


def minus(update: Update, down: Tensor, up: Tensor) -> Update:
    """Return ΔW - B A.

    Args:
        update: ΔW.
        down: A, (r, K).
        up: B, (N, r / g).

    Returns:
        The difference; a product if ΔW is one.
    """
    groups, (rows, columns) = update.groups, update.shape
    down, up = down.detach().double(), up.detach().double()
    if update.matrix is not None:
        blocks = up.view(groups, -1, up.shape[1]) @ down.view(groups, -1, columns)  # (g, N/g, K)
        return replace(update, matrix=update.matrix - blocks.view(rows, columns))
    assert update.down is not None
    assert update.up is not None
    pair = (update.down.view(groups, -1, columns), down.view(groups, -1, columns))
    joined = torch.cat(pair, dim=1).view(-1, columns)  # (R + r, K)
    return replace(update, down=joined, up=torch.cat((update.up, -up), dim=1))
