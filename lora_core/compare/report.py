r"""What a comparison leaves to look at: compare.json, compare.md, PNGs and report.html.

All are made anew from the records at the end of each call; the records themselves are on the disk
from the moment a variant ends (results.py). Pictures need matplotlib; without it a line says so and
the page comes without them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.compare.results import estimate
from lora_core.compare.rows import Row, rows_of
from lora_core.compare.run import Compared, cores
from lora_core.compare.table import (
    Column,
    cells,
    cost_columns,
    failures,
    markdown,
    notes,
    quality_columns,
    shown_measures,
)
from lora_core.compare.variants import METHODS, word
from lora_core.evaluate.estimate import Estimate
from lora_core.files import atomic_write
from lora_core.report import Page, Point, bars, comparison, loss_curves, no_matplotlib, save, sweep
from lora_core.train.report import versions

MARKDOWN, FACTS, PAGE = "compare.md", "compare.json", "report.html"
PLOT = "compare.png"
_SHOWN = 3  # answers of each variant in the page


def leave(found: Compared) -> list[Path]:
    """Write all files of a comparison.

    Args:
        found: what `compare` returned.

    Returns:
        What was written.
    """
    out = Path(found.config.out)
    rows = rows_of(found.records)
    files = [
        atomic_write(out / FACTS, json.dumps(facts(found, rows), indent=2, ensure_ascii=False)),
        atomic_write(out / MARKDOWN, document(found, rows)),
    ]
    figures = _figures(found, rows)
    files += [save(figure, out / name) for name, (figure, _, _) in figures.items()]
    files.append(_page(found, rows, figures).write(out / PAGE))
    return files


def setting(found: Compared) -> dict[str, Any]:
    """What was compared on what, as names and values."""
    config, task = found.config, found.task
    trained = [v for v in found.variants if METHODS[v.method].trains]
    told = {
        "base": Path(task.model).name,
        "trained on": Path(task.data).name,
        "judged on": f"{Path(task.eval_data).name}, {task.eval_rows} rows at most",
        "seeds": ", ".join(map(str, config.seeds)),
        "cores": cores(),
        "torch": versions().get("torch", "?"),
    }
    if trained:
        steps = sorted({v.settings["steps"] for v in trained})
        batches = sorted({v.settings["batch_size"] for v in trained})
        told["training"] = f"{_words(steps)} steps of {_words(batches)} rows"
    if found.shots is not None:
        told["few-shot"] = f"{found.shots} example{'s' * (found.shots > 1)}"
    if "system-prompt" in config.methods:
        told["system-prompt"] = config.system_text
    return told


def _words(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def facts(found: Compared, rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison as JSON: settings, and each variant with its figures over seeds."""
    return {
        "setting": setting(found),
        "versions": versions(),
        "variants": [_row_facts(row) for row in rows],
        "failed": failures(rows),
    }


def _row_facts(row: Row) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": row.name,
        "method": row.method,
        "swept": dict(row.swept),
        "seeds": [record["seed"] for record in row.done],
        "failed_seeds": [record["seed"] for record in row.failed],
    }
    if not row.done:
        return told
    first = row.done[0]
    told["settings"] = first["settings"]
    told["quality"] = {name: _plain(row.quality(name)) for name in first["quality"]}
    for name in ("loss", "perplexity", "accuracy", "forgetting"):
        told[name] = _plain(row.measured(name))
    for name in ("memory", "memory_whole", "train_seconds", "tokens_per_second"):
        told[name] = _plain(row.number(name))
    told |= {name: first.get(name) for name in ("trainable", "parameters", "bytes", "mergeable")}
    told["unmergeable"] = first["unmergeable"]
    told["request_tokens"] = row.request_tokens()
    told["milliseconds"] = {
        state: {name: _plain(row.latency(state, name)) for name in ("first_token", "per_token")}
        for state in first["latency"]
    }
    return told


def _plain(value: Estimate | float | None) -> Any:
    return value.facts() if isinstance(value, Estimate) else value


