"""Figures: drawn once each, since drawing is slow."""

import ast
import builtins
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_core.report
from lora_core.report import (
    Page,
    Point,
    bars,
    comparison,
    loss_curves,
    no_matplotlib,
    plot_loss,
    png,
    save,
    sweep,
    update_sizes,
    weight_bins,
    weight_histogram,
)
from lora_core.report.drawing import label, svg

pytest.importorskip("matplotlib")
Make = Callable[..., Any]
HISTORY = [{"step": i, "loss": 3 / i, **({"eval_loss": 2 / i} if i % 2 else {})} for i in (1, 2, 3)]


def texts(parse: Make, figure: Any, narrow: bool = False) -> list[str]:
    return [p.strip() for _, p in parse(svg(figure, "x", narrow=narrow)).pieces if p.strip()]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("absent")
def test_without_matplotlib_one_line_says_so(tmp_path: Path) -> None:
    why = "matplotlib is not installed (pip install 'lora-core[plots]')"
    assert no_matplotlib() == why
    assert plot_loss(HISTORY, tmp_path / "loss.png") == f"no loss.png: {why}"
    for draw in (
        lambda: loss_curves({"a": HISTORY}),
        lambda: comparison([Point("a", 0.1, 1.0)]),
        lambda: bars({"a": 1.0}),
        lambda: sweep({"a": {1: [1.0]}}, x="r", y="q"),
        lambda: update_sizes({"q": {0: 0.1}}),
        lambda: weight_histogram(weight_bins(torch.randn(64))),
    ):
        with pytest.raises(ImportError) as caught:
            draw()
        assert str(caught.value) == why


def test_matplotlib_is_imported_only_where_something_is_drawn() -> None:
    for path in Path(lora_core.report.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [getattr(node, "module", None)] + [a.name for a in getattr(node, "names", [])]
            assert not any(str(name).startswith("matplotlib") for name in names), path.name


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="no run has a record"):
        loss_curves({"a": []})
    with pytest.raises(ValueError, match="no point to compare"):
        comparison([])
    with pytest.raises(ValueError, match="no figure to draw as a bar"):
        bars({})
    with pytest.raises(ValueError, match="no setting of the sweep has a figure"):
        sweep({"a": {}}, x="r", y="q")
    with pytest.raises(ValueError, match="the sweep has no figure at 4 of LoRA"):
        sweep({"LoRA": {2: [1.0], 4: []}}, x="r", y="q")
    with pytest.raises(ValueError, match="no layer has an update to draw"):
        update_sizes({"q": {}})


def test_losses_of_one_run_and_of_several(parse: Make, tmp_path: Path) -> None:
    one = loss_curves({"only": HISTORY})
    assert {"training", "evaluation", "step"} <= set(texts(parse, one))
    (axes,) = one.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[3, 1.5, 1], [2, 2 / 3]]
    several = loss_curves({"_a $x$": HISTORY, "b": HISTORY})
    assert {"_a $x$", "b"} <= set(texts(parse, several, narrow=True))
    assert png(one).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"x.docx names no format; known: .*png"):
        save(one, tmp_path / "x.docx")


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    pair = [bars({"a": 1.0}) for _ in range(2)]
    assert svg(pair[0], "x", narrow=False) == svg(pair[1], "x", narrow=False)
    assert save(pair[0], tmp_path / "a.svg").read_text().startswith("<?xml")


def test_a_figure_in_a_page(parse: Make, outside: Make, figure: Make, hostile: str) -> None:
    page = Page("t")
    page.figure(bars({hostile: figure(0.5, 0.4, 0.6), "b": 0.2}, unit=hostile), alt=hostile)
    parsed = parse(page.html())
    assert outside(parsed) == []
    assert [attrs["class"] for attrs in parsed.named("svg")] == ["narrow", "wide"]
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "#0072b2" not in "".join(str(attrs.get("style")) for _, attrs in parsed.tags)
    assert len(page.html()) < 40_000


