"""Figures of weights: how much each layer changed, and how a base's weights fill the 4-bit bins."""

import math
from collections.abc import Mapping
from typing import Any

from lora_core.report.drawing import SMALL, label, new_figure, on_layout, styled
from lora_core.report.histogram import WeightHistogram
from lora_core.report.palette import FAINT, GROUND, INK, SERIES
from lora_core.report.updates import NO_LAYER

__all__ = ["update_sizes", "weight_histogram"]

_WRITTEN = 8  # layers up to which each cell has its number on a wide screen
_STEPS = 7  # colours of the scale


def update_sizes(sizes: Mapping[str, Mapping[int, float]]) -> Any:
    """Draw the relative size of the update, ‖ΔW‖ / ‖W‖, by layer and projection.

    Args:
        sizes: projection -> layer -> ratio, as `relative_updates` finds it; pairs that are missing
            have no update.

    Returns:
        A matplotlib Figure: a heat map, layers from left to right, projections from top to bottom.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw.
    """
    layers = sorted({layer for own in sizes.values() for layer in own})
    if not layers:
        raise ValueError("no layer has an update to draw")
    with styled():
        from matplotlib.colors import BoundaryNorm
        from matplotlib.ticker import MaxNLocator

        height = 1.3 + 0.34 * len(sizes)
        figure = new_figure((7.0, height), (3.6, height))
        axes = figure.add_subplot(xlabel="layer")
        grid = [[sizes[kind].get(layer, math.nan) for layer in layers] for kind in sizes]
        known = [x for row in grid for x in row if math.isfinite(x)]
        edges = MaxNLocator(_STEPS).tick_values(0.0, max(known, default=0.0) or 1.0)
        norm = BoundaryNorm(edges, 256)
        mesh = axes.pcolormesh(grid, cmap="viridis", norm=norm, ec=GROUND, lw=1)
        places = [i + 0.5 for i in range(len(layers))]
        step = max(1, math.ceil(len(layers) / 12))
        axes.set_xticks(places[::step], ["–" if x == NO_LAYER else str(x) for x in layers[::step]])
        axes.set_yticks([i + 0.5 for i in range(len(sizes))], [label(kind) for kind in sizes])
        axes.tick_params(length=0, labelcolor=INK)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        bar = figure.colorbar(mesh, ax=axes, format=lambda x, _: f"{100 * x:.3g} %", pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        axes.set_title("‖ΔW‖ / ‖W‖")
        if len(layers) <= _WRITTEN:
            _write_cells(figure, axes, grid, mesh)
    return figure


def _write_cells(figure: Any, axes: Any, grid: list[list[float]], mesh: Any) -> None:
    """The number in each cell, dark on light and light on dark; not on a narrow screen."""
    written = []
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = mesh.cmap(mesh.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                colour = "#fdfdfd" if dark else "#000000"  # fixed: not the palette's
                place = {"ha": "center", "va": "center", "size": SMALL, "c": colour}
                written.append(axes.text(column + 0.5, row + 0.5, f"{100 * value:.2g} %", **place))

    def arrange(narrow: bool) -> None:
        for text in written:
            text.set_visible(not narrow)

    on_layout(figure, arrange)


def weight_histogram(found: WeightHistogram) -> Any:
    """Draw block-normalised weights over the bins of a 4-bit code, and each bin's share.

    Args:
        found: what `weight_bins` or `model_bins` counted.

    Returns:
        A matplotlib Figure. Above, the weights w / absmax, with the bins' edges and the levels that
        stand for them (left out where only codes are known); below, the share of the weights that
        each bin got, against 1/16, which a code of equal use would give.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with styled():
        fine = found.fine is not None
        figure = new_figure((7.0, 4.0 if fine else 2.6), (3.6, 4.4 if fine else 3.0))
        rows = figure.add_gridspec(2, 1, height_ratios=(3, 2)) if fine else None
        low = figure.add_subplot(rows[1] if rows is not None else 111)
        low.set(xlabel="w / absmax of its block", ylabel="share (%)", xlim=(-1.04, 1.04))
        low.set_xticks((-1.0, -0.5, 0.0, 0.5, 1.0))
        if rows is not None:
            _fine(figure.add_subplot(rows[0], sharex=low), found)
        edges = (-1.0, *found.edges, 1.0)
        for place, share in enumerate(found.shares):
            left, right = edges[place], edges[place + 1]
            style = {"color": SERIES[0], "ec": GROUND, "lw": 1}
            low.bar(left, 100 * share, right - left, align="edge", **style)
        low.axhline(100 / 16, c=SERIES[1], ls="--", lw=1.4)
        low.annotate(
            "1/16",
            (1.0, 100 / 16),
            (0, 3),
            textcoords="offset points",
            ha="right",
            c=SERIES[1],
            size=SMALL,
        )
        low.grid(visible=False, axis="x")
    return figure


def _fine(axes: Any, found: WeightHistogram) -> None:
    assert found.fine is not None
    cells = len(found.fine)
    edges = [-1 + 2 * i / cells for i in range(cells + 1)]
    total = sum(found.fine) or 1
    density = [count / total * cells / 2 for count in found.fine]
    axes.stairs(density, edges, fill=True, color=SERIES[0], alpha=0.35, lw=0)
    axes.stairs(density, edges, color=SERIES[0], lw=1)
    for edge in found.edges:
        axes.axvline(edge, c=FAINT, lw=0.6)
    axes.plot(found.levels, [0] * len(found.levels), "^", c=INK, ms=6, clip_on=False, zorder=4)
    axes.set(ylabel="density", yticks=[])
    axes.tick_params(labelbottom=False, bottom=False)
    axes.grid(visible=False)
    axes.set_title("lines: edges of the bins · triangles: levels", weight="normal", size=SMALL)
