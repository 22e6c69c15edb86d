r"""The best low-rank factors of an update, and the report on what they miss.

    ΔW = U S Vᵀ  ->  B = U_r √S_r,  A = √S_r V_rᵀ          the error is sqrt(Σ_{i>r} σᵢ²)

With the groups of a convolution, each group's block has its own r / g of them. The root of S goes
to both sides, so that A and B are of one size. Reported is the error of the float32 factors.

Ref: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.host import spelt
from lora_core.adapters.update import Update, minus

__all__ = ["ConversionReport", "Factors", "LayerConversion", "truncated"]


@dataclass(frozen=True)
class LayerConversion:
    """What became of one layer's update.

    Attributes:
        name: the module.
        rank: r of its LoRA.
        full_rank: how many singular values of the update are not 0.
        error: |ΔW - B A| / |ΔW|, Frobenius norms, of the stored float32 factors.
        kept: share of the energy |ΔW|² that the r largest singular values have.
    """

    name: str
    rank: int
    full_rank: int
    error: float
    kept: float

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; `print` it.

    Attributes:
        name: of the new adapter.
        layers: one entry a layer that has a LoRA now.
        error: |ΔW - B A| / |ΔW| over all layers together.
        unchanged: layers whose update is zero, without a LoRA.
        others: what else differs between the two models of `extract_lora`, or "layer.bias" where a
            bias's change was dropped.
    """

    name: str
    layers: tuple[LayerConversion, ...]
    error: float
    unchanged: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        layers = [layer.as_dict() for layer in self.layers]
        lists = {"unchanged": list(self.unchanged), "others": list(self.others)}
        return {"name": self.name, "error": self.error, "layers": layers, **lists}

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers]
        told = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        where = f"LoRA of rank {told} in {len(self.layers)} layers"
        lines = [f"{self.name!r}: {where}, relative error {self.error:.3%}"]
        lines += [
            f"  {layer.name}: rank {layer.rank} of {layer.full_rank}, error {layer.error:.3%}, "
            f"{layer.kept:.3%} of the energy"
            for layer in self.layers
        ]
        if self.unchanged:
            lines.append(f"unchanged: {len(self.unchanged)} layers")
        if self.others:
            some = ", ".join(self.others[:5]) + (", …" if len(self.others) > 5 else "")
            lines.append(f"not in it, though different: {some}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Factors:
    """A LoRA's factors, and what they are worth.

    Attributes:
        down: A, (r, K) float32; None with `up` where the weight does not change.
        up: B, (N, r / g) float32, or None.
        entry: for the report.
        size: |ΔW|.
        residue: |ΔW - B A|.
    """

    down: Tensor | None
    up: Tensor | None
    entry: LayerConversion
    size: float
    residue: float


def truncated(site: str, update: Update, r: int | None, error: float | None) -> Factors:
    """Find the best factors of an update.

    Args:
        site: the module's name.
        update: ΔW.
        r: the largest rank, a multiple of the groups; never more than the update has.
        error: instead, the largest relative error: the smallest rank that keeps to it.

    Returns:
        The factors.

    Raises:
        ValueError: r is no multiple of the groups, or the update is not finite.
    """
    groups = update.groups
    blocks = update.svd()
    values = torch.stack([s for _, s, _ in blocks])  # (g, k)
    if not bool(values.isfinite().all()):
        raise ValueError(f"the update of {spelt(site)} holds NaN or infinity")
    full = int((values > 0).sum(1).max())  # of one group
    if full == 0:
        return Factors(None, None, LayerConversion(site, groups, 0, 0.0, 1.0), 0.0, 0.0)
    rank = _rank(site, values, full, r, error)
    roots = [s[:rank].sqrt() for _, s, _ in blocks]
    parts = list(zip(blocks, roots, strict=True))
    up = torch.cat([u[:, :rank] * root for (u, _, _), root in parts]).float()  # (N, r/g)
    down = torch.cat([root[:, None] * vh[:rank] for (_, _, vh), root in parts]).float()  # (r, K)
    size = float(torch.linalg.vector_norm(values))
    residue = minus(update, down, up).norm()
    kept = float(torch.linalg.vector_norm(values[:, :rank])) / size
    entry = LayerConversion(site, groups * rank, groups * full, residue / size, kept**2)
    return Factors(down, up, entry, size, residue)


def _rank(site: str, values: Tensor, full: int, r: int | None, error: float | None) -> int:
    """Rank of each group's factors, from the groups' singular values (g, k)."""
    groups = len(values)
    if r is not None:
        if r % groups:
            raise ValueError(f"r must be a multiple of the {groups} groups of {site!r}, got {r}")
        return min(r // groups, full)
    assert error is not None
    squares = values.square().sum(0)  # (k,)
    # what is missed with rank 0, 1, …: summed from the smallest, so that no small one is lost
    missed = squares.flip(0).cumsum(0).flip(0)
    allowed = error**2 * float(missed[0])
    fits = [rank for rank in range(1, full) if float(missed[rank]) <= allowed]
    return fits[0] if fits else full
