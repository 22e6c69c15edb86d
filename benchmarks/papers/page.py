"""docs/papers.md's generated part: a table of the verdicts, then each claim with its figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.papers.claim import Claim

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"
MARK = ("<!-- papers: made by `python -m benchmarks.papers --write` -->", "<!-- end of papers -->")
NOT_RUN = "not yet run"


def generated(claims: Mapping[str, Claim], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The part between the marks."""
    lines = ["| claim | paper | verdict |", "|---|---|---|"]
    for name, claim in claims.items():
        verdict = results[name]["verdict"] if name in results else NOT_RUN
        lines.append(f"| [{claim.says}](#{name}) | {claim.paper} | **{verdict}** |")
    for name, claim in claims.items():
        lines += ["", *_section(claim, results.get(name))]
    return "\n".join(lines)


def _section(claim: Claim, found: Mapping[str, Any] | None) -> list[str]:
    """One claim: what it says, the command, its table, the verdict and why."""
    lines = [f"### {claim.name}", "", f"{claim.says} ({claim.paper})", ""]
    if found is None:
        return [*lines, f"**{NOT_RUN}**: `python -m benchmarks.papers {claim.name}`"]
    lines += ["```console", f"$ {found['command']}", "```", "", *table(found["rows"])]
    lines += ["", f"**{found['verdict']}.**", "", *(f"- {part}" for part in _reasons(found))]
    lines += [f"- On another scale: {claim.scale}"]
    if picture := found["figures"].get("picture"):
        lines += ["", f"![{claim.says}]({picture})"]
    where = found["machine"]
    lines += ["", f"{found['seconds']:.0f} s on {where['machine']}, {where['threads']} threads."]
    return lines


def _reasons(found: Mapping[str, Any]) -> list[str]:
    return str(found["why"]).split("; ")


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
