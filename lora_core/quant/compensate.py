"""Quantize a changed weight again so that its outputs, not its entries, come out right.

A 4-bit weight W0 lies on its own grid. An update of a percent or two is a fraction of the grid's
step, so rounding W0 + D entry by entry gives W0 back (plain requantization even loses a little, as
the largest entry of a block moves its scale). What is wanted, though, is small output error:

    minimise  |X (W - W0 - D)ᵀ|² = tr (W - W0 - D) H (W - W0 - D)ᵀ,      H = Xᵀ X

over all W that the format can hold. Where inputs are correlated, many small steps can stand
for one that is smaller than a step: the errors of the codes are made to cancel in the directions
that inputs have. Each row of W is such a problem of its own, a nearest-point search in a lattice:

1. Order and factor. H = U diag(d) Uᵀ with a unit upper triangle makes the cost
   sum_j d_j (e_j + drift_j)², drift_j being fixed by the columns decided before j. The column
   decided last cannot be made up for, so it is the one with the smallest d, and so on upwards.
2. Search. Columns are decided one after the other, keeping the `beams` best beginnings. With one
   beam this is the rounding of GPTQ, which is Babai's nearest plane.
3. Descend. Codes, then scales (in what the format can hold, 8-bit ones among their 256), are
   improved one at a time while the others stay.
4. A row whose cost is not below that of W0's own codes keeps those.

Bits a weight are unchanged: codes and scales are of W0's format, block by block, and the group
scales and the offset of double quantization are W0's. Dense products of blocks of columns do the
bulk of the work, as in GPTQ; the cost is about `beams` times GPTQ's.

Where inputs are uncorrelated (H a multiple of the identity), W0 + D's nearest point is W0 itself as
soon as D is smaller than half a step, and nothing can be gained.

Ref: Frantar et al. 2022, GPTQ, arXiv:2210.17323, section 3; Chen et al. 2025, The Geometry of LLM
Quantization, arXiv:2507.18553 (GPTQ is Babai's algorithm); Behdin et al. 2023, QuantEase,
arXiv:2309.01885 (coordinate descent).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_core.quant.double_quant import shared_map
from lora_core.quant.nearest_point import BLOCK, factor, nearest_level, search
from lora_core.quant.nf4 import NF4Tensor
from lora_kernels.blockwise4 import SCALE_GROUP

__all__ = ["output_cost", "requantize_4bit"]

_ROW_BYTES = 1 << 27  # of one float32 number for each beam and column of a slice of rows


def output_cost(error: Tensor, moment: Tensor) -> Tensor:
    """Return |X eᵀ|² for each row e of a weight's error, from X's second moment.

    Args:
        error: (N, K).
        moment: Xᵀ X, (K, K), float64.

    Returns:
        float64 (N,), not below 0.
    """
    wide = error.to(moment.dtype)
    return ((wide @ moment) * wide).sum(1).clamp(min=0)


@torch.no_grad()
def requantize_4bit(
    start: NF4Tensor,
    target: Tensor,
    moment: Tensor,
    *,
    beams: int = 8,
    damping: float = 0.01,
    sweeps: int = 3,
) -> NF4Tensor:
    """Choose codes and scales near a weight's own so that `|X (W - target)ᵀ|` is small.

    Args:
        start: W0 (N, K), the weight before its update, and the format of the result.
        target: W0 + D, (N, K), finite.
        moment: H = Xᵀ X over sample inputs, (K, K), or any multiple of it.
        beams: beginnings that are kept in the search; 1 is GPTQ's rounding.
        damping: added to the diagonal of H as a share of its mean: the weight of directions that
            the samples do not show.
        sweeps: rounds of improvement of all codes after the search, all scales between them.

    Returns:
        A 4-bit tensor of the same format and size. By `moment` (damped), no row is worse than
        in `start`.

    Raises:
        ValueError: shapes that do not fit, a target or moment that is not finite, or an option out
            of range.

    Ref: GPTQ, arXiv:2210.17323, equation 2 and algorithm 1.
    """
    _check(start, target, moment, beams, damping, sweeps)
    n, k = start.shape
    metric = moment.double() / moment.double().diagonal().mean().clamp(min=1e-300)  # (K, K)
    metric.diagonal().add_(damping)
    order, unit, weight = factor(metric)
    grid = _Grid.of(start)
    wide = metric.float()
    ranks, scales = grid.ranks.clone(), grid.scales.clone()
    rows = max(1, _ROW_BYTES // (4 * beams * k))
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        goal = target[part].float()
        found = torch.empty_like(ranks[part])
        found[:, order] = search(
            goal[:, order], grid.spread(scales[part])[:, order], unit, weight, grid.levels, beams
        )
        for sweep in range(sweeps):
            if sweep:
                _improve_scales(found, scales[part], goal, wide, grid, first)
            _improve_codes(found, scales[part], goal, wide, grid)
        ranks[part] = found
    made, goal = grid.dense(ranks, scales), target.double()
    worse = output_cost(made - goal, metric) >= output_cost(start.dequantize() - goal, metric)
    ranks[worse], scales[worse] = grid.ranks[worse], grid.scales[worse]
    return grid.packed(ranks, scales)


def _check(
    start: NF4Tensor, target: Tensor, moment: Tensor, beams: int, damping: float, sweeps: int
) -> None:
    if len(start.shape) != 2 or target.shape != start.shape:
        raise ValueError(
            f"target must have the weight's shape, a matrix {tuple(start.shape)}; "
            f"got {tuple(target.shape)}"
        )
    k = start.shape[1]
    if moment.shape != (k, k):
        raise ValueError(
            f"moment must be ({k}, {k}), as the weight has {k} columns; got {tuple(moment.shape)}"
        )
    for name, tensor in (("target", target), ("moment", moment)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    if beams < 1 or sweeps < 0 or not 0 < damping < float("inf"):
        raise ValueError(
            "beams must be 1 or more, sweeps 0 or more and damping above 0; "
            f"got {beams}, {sweeps} and {damping}"
        )


@dataclass
class _Grid:
    """What values a 4-bit weight can take: levels in ascending order, scales by blocks.

    Codes are handled as ranks, the index among the ascending levels, so that neighbours are one
    apart. Scales are one a row and block where rows are whole blocks, else one an element.
    """

    start: NF4Tensor
    levels: Tensor
    """float32 (L,), ascending and distinct"""
    codes: Tensor
    """uint8 (L,): the code of each level"""
    ranks: Tensor
    """uint8 (N, K)"""
    scales: Tensor
    """float32 (N, K / block), decoded; (N, K) where blocks go across rows"""
    by_rows: bool

    @classmethod
    def of(cls, start: NF4Tensor) -> "_Grid":
        n, k = start.shape
        device = start.packed.device
        values, order = start.code.table(device).sort(stable=True)
        first = torch.ones_like(values, dtype=torch.bool)
        first[1:] = values[1:] != values[:-1]  # a second zero is not used
        rank = torch.empty(16, dtype=torch.uint8, device=device)
        rank[order] = (first.cumsum(0) - 1).to(torch.uint8)
        codes = torch.stack((start.packed >> 4, start.packed & 15), 1).view(-1)[: n * k]
        by_rows = k % start.block_size == 0
        scales = start.absmax.clone()
        if by_rows:
            scales = scales.view(n, -1)
        else:
            scales = scales.repeat_interleave(start.block_size)[: n * k].view(n, k)
        ranks = rank[codes.int()].view(n, k)
        return cls(start, values[first], order[first].to(torch.uint8), ranks, scales, by_rows)

    @property
    def nested(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """What decodes 8-bit scales."""
        absmax, offset = self.start.scale_absmax, self.start.scale_offset
        if absmax is None or offset is None:
            return None
        return absmax, offset, shared_map(absmax.device)

    def spread(self, scales: Tensor) -> Tensor:
        """The scale of each element, (n, K)."""
        return scales.repeat_interleave(self.start.block_size, 1) if self.by_rows else scales

    def dense(self, ranks: Tensor, scales: Tensor) -> Tensor:
        """The weight, float32 (n, K)."""
        return self.levels[ranks.int()] * self.spread(scales)

    def nearest_scales(self, wanted: Tensor, now: Tensor, blocks: Tensor) -> Tensor:
        """The scales that the format can hold nearest to those wanted, (n,); none below zero.

        Args:
            wanted: float32 (n,).
            now: the present ones, kept where a better one would be negative.
            blocks: indices of the blocks, (n,).
        """
        index = self._scale_index(wanted, blocks)
        held = wanted if index is None else self._decoded(index, blocks)
        return torch.where((held > 0) & torch.isfinite(held), held, now)

    def _scale_index(self, scales: Tensor, blocks: Tensor) -> Tensor | None:
        """The 8-bit codes nearest to scales, uint8; None where scales are float32."""
        if self.nested is None:
            return None
        absmax, offset, table = (t.double() for t in self.nested)
        bound = absmax[blocks // SCALE_GROUP].clamp(min=1e-38)
        middle = (table[1:] + table[:-1]) / 2
        return torch.bucketize((scales.double() - offset) / bound, middle).to(torch.uint8)

    def _decoded(self, index: Tensor, blocks: Tensor) -> Tensor:
        assert self.nested is not None
        absmax, offset, table = self.nested
        return table[index.int()] * absmax[blocks // SCALE_GROUP] + offset

    def packed(self, ranks: Tensor, scales: Tensor) -> NF4Tensor:
        """The 4-bit tensor in the format of the start."""
        flat = self.codes[ranks.int()].view(-1)
        if flat.numel() % 2:  # the nibble left over is the start's
            flat = torch.cat((flat, self.start.packed[-1:] & 15))
        packed = (flat[0::2] << 4) | flat[1::2]
        if not self.by_rows:
            return replace(self.start, packed=packed)
        flat_scales = scales.reshape(-1)
        blocks = torch.arange(flat_scales.numel(), device=flat_scales.device)
        index = self._scale_index(flat_scales, blocks)
        if index is None:
            return replace(self.start, packed=packed, scales=flat_scales)
        # several codes may decode to one number: a scale that did not change keeps its own
        same = flat_scales == self.scales.view(-1)
        return replace(
            self.start, packed=packed, scales=torch.where(same, self.start.scales, index)
        )


def _improve_codes(
    ranks: Tensor, scales: Tensor, target: Tensor, metric: Tensor, grid: _Grid
) -> None:
    """One sweep of coordinate descent over the codes, in place.

    The best value of an entry, the others fixed, is w_j - (e H)_j / H_jj, and the cost is a
    parabola around it, so the nearest level is the best one.
    """
    step = grid.spread(scales)  # (n, K)
    value = grid.dense(ranks, scales)
    slope = (value - target) @ metric  # e H, (n, K)
    for first in range(0, target.shape[1], BLOCK):
        columns = slice(first, first + BLOCK)
        inner = metric[columns, columns]
        local, now = slope[:, columns].clone(), value[:, columns].clone()
        for j in range(now.shape[1]):
            wanted = now[:, j] - local[:, j] / inner[j, j]
            rank = nearest_level(grid.levels, wanted, step[:, first + j])
            new = grid.levels[rank] * step[:, first + j]
            local += (new - now[:, j])[:, None] * inner[j]
            now[:, j] = new
            ranks[:, first + j] = rank.to(torch.uint8)
        slope += (now - value[:, columns]) @ metric[columns]
        value[:, columns] = now


def _improve_scales(
    ranks: Tensor, scales: Tensor, target: Tensor, metric: Tensor, grid: _Grid, row0: int
) -> None:
    """The same for the scales, block by block; nothing where a block goes across rows."""
    if not grid.by_rows:
        return
    size, per_row = grid.start.block_size, scales.shape[1]
    slope = (grid.dense(ranks, scales) - target) @ metric  # (n, K)
    rows = torch.arange(row0, row0 + len(ranks), device=ranks.device)
    for b in range(per_row):
        columns = slice(b * size, (b + 1) * size)
        level = grid.levels[ranks[:, columns].int()]  # (n, block)
        curve = ((level @ metric[columns, columns]) * level).sum(1)  # (n,)
        wanted = scales[:, b] - (slope[:, columns] * level).sum(1) / curve.clamp(min=1e-30)
        new = grid.nearest_scales(wanted, scales[:, b], rows * per_row + b)
        slope += ((new - scales[:, b])[:, None] * level) @ metric[columns]
        scales[:, b] = new
