"""What `lora-core evaluate` found, as lines for people and as one JSON object.

The JSON keeps `tokens`, `loss`, `perplexity` and `accuracy` as plain numbers at its top, where
programs have always found them; every figure with its count and interval is under `figures`, the
base's under `base`, paired differences under `differences`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.cli.evaluate_model import Findings
from lora_core.evaluate.estimate import Estimate
from lora_core.evaluate.figures import Figure

PLAIN = ("loss", "perplexity", "accuracy")


def as_json(found: Findings) -> dict[str, Any]:
    """The findings as JSON holds them."""
    figures = estimates(found.side.figures)
    facts = dict(found.facts)
    if "loss" in figures:
        facts["tokens"] = figures["loss"].count
        facts |= {name: figures[name].facts()["value"] for name in PLAIN}
    facts["figures"] = _facts(figures)
    if found.base is not None:
        facts["base"] = _facts(estimates(found.base.figures))
        facts["differences"] = _facts(found.differences)
    if found.forgetting is not None:
        facts["forgetting"] = found.forgetting.facts()
    if found.golden is not None:
        facts["golden"] = {
            "rows": len(found.golden.rows),
            "passed": found.golden.passed,
            "failed": [row.id for row in found.golden.failures],
        }
    if found.diff is not None:
        facts["golden"]["regressed"] = [pair.after.id for pair in found.diff.regressions]
        facts["golden"]["fixed"] = [pair.after.id for pair in found.diff.fixes]
    return facts


def as_text(found: Findings) -> str:
    """The findings for people."""
    lines = [f"{name:<16} {value}" for name, value in found.facts.items() if value is not None]
    figures = estimates(found.side.figures)
    if "loss" in figures:
        lines.append(f"{'tokens':<16} {figures['loss'].count}")
    if found.base is None:
        width = max((len(name) for name in figures), default=0)
        lines += [f"{name:<{max(width, 16)}} {figure}" for name, figure in figures.items()]
    else:
        lines += ["", *_table(figures, estimates(found.base.figures), found.differences)]
    if found.forgetting is not None:
        lines += ["", f"forgetting: {found.forgetting} bits per byte of general text"]
    if found.diff is not None:
        lines += ["", found.diff.text()]
    elif found.golden is not None:
        lines += ["", found.golden.text()]
    return "\n".join(lines)


def estimates(figures: Mapping[str, Figure]) -> dict[str, Estimate]:
    """The estimates of figures."""
    return {name: figure.estimate for name, figure in figures.items()}


def _facts(figures: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: figure.facts() for name, figure in figures.items()}


def _table(
    after: Mapping[str, Estimate], before: Mapping[str, Estimate], moved: Mapping[str, Estimate]
) -> list[str]:
    """Lines of name, adapter, base and the difference between them."""
    rows: list[Sequence[str]] = [("", "adapter", "base", "difference")]
    for name, figure in after.items():
        others = (str(table[name]) if name in table else "-" for table in (before, moved))
        rows.append((name, str(figure), *others))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