def document(found: Compared, rows: Sequence[Row]) -> str:
    """The Markdown page: both tables, their notes, what failed and how to repeat it."""
    # a system text may have lines
    told = "\n".join(f"* {k}: {' '.join(str(v).split())}" for k, v in setting(found).items())
    parts = [
        "# Methods compared",
        told,
        "## What each gives",
        markdown(quality_columns(rows), rows).rstrip(),
        "## What each costs",
        markdown(cost_columns(), rows).rstrip(),
        "\n".join(f"* {note}" for note in notes(rows)),
    ]
    if lines := failures(rows):
        parts += ["## What failed", "\n".join(f"* {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _figures(found: Compared, rows: Sequence[Row]) -> dict[str, tuple[Any, str, str]]:
    """File name -> (figure, what it shows, caption)."""
    metric = next(iter(shown_measures(rows)), None)
    if metric is None:
        return {}
    if (missing := no_matplotlib()) is not None:
        from lora_core.train.report import say

        say(f"no pictures: {missing}")
        return {}
    caption = f"{metric} with its interval, by what is trained and by what is forgotten"
    figures = {PLOT: (comparison(_points(rows, metric), quality=metric), caption, caption)}
    for field in found.config.sweep:
        figure = _sweep_figure(rows, field, metric)
        if figure is not None:
            text = f"{metric} by {field}"
            figures[f"sweep-{field}.png"] = (figure, text, text)
    return figures


def _points(rows: Sequence[Row], metric: str) -> list[Point]:
    points = []
    for row in rows:
        quality = row.quality(metric)
        if quality is not None:
            trains = METHODS[row.method].trains
            lost = row.measured("forgetting") if trains else 0.0
            points.append(Point(row.name, row.share or 0.0, quality, lost))
    return points


def _sweep_figure(rows: Sequence[Row], field: str, metric: str) -> Any:
    """A line a variant through the values of one field; words get bars."""
    series: dict[str, dict[Any, list[float]]] = {}
    named: dict[str, Estimate | float] = {}
    for row in rows:
        quality = row.quality(metric)
        if field not in row.swept or quality is None:
            continue
        rest = {k: v for k, v in row.swept.items() if k != field}
        name = " ".join([row.method, *(f"{k}={word(v)}" for k, v in rest.items())])
        values = [estimate(r["quality"][metric]).value for r in row.done]
        series.setdefault(name, {})[row.swept[field]] = values
        named[row.name] = quality
    if not series:
        return None
    if any(isinstance(value, str) for runs in series.values() for value in runs):
        return bars(named, unit=metric)
    return sweep(series, x=field, y=metric)


def _page(
    found: Compared, rows: Sequence[Row], figures: Mapping[str, tuple[Any, str, str]]
) -> Page:
    page = Page("Methods compared", f"{len(rows)} variants on one task")
    page.facts(setting(found))
    page.heading("What each gives")
    _table(page, quality_columns(rows), rows, "Quality and forgetting")
    for figure, alt, caption in figures.values():
        page.figure(figure, alt=alt, caption=caption)
    page.heading("What each costs")
    _table(page, cost_columns(), rows, "Cost", notes(rows))
    if lines := failures(rows):
        page.heading("What failed")
        for line in lines:
            page.text(line)
    curves = {row.name: row.done[0]["history"] for row in rows if row.done and _curve(row)}
    if curves and no_matplotlib() is None:
        page.heading("Training")
        page.figure(loss_curves(curves), alt="training loss by step", caption="training loss")
    _answers(page, Path(found.config.out), rows)
    return page


def _curve(row: Row) -> bool:
    return bool(row.done[0].get("history"))


def _table(
    page: Page,
    columns: Sequence[Column],
    rows: Sequence[Row],
    caption: str,
    below: Sequence[str] = (),
) -> None:
    shown = [cells(columns, row) for row in rows]
    headings = [column.heading for column in columns]
    page.table(headings, shown, caption, numeric=headings[1:], notes=below)


def _answers(page: Page, out: Path, rows: Sequence[Row]) -> None:
    """The first answers of each variant, folded."""
    page.heading("Answers")
    for row in rows:
        if not row.done:
            continue
        file = out / row.done[0]["folder"] / "answers.jsonl"
        if not file.is_file():
            continue
        from lora_core.evaluate.answers import read_answers

        # answers come longest question first; by place, line 2 before line 10
        answers = sorted(read_answers(file), key=lambda a: (len(a.where), a.where))
        with page.details(row.name):
            for answer in answers[:_SHOWN]:
                page.quote(answer.references[0], "reference")
                page.quote(answer.text, row.name)
