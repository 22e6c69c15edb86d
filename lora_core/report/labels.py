"""Names beside points, placed so that they do not cover each other.

Each name may stand at a number of places around its point, nearer ones first. Names are placed in
turn, crowded points first, each where it covers the least of what is there already: names, points,
interval bars, the border of the panel. A name that had to move away gets a thin line to its point.

Greedy and good enough for a dozen points; the exact problem is NP-hard. Ref: Christensen, Marks and
Shieber 1995, "An empirical study of algorithms for point-feature label placement", ACM TOG 14(3).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lora_core.report.drawing import SMALL, on_layout
from lora_core.report.palette import FAINT

__all__ = ["place_labels"]

Box = tuple[float, float, float, float]


class Named(NamedTuple):
    """A point that wants a name."""

    name: str
    x: float
    """in data, as all of these"""
    y: float
    across: tuple[float, float]
    """ends of its horizontal interval bar"""
    upright: tuple[float, float]
    """ends of its vertical one"""
    colour: str
    """of the name"""


_RADIUS = 6.0  # of a point, in points of length
# where a name may stand: direction from the point
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_STEPS = (0.0, 8.0, 16.0, 26.0, 38.0, 52.0, 70.0)
_HARD, _SOFT = 10.0, 3.0  # what covering a pixel costs: of a name or point, of an interval bar


def place_labels(figure: Any, axes: Any, points: Sequence[Named]) -> None:
    """Write names beside points, anew whenever the figure is drawn in another shape.

    Args:
        figure: of `new_figure`.
        axes: the panel.
        points: what to name.
    """
    held: list[Any] = []

    def arrange(narrow: bool) -> None:
        for artist in held:
            artist.remove()
        held.clear()
        figure.draw_without_rendering()  # sizes are known after it
        held.extend(_write(figure, axes, points))

    on_layout(figure, arrange)


def _write(figure: Any, axes: Any, points: Sequence[Named]) -> Iterator[Any]:
    """Annotations, each at the best place left."""
    unit = figure.dpi / 72  # pixels in a point of length
    border = axes.get_window_extent()
    at = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [((x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit), _HARD) for x, y in at]
    for point in points:
        ends = [(x, point.y) for x in point.across] + [(point.x, y) for y in point.upright]
        left, right, low, high = axes.transData.transform(ends)
        taken.append(((left[0], left[1] - unit, right[0], left[1] + unit), _SOFT))
        taken.append(((low[0] - unit, low[1], low[0] + unit, high[1]), _SOFT))
    for place in sorted(range(len(points)), key=lambda i: -_crowd(at, i)):
        name, x, y, *_ = points[place]
        width, height = _measure(figure, name)
        _, box, distance = min(
            (_cost(box, taken, border.extents, step, unit), box, step)
            for box, step in _candidates(at[place], width, height, unit)
        )
        taken.append((box, _HARD))
        line = {"arrowstyle": "-", "color": FAINT, "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        yield axes.annotate(
            name,
            (x, y),
            ((box[0] - at[place][0]) / unit, (box[1] - at[place][1]) / unit),
            textcoords="offset points",
            size=SMALL,
            c=points[place].colour,
            ha="left",
            va="bottom",
            arrowprops=line if distance > 8 else None,
            annotation_clip=False,
        )


def _measure(figure: Any, name: str) -> tuple[float, float]:
    """Width and height of a name in pixels."""
    probe = figure.text(0, 0, name, size=SMALL)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width, extent.height


def _candidates(
    at: Sequence[float], width: float, height: float, unit: float
) -> Iterator[tuple[Box, float]]:
    """Boxes around a point, and how far each was moved away."""
    for step in _STEPS:
        reach = (_RADIUS + step) * unit
        for right, up in _SIDES:
            left = at[0] + right * reach - width * (1 - right) / 2
            bottom = at[1] + up * reach - height * (1 - up) / 2
            yield (left, bottom, left + width, bottom + height), step


def _cost(
    box: Box, taken: Sequence[tuple[Box, float]], border: Sequence[float], step: float, unit: float
) -> float:
    """What a place costs: area covered, area outside of the panel, distance."""
    pad = 1.5 * unit
    grown = (box[0] - pad, box[1] - pad / 2, box[2] + pad, box[3] + pad / 2)
    covered = sum(cost * _overlap(grown, other) for other, cost in taken)
    area = (box[2] - box[0]) * (box[3] - box[1])
    inside = _overlap(box, (border[0], border[1], border[2], border[3]))
    return covered + 30 * (area - inside) + 3 * step * unit * unit


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _crowd(at: Sequence[Sequence[float]], place: int) -> float:
    """How near the other points are."""
    x, y = at[place]
    return sum(1 / (1 + (x - u) ** 2 + (y - v) ** 2) for i, (u, v) in enumerate(at) if i != place)
