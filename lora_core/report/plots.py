"""Figures of runs: losses by step, methods compared, settings swept.

Each takes plain numbers and returns a matplotlib figure; `save` writes it, `Page.figure` puts it
into a report. Names stand at the lines and points themselves, where there is room, since a legend
sends the eye to and fro and relies on colour. An interval is always drawn where there is one.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.files import atomic_write
from lora_core.report.cells import EstimateLike, number, value_and_interval
from lora_core.report.drawing import (
    MISSING,
    SMALL,
    label,
    legend_above,
    new_figure,
    on_layout,
    save,
    styled,
)
from lora_core.report.palette import FAINT, GROUND, INK, SERIES, SHAPES

if TYPE_CHECKING:
    from lora_core.report.labels import Named

__all__ = [
    "Point",
    "bars",
    "comparison",
    "loss_curves",
    "plot_loss",
    "save",
    "sweep",
]

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """One method in a comparison."""

    name: str
    """what stands beside the point"""
    share: float
    """trainable parameters by all parameters, in [0, 1]; 0 for what trains none"""
    quality: EstimateLike | float
    """the figure that the methods are judged by"""
    forgetting: EstimateLike | float | None = None
    """what was lost on general text: bits per byte, after less before; None: not measured"""


def plot_loss(history: History, path: Path) -> str | None:
    """Draw loss and evaluation loss by step: what a run leaves beside its metrics.

    Plainer than `loss_curves`, since every run waits for it.

    Args:
        history: the records of a run.
        path: where the picture goes, its suffix naming the format.

    Returns:
        None, or the reason why there is no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path.name}: {MISSING}"
    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.13, top=0.96)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per graded token)")
    axes.plot([r["step"] for r in history], [r["loss"] for r in history], lw=1, label="train")
    evaluated = [r for r in history if "eval_loss" in r]
    if evaluated:
        steps = [r["step"] for r in evaluated]
        axes.plot(steps, [r["eval_loss"] for r in evaluated], "o-", label="evaluation")
    axes.legend()
    axes.grid(alpha=0.3)
    atomic_write(path, lambda aside: figure.savefig(aside, format=path.suffix[1:], dpi=120))
    return None


def loss_curves(histories: Mapping[str, History]) -> Any:
    """Draw the losses of one run or several by step.

    Args:
        histories: name of a run -> its records, with step, loss and, where it was evaluated,
            eval_loss. Training is a thin line, evaluation a thick one with dots.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no record at all.
    """
    if not any(histories.values()):
        raise ValueError("no run has a record: there is no loss to draw")
    with styled():
        figure = new_figure()
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per graded token)")
        several = len(histories) > 1
        for place, (name, history) in enumerate(histories.items()):
            _run(axes, label(name) if several else "", history, _colour(place))
        legend_above(figure, axes)
    return figure


def _run(axes: Any, name: str, history: History, colour: str) -> None:
    evaluated = [r for r in history if "eval_loss" in r]
    pale = {"alpha": 0.55} if evaluated else {}
    steps, losses = [r["step"] for r in history], [r["loss"] for r in history]
    only = {} if evaluated and name else {"label": name or "training"}
    axes.plot(steps, losses, lw=1, c=colour, **pale, **only)
    if evaluated:
        steps, losses = [r["step"] for r in evaluated], [r["eval_loss"] for r in evaluated]
        axes.plot(steps, losses, "o-", lw=2, ms=4, c=colour, label=name or "evaluation")


