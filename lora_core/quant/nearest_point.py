"""The nearest point of a grid in a metric that is not the identity, row by row.

    minimise  e H eᵀ,   e = w - target,   w_j one of L levels times a scale

H = U diag(d) Uᵀ, U unit upper triangular, turns this into sum_j d_j (e_j + drift_j)², where drift_j
depends on the columns before j alone. Deciding each column by itself, its drift taken into account,
is Babai's nearest plane, which is what GPTQ does; here the `beams` best beginnings are kept on the
way (the M-algorithm of sphere decoders).

The last column bears all of its error, as nothing after it can make up for it. So the order is
chosen from the back: last the column of the smallest variance, before it that of the smallest
variance given the last, and so on. (GPTQ's `act_order` sorts by the plain variances.)

Columns are worked on in blocks, so that most of the work is products of matrices.

Ref: Frantar et al. 2022, arXiv:2210.17323, section 3; Chen et al. 2025, arXiv:2507.18553.
"""

import torch
from torch import Tensor

__all__ = ["BLOCK", "factor", "nearest_level", "search"]

BLOCK = 64  # columns that are worked on together


def factor(metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order the columns and factor the metric: H[order, order] = U diag(d) Uᵀ.

    The last column is that of the smallest variance, the last but one that of the smallest given
    the last, and so on: a Cholesky factorization that takes the smallest pivot, in blocks.

    Returns:
        order int64 (K,); U float32 (K, K), unit upper triangular; d float32 (K,), above 0.
    """
    k = len(metric)
    rest = metric.clone()  # what is left of the metric after whole blocks
    left = metric.diagonal().clone()  # of each column, given those taken
    lower = metric.new_zeros(k, k)  # column t: the t-th taken, rows in the original order
    still = torch.ones_like(left)  # 1 for columns not taken
    taken: list[int] = []
    floor = 1e-12 * float(left.max())
    for first in range(0, k, BLOCK):
        stop = min(first + BLOCK, k)
        for t in range(first, stop):
            pivot = int(left.argmin())
            taken.append(pivot)
            done = lower[:, first:t]
            column = rest[:, pivot] - done @ done[pivot]  # (K,)
            column = still * column / column[pivot].clamp(min=floor).sqrt()
            still[pivot] = 0.0
            lower[:, t] = column
            left -= column.square()
            left[pivot] = torch.inf
        block = lower[:, first:stop]
        rest -= block @ block.t()
    order = torch.tensor(taken[::-1], device=metric.device)
    upper = lower[order].flip(1)  # (K, K) upper triangular
    root = upper.diagonal()
    return order, (upper / root).float(), root.square().float()


def nearest_level(levels: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
    """Rank of the level that is nearest to wanted / scale, int64."""
    middle = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(wanted / torch.where(scale == 0, 1, scale), middle)


def _take(values: Tensor, parent: Tensor) -> Tensor:
    """Rows of beams by the number of the beam that each comes from: (n, w, c)[(n, w')]."""
    return values.gather(1, parent[..., None].expand(-1, -1, values.shape[-1]))


def search(
    target: Tensor, scale: Tensor, unit: Tensor, weight: Tensor, levels: Tensor, beams: int
) -> Tensor:
    """Decide column by column, keeping the beginnings that cost least.

    Args:
        target: (n, K), columns in the order of the factor.
        scale: (n, K), likewise.
        unit: U (K, K).
        weight: d (K,).
        levels: (L,).
        beams: how many beginnings are kept.

    Returns:
        uint8 ranks (n, K), in the order given.
    """
    n, k = target.shape
    drift = target.new_zeros(n, 1, k)  # from the blocks decided, for all columns to come
    ranks = torch.zeros(n, 1, k, dtype=torch.uint8, device=target.device)
    cost = target.new_zeros(n, 1)
    for first in range(0, k, BLOCK):
        columns = slice(first, min(first + BLOCK, k))
        cost, origin, chosen, errors = _block(
            target[:, columns],
            scale[:, columns],
            unit[columns, columns],
            weight[columns],
            levels,
            beams,
            cost,
            drift[:, :, : columns.stop - first],
        )
        drift = _take(drift[:, :, columns.stop - first :], origin)
        drift += errors @ unit[columns, columns.stop :]
        ranks = _take(ranks, origin)
        ranks[:, :, columns] = chosen
    best = cost.argmin(1, keepdim=True)  # (n, 1)
    return _take(ranks, best)[:, 0]


def _block(
    target: Tensor,
    scale: Tensor,
    unit: Tensor,
    weight: Tensor,
    levels: Tensor,
    beams: int,
    cost: Tensor,
    drift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decide the columns of one block.

    Returns:
        cost (n, w); the beam of the start that each comes from (n, w); its ranks and errors in the
        block, (n, w, columns).
    """
    n, width = cost.shape
    origin = torch.arange(width, device=cost.device).expand(n, width)
    chosen = torch.zeros(drift.shape, dtype=torch.uint8, device=cost.device)
    # 0, +1, -1: the nearest level and its neighbours
    moves = torch.tensor([0] if beams == 1 else [0, 1, -1], device=cost.device)
    for j in range(target.shape[1]):
        wanted = target[:, j, None] - drift[:, :, 0]  # (n, w)
        step = scale[:, j, None]
        nearest = nearest_level(levels, wanted, step)[..., None] + moves  # (n, w, moves)
        rank = nearest.clamp(0, len(levels) - 1)
        value = levels[rank] * step[..., None]
        total = cost[..., None] + weight[j] * (value - wanted[..., None]).square()
        total = total.masked_fill(rank != nearest, torch.inf)  # beyond the ends
        kept = min(beams, total[0].numel())
        cost, pick = total.flatten(1).topk(kept, largest=False)  # (n, w')
        parent = pick // len(moves)
        origin, chosen = origin.gather(1, parent), _take(chosen, parent)
        chosen[:, :, j] = rank.flatten(1).gather(1, pick).to(torch.uint8)
        error = value.flatten(1).gather(1, pick) - target[:, j, None]  # (n, w')
        drift = _take(drift[:, :, 1:], parent)  # of the columns to come
        drift += error[..., None] * unit[j, j + 1 :]
    errors = levels[chosen.int()] * scale[:, None] - target[:, None]  # (n, w, columns)
    return cost, origin, chosen, errors
