"""TIES and DARE: combining updates element by element.

    TIES    τ̂ᵢ = the largest of τᵢ;  γ = sgn(Σ wᵢ τ̂ᵢ);  mean of the wᵢ τ̂ᵢ that have the sign γ
    DARE    τ̃ᵢ = mᵢ τᵢ / p,  mᵢ ~ Bernoulli(p), so that the expectation is τᵢ

Ref: Yadav et al. 2023, arXiv:2306.01708, algorithm 1; Yu et al. 2023, arXiv:2311.03099, section 3;
Halko et al. 2011, arXiv:0909.4061, algorithm 4.4, for the sketch of a large matrix.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.update import Update

__all__ = ["dare", "mixed_matrix", "sketched", "ties", "trim"]

_WHOLE = 512  # of a matrix with a smaller side, the whole SVD is taken
_MORE, _POWERS = 16, 4


def trim(matrix: Tensor, density: float) -> Tensor:
    """Keep the elements of largest magnitude, exactly ⌈density · n⌉ of them; the others are 0.

    Args:
        matrix: any shape.
        density: share to keep, in (0, 1].

    Returns:
        A tensor of its shape.
    """
    values = matrix.reshape(-1)
    kept = values.abs().topk(math.ceil(density * len(values)), sorted=False).indices
    out = torch.zeros_like(values)
    return out.scatter_(0, kept, values[kept]).view_as(matrix)


def dare(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop elements at random and divide the others by `density`.

    Args:
        matrix: any shape.
        density: probability of staying, in (0, 1].
        generator: on the CPU.

    Returns:
        A tensor of its shape.
    """
    draws = torch.rand(matrix.shape, generator=generator)
    return torch.where((draws < density).to(matrix.device), matrix / density, 0.0)


def ties(weighted: list[Tensor]) -> Tensor:
    """Elect each element's sign and take the mean of those that have it.

    Args:
        weighted: wᵢ τ̂ᵢ, trimmed, of one shape.

    Returns:
        A tensor of that shape; 0 where nothing is, or where the sum has no sign.
    """
    sign = sum(weighted[1:], start=weighted[0]).sign()
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for one in weighted:
        agrees = (one.sign() == sign) & (one != 0)
        total += torch.where(agrees, one, 0.0)
        count += agrees
    return total / count.clamp(min=1)


def mixed_matrix(
    terms: list[Update], method: str, density: float, generator: torch.Generator | None
) -> Tensor:
    """Combine wᵢ ΔWᵢ by "ties", "dare" or "dare_ties".

    Args:
        terms: products with their weights in them.
        method: one of the three.
        density: share of the elements that stay.
        generator: for dare.

    Returns:
        (N, K) float64.
    """
    dense = (_dense(term) for term in terms)
    if method == "ties":
        return ties([trim(matrix, density) for matrix in dense])
    assert generator is not None
    dropped = [dare(matrix, density, generator) for matrix in dense]
    return ties(dropped) if method == "dare_ties" else sum(dropped[1:], start=dropped[0])


def _dense(term: Update) -> Tensor:
    """(N, K) of a product."""
    assert term.down is not None
    assert term.up is not None
    g, (rows, columns) = term.groups, term.shape
    blocks = term.up.view(g, -1, term.up.shape[1]) @ term.down.view(g, -1, columns)
    return blocks.view(rows, columns)  # (g, N/g, K) -> (N, K)


def sketched(update: Update, rank: int) -> Update:
    """Replace a large matrix by a product that has its leading singular directions.

    A random matrix, multiplied by it a few times, spans them; the whole SVD of a layer of a large
    model takes minutes.

    Args:
        update: a matrix.
        rank: how many directions are wanted.

    Returns:
        Q (Qᵀ M), Q of rank + 16 orthonormal columns; the update itself where it is small.
    """
    matrix = update.matrix
    if matrix is None or update.groups > 1 or min(matrix.shape) <= max(_WHOLE, 2 * rank):
        return update
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank + _MORE, generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(matrix @ start.to(matrix.device))  # (N, rank + 16)
    for _ in range(_POWERS):
        rows, _ = torch.linalg.qr(matrix.t() @ basis)
        basis, _ = torch.linalg.qr(matrix @ rows)
    return replace(update, matrix=None, down=basis.t() @ matrix, up=basis)