def comparison(
    points: Sequence[Point],
    *,
    quality: str = "quality",
    forgetting: str = "forgetting (bits per byte)",
) -> Any:
    """Draw quality, with its interval, against trainable share and against forgetting.

    Args:
        points: the methods, each with a name of its own.
        quality: name and unit of the figure.
        forgetting: name and unit of the loss on general text.

    Returns:
        A matplotlib Figure: two panels, the second left out where nothing was measured.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no point.
    """
    if not points:
        raise ValueError("no point to compare")
    measured = [p for p in points if p.forgetting is not None]
    with styled():
        from lora_core.report.labels import place_labels  # needs NumPy

        panels = 2 if measured else 1
        figure = new_figure((7.0, 4.0 + 0.1 * len(points)), (3.6, 4.2 * panels))
        first = figure.add_subplot(1, panels, 1, xlabel="trainable share", ylabel=label(quality))
        named = [(first, _by_share(first, points))]
        if measured:
            second = figure.add_subplot(1, 2, 2, xlabel=label(forgetting), ylabel=label(quality))
            at = [_parts(p.forgetting) for p in measured]
            named.append((second, _cloud(second, measured, at, points)))
            _side_by_side(figure, first, second)
        place_labels(figure, named)
    return figure


def _side_by_side(figure: Any, first: Any, second: Any) -> None:
    """Two panels beside one another on a wide screen, below one another on a narrow one."""

    def arrange(narrow: bool) -> None:
        from matplotlib.gridspec import GridSpec

        grid = GridSpec(2, 1, figure) if narrow else GridSpec(1, 2, figure)
        first.set_subplotspec(grid[0])
        second.set_subplotspec(grid[1])

    on_layout(figure, arrange, first=True)


def _by_share(axes: Any, points: Sequence[Point]) -> list["Named"]:
    """The panel over a logarithmic axis; what trains nothing stands at its left end, as 0."""
    shares = [p.share for p in points if p.share > 0]
    lowest = min(shares, default=1e-3)
    nothing = lowest / 6
    at = [(p.share or nothing,) * 3 for p in points]
    axes.set_xscale("log")
    names = _cloud(axes, points, at, points)
    low, high = (nothing if len(shares) < len(points) else lowest), max(shares, default=1e-2)
    axes.set_xlim(low / 1.8, high * 2.2)
    ticks = [10.0**e for e in range(-6, 1) if lowest / 2 <= 10.0**e <= high * 2.2]
    shown = [f"{100 * t:.4g} %" for t in ticks]
    if len(shares) < len(points):
        ticks, shown = [nothing, *ticks], ["none", *shown]
    axes.set_xticks(ticks, shown)
    axes.minorticks_off()
    return names


def _cloud(
    axes: Any,
    points: Sequence[Point],
    places: Sequence[tuple[float, float, float]],
    order: Sequence[Point],
) -> list["Named"]:
    """Points with the intervals of both directions; returns what their names need."""
    from lora_core.report.labels import Named

    held = []
    for point, (x, left, right) in zip(points, places, strict=True):
        y, low, high = _parts(point.quality)
        style = order.index(point)
        colour, shape = _colour(style), SHAPES[style % len(SHAPES)]
        axes.plot([x, x], [low, high], "-", lw=1.2, c=colour, alpha=0.7, zorder=2)
        axes.plot([left, right], [y, y], "-", lw=1.2, c=colour, alpha=0.7, zorder=2)
        axes.plot([x], [y], shape, ms=7, c=colour, mec=GROUND, mew=0.8, zorder=3)
        held.append(Named(label(point.name), x, y, (left, right), (low, high), colour))
    axes.margins(x=0.12, y=0.1)
    return held


def bars(
    values: Mapping[str, EstimateLike | float],
    *,
    unit: str = "",
    reference: tuple[str, float] | None = None,
) -> Any:
    """Draw figures as horizontal bars with their intervals, names at the left.

    Args:
        values: name -> figure, from top to bottom.
        unit: what the axis shows.
        reference: name and height of a line to compare with.

    Returns:
        A matplotlib Figure, as high as there are bars.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw.
    """
    if not values:
        raise ValueError("no figure to draw as a bar")
    with styled():
        height = 1.0 + 0.36 * len(values)
        figure = new_figure((7.0, height), (3.6, height))
        axes = figure.add_subplot(xlabel=label(unit))
        axes.grid(visible=False, axis="y")
        for place, value in enumerate(values.values()):
            _bar(axes, place, value)
        names = [label(name) for name in values]
        on_layout(figure, lambda narrow: _name_bars(axes, names, 18 if narrow else 36))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.axvline(0, c=FAINT, lw=0.8)
        if reference is not None:
            name, at = reference
            axes.axvline(at, c=INK, lw=1, ls="--")
            axes.set_title(f"dashed: {label(name)}, {number(at)}", weight="normal", size=SMALL)
    return figure


