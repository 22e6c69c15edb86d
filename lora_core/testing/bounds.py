r"""How far two ways of computing one number may lie apart: the standard model of rounding.

Each operation returns `fl(a op b) = (a op b)(1 + d)` with `|d| <= u`, `u = eps / 2` (round to
nearest). A dot product of n terms, summed in any order, then errs by at most `gamma(n)` times the
sum of the terms' magnitudes, and factors compose: `(1 + gamma_i)(1 + gamma_j) <= 1 + gamma_{i+j}`.
Where a result is subnormal its error is `u * tiny` instead; magnitudes are padded by `tiny`, the
smallest normal number, which covers it.

Ref: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., lemmas 3.1 and 3.3.
"""

import torch
from torch import Tensor

ACCUMULATE = 2.0**-24  # unit roundoff of float32, in which products of 16-bit numbers are summed


def gamma(n: int, u: float = ACCUMULATE) -> float:
    """`n u / (1 - n u)`, the relative error that n roundings in a row may reach.

    Args:
        n: number of roundings.
        u: unit roundoff.

    Returns:
        The bound.

    Raises:
        ValueError: `n u >= 1`, where nothing can be promised.
    """
    if n * u >= 1:
        raise ValueError(f"{n} roundings of {u:.1e} each leave nothing to promise")
    return n * u / (1 - n * u)


def allowance(n: int, dtype: torch.dtype, roundings: int) -> float:
    """Relative error of a computation in `dtype`.

    Args:
        n: operations in a row in float32, the dot products included.
        dtype: float32, bfloat16 or float16.
        roundings: how often a number on the way is rounded to `dtype`, if that has 16 bits.

    Returns:
        `gamma(n)`, joined in 16 bits by the roundings.
    """
    if dtype == torch.float32:
        return gamma(n)
    return (1 + gamma(n)) * (1 + gamma(roundings, torch.finfo(dtype).eps / 2)) - 1


def exceeds(got: Tensor, wanted: Tensor, bound: Tensor) -> str | None:
    """The worst element of `|got - wanted|` over its bound, in words; None if all are within.

    Args:
        got: any dtype.
        wanted: the same shape.
        bound: the same shape, elementwise.

    Returns:
        A clause for a message, or None. A NaN is never within.
    """
    if got.shape != wanted.shape:
        return f"has shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    error = (got.double() - wanted.double()).abs()
    # `~(<=)` and not `>`, so that NaN counts
    over = ~(error <= bound)
    if not bool(over.any()):
        return None
    excess = torch.where(over, (error - bound).nan_to_num(torch.inf), -1.0)
    i = int(excess.argmax())
    index = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), got.shape))
    return (
        f"is {got.reshape(-1)[i].item():.9g} at {index} instead of "
        f"{wanted.reshape(-1)[i].item():.9g}: off by {error.reshape(-1)[i].item():.3g}, "
        f"allowed {bound.reshape(-1)[i].item():.3g}"
    )