def test_bars_have_their_intervals(parse: Make, figure: Make) -> None:
    values = {"a": figure(0.5, 0.41, 0.62), "b": -0.25, "none": figure(math.nan)}
    drawn = bars(values, reference=("chance", 0.25))
    (axes,) = drawn.axes
    assert [bar.get_width() for bar in axes.patches][:2] == [0.5, -0.25]
    assert any(list(line.get_xdata()) == [0.41, 0.62] for line in axes.lines)
    assert {"0.50", "-0.25", "dashed: chance, 0.25"} <= set(texts(parse, drawn))


def test_methods_compared(parse: Make, figure: Make) -> None:
    points = [
        Point(name, share, figure(0.5 + share / 4, 0.4, 0.8), figure(0.1, 0.0, 0.2))
        for name, share in (("zero-shot", 0.0), ("few-shot", 0.0), ("LoRA", 0.02), ("full", 1.0))
    ]
    drawn = comparison(points, quality="score")
    said = texts(parse, drawn)
    assert [said.count(p.name) for p in points] == [2, 2, 2, 2]  # a name in each panel
    assert {"none", "10 %", "100 %", "trainable share", "score"} <= set(said)
    left, right = drawn.axes
    drawn.draw_without_rendering()
    beside = left.get_position().y0 == pytest.approx(right.get_position().y0)
    svg(drawn, "x", narrow=True)
    assert beside
    assert left.get_position().y0 > right.get_position().y1
    assert len(comparison([Point("a", 0.5, 1.0)]).axes) == 1


def test_names_do_not_cover_each_other() -> None:
    points = [Point(f"method {i}", 0.01 * 3 ** (i // 2), 0.5) for i in range(6)]  # pairs coincide
    drawn = comparison(points)
    for narrow in (True, False):
        svg(drawn, "x", narrow=narrow)
        drawn.draw_without_rendering()
        (axes,) = drawn.axes
        boxes = [text.get_window_extent() for text in axes.texts]
        panel = axes.get_window_extent()
        assert len(boxes) == 6
        for i, one in enumerate(boxes):
            assert panel.padded(4).containsx(one.x0)
            assert panel.padded(4).containsx(one.x1)
            assert not any(one.overlaps(other) for other in boxes[:i])


def test_a_sweep_shows_every_seed() -> None:
    drawn = sweep({"LoRA": {8: [0.5, 0.7], 1: [0.4]}, "DoRA": {8: [0.6]}}, x="rank", y="score")
    (axes,) = drawn.axes
    assert axes.get_xscale() == "log"
    assert [list(line.get_ydata()) for line in axes.lines[:3]] == [[0.4, 0.6], [0.4], [0.5, 0.7]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "8"]
    flat = sweep({"a": {0: [1.0], 1: [2.0]}}, x="p", y="score")
    assert flat.axes[0].get_xscale() == "linear"  # a logarithm has no 0


def test_update_sizes(parse: Make) -> None:
    drawn = update_sizes({"q": {0: 0.01, 1: 0.02}, "embed": {-1: 0.5}})
    assert {"q", "embed", "1 %", "2 %", "50 %", "–"} <= set(texts(parse, drawn))
    assert "2 %" not in texts(parse, drawn, narrow=True)  # no room; the scale says it
    mesh = drawn.axes[0].collections[0].get_array()
    assert mesh.shape == (2, 3)
    assert mesh.mask.sum() == 3
    update_sizes({"q": {0: 0.0}})  # an adapter that has not learnt yet
    update_sizes({"q": {0: math.inf, 1: 0.1}})


def test_the_histogram(parse: Make) -> None:
    found = weight_bins(torch.randn(64, 64))
    drawn = weight_histogram(found)
    low, high = drawn.axes
    assert [p.get_height() for p in low.patches] == pytest.approx([100 * s for s in found.shares])
    assert len(high.lines) == 16  # 15 edges, and the levels
    assert {"1/16", "density", "share (%)"} <= set(texts(parse, drawn))


def test_names_in_a_figure() -> None:
    assert label("_a\n$b$ \x00") == r" _a \$b\$ ‹U+0000›"
    assert label("x" * 99) == "x" * 39 + "…"
