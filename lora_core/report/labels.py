"""Names beside points, placed so that they do not cover each other.

Each name may stand at a number of places around its point, nearer ones cheaper. Names are placed in
turn, crowded points first, each where it costs least: by the area it covers of names, points and
interval bars, by what sticks out of the panel, by its distance, and by the names that its line to
the point would cross. Two more rounds let each name move again now that all others stand.

Coordinate descent, good enough for a dozen points; the exact problem is NP-hard. Ref: Christensen,
Marks and Shieber 1995, "An empirical study of algorithms for point-feature label placement", ACM
TOG 14(3).

It needs NumPy, as matplotlib does and the library does not: whoever draws imports it then.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_core.report.drawing import SMALL, on_layout
from lora_core.report.palette import FAINT

__all__ = ["place_labels"]

Numbers = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
Spot = tuple[float, float]


class Place(NamedTuple):
    """Where a name may stand."""

    box: Box
    """left, bottom, right, top in pixels"""
    step: float
    """how much further away than need be, in points of length"""


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
_SIDES = (
    *((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)),
    *((0.5, 1), (0.5, -1), (-0.5, 1), (-0.5, -1)),
)
_STEPS = (0.0, 8.0, 16.0, 26.0, 38.0, 52.0, 70.0)  # how much further away, in points of length
_LINE = 8.0  # from this distance on there is a line to the point
_HARD, _SOFT = 10.0, 3.0  # what covering a pixel costs: of a name or point, of an interval bar
_CROSSED = 400.0  # what it costs that a line crosses a name
_ROUNDS = 3
_WAY = np.linspace(0, 1, 16)[:, None]  # where a line is looked at


def place_labels(figure: Any, panels: Sequence[tuple[Any, Sequence[Named]]]) -> None:
    """Write names beside points, anew whenever the figure is drawn in another shape.

    Args:
        figure: of `new_figure`.
        panels: each with the points to name in it.
    """
    held: list[Any] = []

    def arrange(narrow: bool) -> None:
        for artist in held:
            artist.remove()
        held.clear()
        figure.draw_without_rendering()  # where all is, is known after it
        for axes, points in panels:
            held.extend(_write(figure, axes, points))
        for artist in held:
            artist.set_in_layout(False)  # names fit the panels, not the panels the names

    on_layout(figure, arrange)


def _write(figure: Any, axes: Any, points: Sequence[Named]) -> Iterator[Any]:
    """Annotations, each at the best place found."""
    unit = figure.dpi / 72  # pixels in a point of length
    at = [tuple(axes.transData.transform((p.x, p.y))) for p in points]
    panel = tuple(axes.get_window_extent().extents)
    sizes = [_measure(figure, point.name) for point in points]
    places = _places(at, sizes, _fixed(axes, points, at, unit), panel, unit)
    for point, (x, y), place in zip(points, at, places, strict=True):
        line = {"arrowstyle": "-", "color": FAINT, "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        yield axes.annotate(
            point.name,
            (point.x, point.y),
            ((place.box[0] - x) / unit, (place.box[1] - y) / unit),
            textcoords="offset points",
            size=SMALL,
            c=point.colour,
            ha="left",
            va="bottom",
            arrowprops=line if place.step > _LINE else None,
            annotation_clip=False,
        )


def _fixed(
    axes: Any, points: Sequence[Named], at: Sequence[Spot], unit: float
) -> list[tuple[Box, float]]:
    """What is there before any name: points and interval bars, and the cost of covering them."""
    reach = 5 * unit
    taken = [((x - reach, y - reach, x + reach, y + reach), _HARD) for x, y in at]
    for point in points:
        ends = [(x, point.y) for x in point.across] + [(point.x, y) for y in point.upright]
        left, right, low, high = axes.transData.transform(ends)
        taken.append(((left[0], left[1] - unit, right[0], left[1] + unit), _SOFT))
        taken.append(((low[0] - unit, low[1], low[0] + unit, high[1]), _SOFT))
    return taken


def _places(
    at: Sequence[Spot],
    sizes: Sequence[Spot],
    fixed: Sequence[tuple[Box, float]],
    panel: Box,
    unit: float,
) -> list[Place]:
    """Where each name stands best, all others standing where they do."""
    options = [_candidates(spot, *size, unit) for spot, size in zip(at, sizes, strict=True)]
    alone = [_alone(own, fixed, panel, unit) for own in options]
    chosen: dict[int, int] = {}
    order = sorted(range(len(at)), key=lambda i: -_crowd(at, i))
    for _ in range(_ROUNDS):
        for i in order:
            names = [options[j][k].box for j, k in chosen.items() if j != i]
            costs = alone[i] + _beside(options[i], at[i], names, unit)
            chosen[i] = int(costs.argmin())
    return [options[i][chosen[i]] for i in range(len(at))]


def _measure(figure: Any, name: str) -> tuple[float, float]:
    """Width and height of a name in pixels."""
    probe = figure.text(0, 0, name, size=SMALL)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width, extent.height


def _candidates(at: Spot, width: float, height: float, unit: float) -> list[Place]:
    """Boxes around a point."""
    found = []
    for step in _STEPS:
        reach = (_RADIUS + step) * unit
        for right, up in _SIDES:
            left = at[0] + right * reach - width * (1 - right) / 2
            bottom = at[1] + up * reach - height * (1 - up) / 2
            found.append(Place((left, bottom, left + width, bottom + height), step))
    return found


def _alone(
    places: Sequence[Place], fixed: Sequence[tuple[Box, float]], panel: Box, unit: float
) -> Numbers:
    """What places cost whatever the other names do: (places,), in covered pixels or their like."""
    boxes = np.array([place.box for place in places])
    covered = _overlaps(boxes, [box for box, _ in fixed], unit) @ [cost for _, cost in fixed]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    outside = areas - _overlaps(boxes, [panel], 0.0)[:, 0]
    return covered + 30 * outside + 3 * unit**2 * np.array([place.step for place in places])


def _beside(places: Sequence[Place], at: Spot, names: Sequence[Box], unit: float) -> Numbers:
    """What places cost beside the other names: (places,)."""
    if not names:
        return np.zeros(len(places))
    boxes = np.array([place.box for place in places])
    crossed = [_crossed(p.box, at, names) if p.step > _LINE else 0 for p in places]
    return _HARD * _overlaps(boxes, names, unit).sum(1) + _CROSSED * np.array(crossed)


def _overlaps(boxes: Numbers, others: Sequence[Box], unit: float) -> Numbers:
    """Common areas (boxes, others), the boxes being grown by a margin."""
    margin = unit * np.array([-1.5, -0.75, 1.5, 0.75])
    mine, theirs = (
        (boxes + margin)[:, None],
        np.array(others)[None],
    )  # (boxes, 1, 4), (1, others, 4)
    sides = np.minimum(mine[..., 2:], theirs[..., 2:]) - np.maximum(mine[..., :2], theirs[..., :2])
    return sides.clip(min=0).prod(-1)


def _crossed(box: Box, at: Spot, names: Sequence[Box]) -> int:
    """How many names the line from a name's middle to its point runs through."""
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    way = np.array(at) + _WAY * (np.array(middle) - np.array(at))  # (16, 2)
    low, high = np.split(np.array(names)[:, None], 2, axis=-1)  # (names, 1, 2) each
    return int(((way > low) & (way < high)).all(-1).any(-1).sum())


def _crowd(at: Sequence[Spot], place: int) -> float:
    """How near the other points are."""
    x, y = at[place]
    return sum(1 / (1 + (x - u) ** 2 + (y - v) ** 2) for i, (u, v) in enumerate(at) if i != place)
