"""The picture of `lora-core inspect --adapter`: spectra, and the size of the update by layer."""

import re
from pathlib import Path
from typing import Any

from lora_core.adapters import LayerSpectrum, SpectrumReport
from lora_core.files import atomic_write


def plot_spectrum(report: SpectrumReport, path: Path) -> str | None:
    """Draw an adapter's singular values by layer, and |ΔW| / |W| by depth.

    Args:
        report: what `adapter_spectrum` or `read_spectrum` found.
        path: where the picture goes, its suffix naming the format.

    Returns:
        None, or the reason why there is no picture.

    Raises:
        ValueError: a suffix that names no format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path.name}: matplotlib is not installed (pip install 'lora-core[plots]')"
    figure = Figure(figsize=(11, 4.5))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.92, wspace=0.22)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise ValueError(f"--plot {path} names no format; known: {', '.join(sorted(formats))}")
    kinds = list(dict.fromkeys(_kind(layer) for layer in report.layers))
    colours = {kind: f"C{i % 10}" for i, kind in enumerate(kinds)}
    _spectra(figure.add_subplot(1, 2, 1), report, colours)
    _sizes(figure.add_subplot(1, 2, 2), report, colours)
    atomic_write(path, lambda aside: figure.savefig(aside, format=path.suffix[1:], dpi=120))
    return None


def _spectra(axes: Any, report: SpectrumReport, colours: dict[str, str]) -> None:
    """A line a layer, a colour a kind of module."""
    seen: set[str] = set()
    for layer in report.layers:
        kind = _kind(layer)
        label = None if kind in seen else kind
        seen.add(kind)
        values = layer.singular_values
        axes.plot(range(1, len(values) + 1), values, ".-", lw=1, c=colours[kind], label=label)
    axes.set(title="singular values of ΔW, a line a layer", xlabel="index", ylabel="σ")
    if any(layer.rank for layer in report.layers):
        axes.set_yscale("log")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _sizes(axes: Any, report: SpectrumReport, colours: dict[str, str]) -> None:
    """|ΔW| / |W| by layer, or |ΔW| where the base was not at hand."""
    relative = all(layer.ratio is not None for layer in report.layers)
    for kind, colour in colours.items():
        own = [(i, layer) for i, layer in enumerate(report.layers) if _kind(layer) == kind]
        places = [_depth(layer, i) for i, layer in own]
        sizes = [(layer.ratio or 0.0) if relative else layer.norm for _, layer in own]
        axes.plot(places, sizes, "o-", ms=3, lw=1, c=colour, label=kind)
    title = "|ΔW| / |W|" if relative else "|ΔW|"
    axes.set(title=f"{title} by layer", xlabel="layer", ylabel=title)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def _kind(layer: LayerSpectrum) -> str:
    """What layers of different depths have in common: the last part of the name."""
    return layer.name.rsplit(".", 1)[-1] or "(the model)"


def _depth(layer: LayerSpectrum, index: int) -> int:
    """The layer's number in the name, or its place in the report."""
    number = re.search(r"\.(\d+)\.", layer.name)
    return int(number[1]) if number else index
