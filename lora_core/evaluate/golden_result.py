"""What a golden set found: each row's answer and checks, and the file that holds them.

A result is JSON Lines: a header with the golden file's name and hash, then a row each. `run_golden`
writes the same file row by row, so what an interrupted run leaves is the beginning of a result.
Loading refuses such a half: a comparison with missing rows would miss their regressions.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_core.data.lines import read_rows
from lora_core.evaluate.estimate import Estimate, proportion
from lora_core.evaluate.golden_checks import Finding
from lora_core.evaluate.questions import Prompt
from lora_core.evaluate.shown import cut
from lora_core.files import atomic_write

FORMAT = "golden result 1"


@dataclass(frozen=True)
class GoldenRow:
    """One prompt, its answer, and what the checks found."""

    id: str
    """the prompt's name"""
    prompt: Prompt
    """turns, or raw text"""
    answer: str
    """what the model said"""
    findings: tuple[Finding, ...]
    """one a check; and one named "empty" where nothing was generated and nothing says it may"""
    where: str
    """file:line of the golden row"""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The checks that did not pass."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def title(self, width: int = 70) -> str:
        """The first line of what was asked, for people."""
        if isinstance(self.prompt, str):
            asked = self.prompt
        else:
            asked = next((m["content"] for m in self.prompt[::-1] if m.get("content")), "")
        lines = str(asked).strip().splitlines()
        return cut(lines[0], width) if lines else ""


@dataclass(frozen=True)
class GoldenResult:
    """A golden set's rows as one model answered them."""

    name: str
    """the golden file's, without its folder"""
    sha256: str
    """of its bytes when it was read"""
    rows: tuple[GoldenRow, ...]
    """in the file's order"""
    bound: dict[str, Any] = field(default_factory=dict)
    """what the answers depend on: model, adapter, sampling; how the set was read"""

    @property
    def passed(self) -> int:
        """How many rows passed."""
        return sum(row.passed for row in self.rows)

    @property
    def pass_rate(self) -> Estimate:
        """Share of rows that passed, with Wilson's interval."""
        return proportion(self.passed, len(self.rows))

    @property
    def failures(self) -> tuple[GoldenRow, ...]:
        """The rows that did not pass."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def empty(self) -> tuple[GoldenRow, ...]:
        """The rows to which nothing was generated."""
        return tuple(row for row in self.rows if not row.answer.strip())

    def text(self, limit: int = 20) -> str:
        """The pass rate, and the first `limit` failing rows with their reasons."""
        head = f"golden set {self.name}: {self.passed} of {len(self.rows)} rows pass"
        lines = [f"{head}; {len(self.empty)} empty" if self.empty else head]
        for row in self.failures[:limit]:
            lines.append(f"FAILS  {row.id}  {row.title()}  ({row.where})")
            lines.append(f"  answer: {cut(row.answer) or '(nothing)'}")
            lines += [f"  {finding.check}: {finding.why}" for finding in row.failures]
        return "\n".join([*lines, *rest(len(self.failures) - limit, "failing rows")])

    def __str__(self) -> str:
        return self.text()

    def save(self, path: str | Path) -> Path:
        """Write the result, all of it or nothing.

        Args:
            path: the file; its folder must exist.

        Returns:
            The path.

        Raises:
            FileNotFoundError: no such folder.
        """
        header = header_of(self.name, self.sha256, len(self.rows), self.bound)
        lines = [header, *map(row_facts, self.rows)]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return atomic_write(path, content)

    @staticmethod
    def load(path: str | Path) -> "GoldenResult":
        """Read what `save` or a finished `run_golden(out=…)` wrote.

        Args:
            path: the file.

        Returns:
            The result.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no result, or one of an unfinished run.
        """
        lines = list(read_rows(path))
        header = lines[0][1]
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} is no result of a golden set: its first line is no header")
        rows = {row.id: row for row in (row_of(facts, where) for where, facts in lines[1:])}
        if len(rows) != header["rows"]:
            raise ValueError(
                f"{path} holds {len(rows)} of {header['rows']} rows: the run that wrote it was "
                "stopped; run it again with the same out= and it goes on"
            )
        return GoldenResult(
            header["golden"], header["sha256"], tuple(rows.values()), header["bound"]
        )


def header_of(name: str, sha256: str, rows: int, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a result's file."""
    return {
        "format": FORMAT,
        "golden": name,
        "sha256": sha256,
        "rows": rows,
        "bound": dict(bound),
    }


def row_facts(row: GoldenRow) -> dict[str, Any]:
    """A row as JSON holds it."""
    facts = asdict(row)
    return {"id": facts.pop("id"), "passed": row.passed, **facts}


def row_of(facts: Mapping[str, Any], where: str) -> GoldenRow:
    """The row that `row_facts` wrote.

    Raises:
        ValueError: it wrote something else.
    """
    try:
        prompt = facts["prompt"]
        return GoldenRow(
            facts["id"],
            prompt if isinstance(prompt, str) else tuple(prompt),
            facts["answer"],
            tuple(Finding(**finding) for finding in facts["findings"]),
            facts["where"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} is no row of a golden result: {error}") from None


def rest(count: int, what: str) -> list[str]:
    """A line that says how much a list left out, where it did."""
    return [f"… and {count} more {what}"] if count > 0 else []