def _name_bars(axes: Any, names: Sequence[str], width: int) -> None:
    """Names at the left, broken into lines where they would take the bars' room."""
    axes.set_yticks(range(len(names)), [textwrap.fill(name, width) for name in names])


def _bar(axes: Any, place: int, value: EstimateLike | float) -> None:
    middle, low, high = _parts(value)
    axes.barh(place, middle, height=0.62, color=SERIES[0])
    if high > low:
        axes.plot([low, high], [place, place], c=INK, lw=1.2)
        for end in (low, high):
            axes.plot([end, end], [place - 0.13, place + 0.13], c=INK, lw=1.2)
    text = value_and_interval(value)[0] if isinstance(value, EstimateLike) else number(value)
    end, away = (max(middle, high), 1) if middle >= 0 else (min(middle, low), -1)
    axes.annotate(
        text,
        (end, place),
        (5 * away, 0),
        textcoords="offset points",
        va="center",
        ha="left" if away > 0 else "right",
        size=SMALL,
        bbox={"fc": GROUND, "ec": "none", "pad": 1},
    )


def sweep(
    series: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    x: str,
    y: str,
    log: bool = True,
) -> Any:
    """Draw a figure against a setting, with the spread over seeds.

    Args:
        series: name -> setting -> the figure of each seed. A line goes through the means, a band
            from least to greatest, a dot is a seed.
        x: name of the setting.
        y: name of the figure.
        log: whether the setting is spaced by ratios.

    Returns:
        A matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw, or a setting without a figure.
    """
    if not any(series.values()):
        raise ValueError("no setting of the sweep has a figure")
    with styled():
        figure = new_figure()
        axes = figure.add_subplot(xlabel=label(x), ylabel=label(y))
        for place, (name, runs) in enumerate(series.items()):
            _line(axes, label(name), runs, place)
        settings = sorted({setting for runs in series.values() for setting in runs})
        if log and settings[0] > 0:
            axes.set_xscale("log")
        axes.set_xticks(settings, [number(s) for s in settings])
        axes.minorticks_off()
        if len(series) > 1:
            legend_above(figure, axes)
    return figure


def _line(axes: Any, name: str, runs: Mapping[float, Sequence[float]], place: int) -> None:
    settings = sorted(runs)
    empty = [s for s in settings if not runs[s]]
    if empty:
        raise ValueError(f"the sweep has no figure at {number(empty[0])} of {name.strip()}")
    colour, shape = _colour(place), SHAPES[place % len(SHAPES)]
    low, high = [min(runs[s]) for s in settings], [max(runs[s]) for s in settings]
    middle = [sum(runs[s]) / len(runs[s]) for s in settings]
    axes.fill_between(settings, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(settings, middle, shape + "-", ms=6, c=colour, label=name)
    for setting in settings:
        seeds = runs[setting]
        axes.plot([setting] * len(seeds), seeds, "o", ms=3, c=colour, alpha=0.6)


def _parts(value: EstimateLike | float | None) -> tuple[float, float, float]:
    """Value and ends of the interval; without one, the value three times."""
    if isinstance(value, EstimateLike):
        known = value.low == value.low and value.high == value.high
        return (value.value, value.low, value.high) if known else (value.value,) * 3
    return (float("nan") if value is None else float(value),) * 3


def _colour(place: int) -> str:
    return SERIES[place % len(SERIES)]
