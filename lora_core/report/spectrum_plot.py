"""The picture of `lora-core inspect --adapter`: spectra, and the size of the update by layer."""

from pathlib import Path
from typing import Any

from lora_core.adapters import LayerSpectrum, SpectrumReport
from lora_core.report.drawing import (
    MISSING,
    check_format,
    new_figure,
    no_matplotlib,
    save,
    styled,
)
from lora_core.report.palette import SERIES, SHAPES
from lora_core.report.updates import NO_LAYER, depth

__all__ = ["plot_spectrum"]


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
    if no_matplotlib() is not None:
        return f"no {path.name}: {MISSING}"
    with styled():
        figure = new_figure((11.0, 4.5))
        check_format(figure, path, "--plot ")
        kinds = list(dict.fromkeys(_kind(layer) for layer in report.layers))
        _spectra(figure.add_subplot(1, 2, 1), report, kinds)
        _sizes(figure.add_subplot(1, 2, 2), report, kinds)
    save(figure, path)
    return None


def _spectra(axes: Any, report: SpectrumReport, kinds: list[str]) -> None:
    """A line a layer, a colour a kind of module."""
    seen: set[str] = set()
    for layer in report.layers:
        kind = _kind(layer)
        name = None if kind in seen else kind
        seen.add(kind)
        values = layer.singular_values
        colour, shape = _look(kinds, kind)
        places = range(1, len(values) + 1)
        axes.plot(places, values, shape + "-", lw=1, ms=3, c=colour, label=name)
    axes.set(title="singular values of ΔW, a line a layer", xlabel="index", ylabel="σ")
    if any(layer.rank for layer in report.layers):
        axes.set_yscale("log")
    axes.legend()


def _sizes(axes: Any, report: SpectrumReport, kinds: list[str]) -> None:
    """|ΔW| / |W| by layer, or |ΔW| where the base was not at hand."""
    relative = all(layer.ratio is not None for layer in report.layers)
    for kind in kinds:
        own = [(i, layer) for i, layer in enumerate(report.layers) if _kind(layer) == kind]
        places = [_depth(layer, i) for i, layer in own]
        sizes = [(layer.ratio or 0.0) if relative else layer.norm for _, layer in own]
        colour, shape = _look(kinds, kind)
        axes.plot(places, sizes, shape + "-", ms=4, lw=1, c=colour, label=kind)
    title = "|ΔW| / |W|" if relative else "|ΔW|"
    axes.set(title=f"{title} by layer", xlabel="layer", ylabel=title)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)


def _look(kinds: list[str], kind: str) -> tuple[str, str]:
    place = kinds.index(kind)
    return SERIES[place % len(SERIES)], SHAPES[place % len(SHAPES)]


def _kind(layer: LayerSpectrum) -> str:
    """What layers of different depths have in common: the last part of the name."""
    return layer.name.rsplit(".", 1)[-1] or "(the model)"


def _depth(layer: LayerSpectrum, index: int) -> int:
    """The layer's number in the name, or its place in the report."""
    number = depth(layer.name)
    return index if number == NO_LAYER else number
