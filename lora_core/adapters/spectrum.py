r"""Looking at an adapter: how large its update is beside the weight, and in how many directions.

For each layer, with the singular values σ₁ ≥ σ₂ ≥ … of its update ΔW (update.py):

    |ΔW|             Frobenius norm, sqrt(Σ σᵢ²)
    |ΔW| / |W|       relative to the base's weight (of a 4-bit base, the dequantized one)
    effective rank   exp(-Σ pᵢ ln pᵢ),  pᵢ = σᵢ / Σ σ: the exponential of the entropy of the values;
                     k equal values give k
    stable rank      |ΔW|² / σ₁²: never above the rank, and unmoved by small values

A rank-16 adapter whose effective rank is 3 would have done with less; one whose ratio is 0.1 % in a
layer did not learn there. PEFT has no such view.

Ref: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO,
definition 1; Rudelson and Vershynin 2007, "Sampling from large matrices", J. ACM 54(4) (the stable
rank, there "numerical").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core.adapters.host import adapted_modules, spelt
from lora_core.adapters.layers import dense_weight
from lora_core.adapters.switch import adapter_names
from lora_core.adapters.update import Update, update_of
from lora_core.targets import nearest, unwrap

__all__ = ["LayerSpectrum", "SpectrumReport", "adapter_spectrum", "layer_spectrum"]


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's update.

    Attributes:
        name: the module.
        kind: what is there: "LoRA", "DoRA", …
        shape: (N, K) of its weight as a matrix.
        norm: |ΔW|.
        base_norm: |W|, or None where the base is not at hand.
        singular_values: those of ΔW above 0, descending.
        bias_change: norm of the change of the bias.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    norm: float
    base_norm: float | None
    singular_values: tuple[float, ...]
    bias_change: float

    @property
    def ratio(self) -> float | None:
        """|ΔW| / |W|; None without the base, infinite beside a weight of zeros."""
        if self.base_norm is None:
            return None
        if self.base_norm == 0.0:
            return math.inf if self.norm else 0.0
        return self.norm / self.base_norm

    @property
    def rank(self) -> int:
        """How many singular values are not 0."""
        return len(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised singular values; 0 for no update."""
        total = math.fsum(self.singular_values)
        shares = [value / total for value in self.singular_values]
        # 0 ln 0 = 0; a share may underflow
        return math.exp(-math.fsum(p * math.log(p) for p in shares if p)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """|ΔW|² / σ₁²; 0 for no update."""
        if not self.singular_values:
            return 0.0
        return math.fsum((value / self.singular_values[0]) ** 2 for value in self.singular_values)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "norm": self.norm,
            "base_norm": self.base_norm,
            "ratio": None if self.ratio == math.inf else self.ratio,  # JSON has no infinity
            "rank": self.rank,
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "singular_values": list(self.singular_values),
            "bias_change": self.bias_change,
        }


@dataclass(frozen=True)
class SpectrumReport:
    """The updates of an adapter, layer by layer; `print` it.

    Attributes:
        name: the adapter's name, or its folder's.
        layers: one entry a layer, in the model's order (from a folder, by name and number).
        left_out: (module, why) of what has no update of a weight to look at.
    """

    name: str
    layers: tuple[LayerSpectrum, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "name": self.name,
            "layers": [layer.as_dict() for layer in self.layers],
            "left_out": [{"name": name, "why": why} for name, why in self.left_out],
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "N × K", "|ΔW|", "|ΔW|/|W|", "σ₁", "rank", "effective", "stable")
        ]
        rows += [_row(layer) for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        ]
        changed = sum(layer.bias_change > 0 for layer in self.layers)
        if changed:
            lines.append(f"biases change in {changed} of these layers")
        lines += [f"left out: {name}: {why}" for name, why in self.left_out]
        return "\n".join([f"update of {self.name!r} in {len(self.layers)} layers", *lines])


def _row(layer: LayerSpectrum) -> tuple[str, ...]:
    ratio = "-" if layer.ratio is None else f"{layer.ratio:.3%}"
    return (
        layer.name or "(the model)",
        f"{layer.shape[0]} × {layer.shape[1]}",
        f"{layer.norm:.4g}",
        ratio,
        f"{layer.singular_values[0] if layer.rank else 0.0:.4g}",
        f"{layer.rank}",
        f"{layer.effective_rank:.2f}",
        f"{layer.stable_rank:.2f}",
    )


def layer_spectrum(name: str, kind: str, update: Update, base_norm: float | None) -> LayerSpectrum:
    """Look at one update.

    Args:
        name: the module's name.
        kind: what to call the adapter.
        update: its ΔW.
        base_norm: |W|, or None.

    Returns:
        The entry.

    Raises:
        ValueError: the update holds NaN or infinity.
    """
    values = update.singular_values()
    if not bool(values.isfinite().all()):
        raise ValueError(f"the update of {spelt(name)} holds NaN or infinity")
    return LayerSpectrum(
        name=name,
        kind=kind,
        shape=update.shape,
        norm=math.sqrt(math.fsum(values.square().tolist())),
        base_norm=base_norm,
        singular_values=tuple(value for value in values.tolist() if value > 0),
        bias_change=0.0 if update.bias is None else float(torch.linalg.vector_norm(update.bias)),
    )


@torch.no_grad()
def adapter_spectrum(model: nn.Module, name: str = "default") -> SpectrumReport:
    """Look at what an adapter in a model adds to each weight; changes nothing.

    Args:
        model: a model (or one host) with the adapter, active or not.
        name: which.

    Returns:
        Norms and singular values by layer. For LoRA no dense update is formed; for other kinds one
        layer's at a time is, and its singular values cost O(N K min(N, K)).

    Raises:
        ValueError: an unknown name, an adapter without any linear update (bottlenecks, soft
            prompts), one that holds NaN, or one that was merged with keep_base=False.
    """
    layers, left_out = [], []
    seen: set[int] = set()
    for site, host in adapted_modules(model):
        if name not in host.adapters or id(host) in seen:
            continue
        seen.add(id(host))
        if host.merged is not None and host.merged.module is None:
            raise ValueError(
                f"{spelt(site)} was merged with keep_base=False: its base is gone, so its update "
                "cannot be told from it; load the base model and the adapter again"
            )
        adapter = host.adapter(name)
        try:
            update = update_of(adapter, base := unwrap(host))
        except (TypeError, ValueError) as error:
            left_out.append((site, str(error)))
            continue
        base_norm = float(torch.linalg.vector_norm(dense_weight(base), dtype=torch.float64))
        layers.append(layer_spectrum(site, type(adapter).__name__, update, base_norm))
    _check(model, name, layers, left_out)
    return SpectrumReport(name, tuple(layers), tuple(left_out))


def _check(
    model: nn.Module,
    name: str,
    layers: Sequence[LayerSpectrum],
    left_out: Sequence[tuple[str, str]],
) -> None:
    if not layers and not left_out:
        raise ValueError(f"no adapter {name!r} in the model; {nearest(name, adapter_names(model))}")
    if not layers:
        raise ValueError(f"the adapter {name!r} changes no weight: {left_out[0][1]}")
