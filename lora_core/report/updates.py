"""How much each layer changed: the relative size of an adapter's update, laid out as a grid.

The sizes are those of `adapter_spectrum` (adapters/spectrum.py). Here they find their place: the
first number in a module's name is its layer, and what layers have in common is its projection. The
last part of the name says which, unless two modules of a layer end alike (a decoder's two
attentions); then it is all that stands after the number. Experts of a layer are taken together, as
one matrix of all their weights.
"""

import math
from collections.abc import Iterable

from torch import nn

from lora_core.adapters import LayerSpectrum, SpectrumReport, adapter_spectrum

__all__ = ["NO_LAYER", "by_layer", "relative_updates"]

NO_LAYER = -1
"""the layer of modules without a number in their name, an embedding for one"""


def relative_updates(model: nn.Module, name: str = "default") -> dict[str, dict[int, float]]:
    """Relative size of an adapter's update, |ΔW| / |W|, by projection and layer.

    Args:
        model: a model with the adapter, active or not; it is not changed.
        name: which.

    Returns:
        projection -> layer -> ratio, as `update_sizes` draws it.

    Raises:
        ValueError: no such adapter, or one that changes no weight (soft prompts, bottlenecks).
    """
    return by_layer(adapter_spectrum(model, name))


def by_layer(report: SpectrumReport) -> dict[str, dict[int, float]]:
    """Lay the layers of a report out by projection and layer.

    Args:
        report: of `adapter_spectrum`, or of `read_spectrum` with the base at hand.

    Returns:
        projection -> layer -> ratio; layers whose base is not known are left out.
    """
    tails = {layer.name: _tail(layer.name) for layer in report.layers}
    short = _distinct(set(tails.values()))
    cells: dict[str, dict[int, list[LayerSpectrum]]] = {}
    for layer in report.layers:
        if layer.ratio is not None:
            row = cells.setdefault(short[tails[layer.name]], {})
            row.setdefault(depth(layer.name), []).append(layer)
    return {
        kind: {at: _together(layers) for at, layers in sorted(row.items())}
        for kind, row in cells.items()
    }


def depth(name: str) -> int:
    """The layer's number in a module's name, or `NO_LAYER`."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), NO_LAYER)


def _tail(name: str) -> str:
    """What stands after the layer's number, further numbers (experts) left out."""
    parts = name.split(".")
    start = next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(part for part in parts[start:] if not part.isdecimal()) or name


def _distinct(tails: Iterable[str]) -> dict[str, str]:
    """The last part of each name, or the whole of it where two end alike."""
    known = list(tails)
    ends = [tail.rsplit(".", 1)[-1] for tail in known]
    return {
        tail: end if ends.count(end) == 1 else tail for tail, end in zip(known, ends, strict=True)
    }


def _together(layers: list[LayerSpectrum]) -> float:
    """|ΔW| / |W| of several weights as if they were one."""
    if len(layers) == 1:
        return layers[0].ratio or 0.0
    below = math.hypot(*(layer.base_norm or 0.0 for layer in layers))
    above = math.hypot(*(layer.norm for layer in layers))
    return above / below if below else math.inf if above else 0.0
