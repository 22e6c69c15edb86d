"""What a finetune folder has to show, as parts of a report: its settings, losses and weights.

Each part can stand alone; `run_report` adds those that the folder and the model at hand allow, and
a sentence for what they do not: a report that leaves something out says so.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.report.drawing import no_matplotlib
from lora_core.report.histogram import WeightHistogram, model_bins
from lora_core.report.page import Page
from lora_core.report.plots import loss_curves
from lora_core.report.updates import NO_LAYER, relative_updates
from lora_core.report.weight_plots import update_sizes, weight_histogram

__all__ = ["base_weights", "losses", "read_history", "run_facts", "run_report", "updates"]


def run_report(
    page: Page,
    run_dir: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    adapter: str = "default",
) -> None:
    """Add what a finetune folder shows: settings, loss curves, update sizes, the base's weights.

    Args:
        page: the report; a section with parts is added.
        run_dir: the `--out` of `lora-core finetune`.
        model: the model with its adapter, for the sizes of the update and the histogram; None:
            without these.
        adapter: the adapter's name in the model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a metrics.jsonl or run.json that does not parse, with file:line.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give the --out of lora-core finetune")
    page.heading("The run")
    facts = run_facts(folder)
    if facts:
        page.facts(facts)
    else:
        page.text(f"There is no run.json in {folder.name}, so the settings are not known.")
    history = read_history(folder)
    if history:
        losses(page, {folder.name: history})
    else:
        page.text(f"There is no metrics.jsonl in {folder.name}, so there is no loss curve.")
    if model is not None:
        updates(page, model, adapter)
        base_weights(page, model)


def read_history(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; none where there is no such file.

    Args:
        run_dir: a finetune folder.

    Returns:
        One record a step. A last line without its end, cut off by a crash, is left out.

    Raises:
        ValueError: a line that is no record, with file:line.
    """
    file = Path(run_dir) / "metrics.jsonl"
    if not file.is_file():
        return []
    records = []
    for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            good = {"step", "loss"} <= record.keys()
        except (ValueError, AttributeError):
            good = False
        if good:
            records.append(record)
        elif line.endswith("\n"):
            raise ValueError(
                f"{file}:{place}: a record needs step and loss; got {line.strip()[:60]!r}"
            )
    return records


def run_facts(run_dir: str | os.PathLike[str]) -> dict[str, object]:
    """The settings that a reader asks for first, from run.json; {} where there is none.

    Args:
        run_dir: a finetune folder.

    Returns:
        name -> value, in the order to show.

    Raises:
        ValueError: the file holds no JSON object.
    """
    file = Path(run_dir) / "run.json"
    if not file.is_file():
        return {}
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(run, dict):
        raise ValueError(f"{file}: must hold a JSON object; got {type(run).__name__}")
    own, train, adapter = (_part(run, name) for name in ("finetune", "train", "adapter"))
    base, versions = _part(run, "base"), _part(run, "versions")
    batch = f"{train.get('batch_size', '?')} × {train.get('accumulate', '?')}"
    found = {
        "base model": base.get("model"),
        "base quantized": base.get("quantize") or ("no" if base else None),
        "method": own.get("method"),
        "rank r, alpha": _pair(adapter.get("r"), adapter.get("alpha")),
        "targets": adapter.get("targets"),
        "data": own.get("data"),
        "steps": train.get("steps"),
        "epochs": train.get("epochs"),
        "batch × accumulated": batch if train else None,
        "learning rate": train.get("lr"),
        "schedule": train.get("schedule"),
        "optimizer": train.get("optimizer"),
        "seed": train.get("seed"),
        "commit": run.get("commit"),
        "made with": ", ".join(f"{k} {v}" for k, v in versions.items()) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def losses(page: Page, histories: Mapping[str, list[dict[str, Any]]]) -> None:
    """Add loss curves and where they ended.

    Args:
        page: the report.
        histories: name of a run -> its records.
    """
    page.heading("Loss", 3)
    ends = []
    for name, history in histories.items():
        evaluated = [r["eval_loss"] for r in history if "eval_loss" in r]
        best = f", best evaluation {min(evaluated):.4g}" if evaluated else ""
        told = f"{history[0]['loss']:.4g} at step {history[0]['step']}, "
        told += f"{history[-1]['loss']:.4g} at step {history[-1]['step']}{best}"
        ends.append(f"{name}: {told}" if len(histories) > 1 else told)
    alt = "Loss by step. " + "; ".join(ends)
    _figure(page, lambda: loss_curves(histories), alt, "Training loss " + "; ".join(ends) + ".")


def updates(page: Page, model: nn.Module, adapter: str = "default") -> None:
    """Add the relative size of the update by layer and projection, or why there is none.

    Args:
        page: the report.
        model: a model with the adapter.
        adapter: its name.
    """
    page.heading("Size of the update by layer", 3)
    try:
        sizes = relative_updates(model, adapter)
    except ValueError as error:
        page.text(f"There is no update to show: {error}.")
        return
    cells = [(x, kind, at) for kind, row in sizes.items() for at, x in row.items()]
    if not cells:
        page.text("There is no update to show: the base's weights are not at hand.")
        return
    most, kind, at = max(cells)
    least = min(cells)[0]
    where = kind if at == NO_LAYER else f"{kind} of layer {at}"
    told = f"From {_percent(least)} to {_percent(most)}, the largest in {where}."
    caption = "Norm of the change of each weight, relative to the weight's norm. " + told
    _figure(page, lambda: update_sizes(sizes), "Heat map of update sizes. " + told, caption)


def base_weights(page: Page, model: nn.Module, code: str = "nf4", block_size: int = 64) -> None:
    """Add the histogram of the base's weights over the bins of a 4-bit code.

    Args:
        page: the report.
        model: the base, with or without adapters.
        code: for a dense base; one in 4 bits is counted in its own.
        block_size: for a dense base.
    """
    page.heading("The base's weights in 4 bits", 3)
    try:
        found = model_bins(model, code, block_size)
    except ValueError as error:
        page.text(f"There is no histogram: {error}.")
        return
    told = _told(found)
    alt = f"Histogram of weights over the {found.code} bins. {told}"
    _figure(page, lambda: weight_histogram(found), alt, told)
    rows = [
        (f"{level:+.4f}", count, _percent(share))
        for level, count, share in zip(found.levels, found.counts, found.shares, strict=True)
    ]
    with page.details("Counts of each bin"):
        page.table(["level", "weights", "share"], rows, numeric=["weights", "share"])


def _told(found: WeightHistogram) -> str:
    even = 1 / len(found.levels)
    return (
        f"{found.total:,} weights of {found.layers} layers, {found.code} in blocks of "
        f"{found.block_size}: the bins hold from {_percent(min(found.shares))} to "
        f"{_percent(max(found.shares))} of them; equal use would be {_percent(even)}."
    )


def _figure(page: Page, draw: Callable[[], Any], alt: str, caption: str) -> None:
    """A figure, or in words what it would show and why it is not drawn."""
    why = no_matplotlib()
    if why is None:
        page.figure(draw(), alt=alt, caption=caption)
    else:
        page.text(f"{caption} No figure: {why}.")


def _part(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = run.get(name)
    return part if isinstance(part, dict) else {}


def _pair(first: object, second: object) -> str | None:
    return None if first is None else f"{first}, {second}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\u00a0%"  # no line begins with the sign
