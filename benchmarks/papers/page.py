"""docs/papers.md's generated part: a table of the verdicts, then each claim with its figures.

A claim without a result is not on the page.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.papers.claim import Claim

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
MARK = ("<!-- papers: made by `python -m benchmarks.papers --write` -->", "<!-- end of papers -->")


def generated(claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The part between the marks."""
    found = [(claim, results[name]) for name, claim in claims.items() if name in results]
    lines = ["| claim | paper | verdict |", "|---|---|---|"]
    for claim, row in found:
        lines.append(f"| [{claim.says}](#{claim.name}) | {claim.paper} | **{row['verdict']}** |")
    for claim, row in found:
        lines += ["", *_section(claim, row)]
    return "\n".join(lines)


def _section(claim: Claim, found: Mapping[str, Any]) -> list[str]:
    """One claim: what it says, the command, its table, the verdict and why."""
    lines = [f"### {claim.name}", "", f"{claim.says} ({claim.paper})", ""]
    lines += ["```console", f"$ {found['command']}", "```", "", *table(found["rows"])]
    lines += ["", f"**{found['verdict']}.**", "", *(f"- {reason}" for reason in found["reasons"])]
    lines += [f"- On another scale: {claim.scale}"]
    numbers = {k: v for k, v in found["figures"].items() if isinstance(v, int | float)}
    if numbers:
        lines += [
            "- Also: " + ", ".join(f"{k.replace('_', ' ')} {v:.5g}" for k, v in numbers.items())
        ]
    if picture := found["figures"].get("picture"):
        lines += ["", f"![figure of {claim.name}]({picture})"]
    where = found["machine"]
    lines += ["", f"{found['seconds']:.0f} s on {where['machine']}, {where['threads']} threads."]
    return lines


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as Markdown; an interval stands behind its figure."""
    if not rows:
        return []
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(cell(row[head]) for head in heads)} |" for row in rows]


def cell(value: Any) -> str:
    """A figure to four digits; an estimate's interval behind it."""
    if isinstance(value, dict):
        text = f"{value['value']:.4g}"
        if value["low"] is None:
            return text
        return f"{text} [{value['low']:.4g}, {value['high']:.4g}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_page(claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the generated part between the marks of docs/papers.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARK[0])
    after = rest.split(MARK[1])[1]
    part = generated(claims, results)
    PAGE.write_text(f"{before}{MARK[0]}\n{part}\n{MARK[1]}{after}", encoding="utf-8")
