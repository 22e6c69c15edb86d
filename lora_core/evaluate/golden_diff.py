r"""Two results of a golden set held against each other: what a run broke, mended and moved.

A row regresses when it passed and now fails, and also when its score fell below its floor while
something else failed all along: a floor once held is kept. A regression is what a script has to
know (`.regressed`, the command's exit code 1). All else is for people: rows mended, rows that fail
as before, scores with their mean change, answers that changed and still pass.

Rows are compared by id. Where the golden file has changed in between, the comparison says so: rows
that are in one result only, and rows whose prompt is not the same under the same id, are named and
not compared. That a row was removed is no regression; it is written down where a reader sees it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_core.evaluate.estimate import Estimate, paired_difference
from lora_core.evaluate.golden_checks import Finding
from lora_core.evaluate.golden_result import GoldenResult, GoldenRow, rest
from lora_core.evaluate.shown import cut, parting


@dataclass(frozen=True)
class Pair:
    """One prompt, answered before and after."""

    before: GoldenRow
    """as it was"""
    after: GoldenRow
    """as it is"""

    @property
    def changed(self) -> bool:
        """Whether the answer is another."""
        return self.before.answer != self.after.answer

    @property
    def fell(self) -> tuple[Finding, ...]:
        """Scores that held their floor before and are below it now."""
        held = {f.check for f in self.before.findings if f.passed and f.score is not None}
        return tuple(finding for finding in self.after.failures if finding.check in held)

    @property
    def regressed(self) -> bool:
        """Whether the row passed and fails, or a score fell below its floor."""
        return (self.before.passed and not self.after.passed) or bool(self.fell)

    @property
    def moves(self) -> tuple[tuple[str, float, float], ...]:
        """(check, score before, score after) of each score that both rows have."""
        old = {f.check: f.score for f in self.before.findings if f.score is not None}
        return tuple(
            (f.check, old[f.check], f.score)
            for f in self.after.findings
            if f.score is not None and f.check in old
        )


@dataclass(frozen=True)
class GoldenDiff:
    """What became of a golden set's rows."""

    before: GoldenResult
    """the first result"""
    after: GoldenResult
    """the second"""
    pairs: tuple[Pair, ...]
    """rows in both, in the second's order"""
    only_before: tuple[GoldenRow, ...]
    """rows that the second result lacks, or asks otherwise"""
    only_after: tuple[GoldenRow, ...]
    """rows that the first lacks, or asked otherwise"""

    @property
    def same_file(self) -> bool:
        """Whether both were measured on the same golden file."""
        return self.before.sha256 == self.after.sha256

    @property
    def regressed(self) -> bool:
        """Whether anything did: exit code 1."""
        return bool(self.regressions)

    @property
    def regressions(self) -> tuple[Pair, ...]:
        """Rows that passed and fail, or whose score fell below its floor."""
        return tuple(pair for pair in self.pairs if pair.regressed)

    @property
    def fixes(self) -> tuple[Pair, ...]:
        """Rows that failed and pass."""
        return tuple(p for p in self.pairs if p.after.passed and not p.before.passed)

    @property
    def still_failing(self) -> tuple[Pair, ...]:
        """Rows that fail as they did before."""
        failing = (p for p in self.pairs if not p.before.passed and not p.after.passed)
        return tuple(pair for pair in failing if not pair.regressed)

    @property
    def changed(self) -> tuple[Pair, ...]:
        """Rows with another answer, whether they pass or not."""
        return tuple(pair for pair in self.pairs if pair.changed)

    @property
    def score_moves(self) -> dict[str, Estimate]:
        """Mean change of each score over the rows that have it, with its interval."""
        moves: dict[str, list[tuple[float, float]]] = {}
        for pair in self.pairs:
            for check, old, new in pair.moves:
                moves.setdefault(check, []).append((new, old))
        return {
            check: paired_difference([new for new, _ in both], [old for _, old in both])
            for check, both in moves.items()
        }

    def text(self, limit: int = 20) -> str:
        """The comparison for people.

        Args:
            limit: rows shown of each kind; the others are counted.

        Returns:
            A summary; each regression and fix with its answers before (-) and after (+).
        """
        lines = [self._summary()]
        if not self.same_file:
            lines.append(
                f"! the golden file has changed ({self.before.sha256[:8]} before, "
                f"{self.after.sha256[:8]} after): rows are compared by id"
            )
        for check, move in self.score_moves.items():
            lines.append(f"{check}: mean change {move}")
        lines += _shown("REGRESSION", self.regressions, limit)
        lines += _shown("still fails", self.still_failing, limit)
        lines += _shown("fixed", self.fixes, limit)
        quiet = [pair for pair in self.changed if pair.before.passed and pair.after.passed]
        lines += _shown("passes, another answer", quiet, limit)
        lines += _alone("before", self.only_before, limit) + _alone("after", self.only_after, limit)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def _summary(self) -> str:
        old = sum(pair.before.passed for pair in self.pairs)
        new = sum(pair.after.passed for pair in self.pairs)
        return (
            f"golden set {self.after.name}, {len(self.pairs)} rows in both: "
            f"{old} passed before, {new} after; "
            f"{len(self.regressions)} regressed, {len(self.fixes)} fixed, "
            f"{len(self.still_failing)} still fail, {len(self.changed)} answers changed"
        )


def compare_golden(before: GoldenResult, after: GoldenResult) -> GoldenDiff:
    """Hold a result against an earlier one.

    Args:
        before: the earlier.
        after: the later; of the same golden file, or of another that shares ids with it.

    Returns:
        The difference.

    Raises:
        ValueError: no row is in both.
    """
    old = {row.id: row for row in before.rows}
    pairs = [Pair(old[row.id], row) for row in after.rows if row.id in old]
    pairs = [pair for pair in pairs if pair.before.prompt == pair.after.prompt]
    if not pairs:
        raise ValueError(
            f"no row is in both results: {before.name} ({len(before.rows)} rows) and {after.name} "
            f"({len(after.rows)} rows); compare results of one golden file"
        )
    both = {pair.after.id for pair in pairs}
    return GoldenDiff(
        before,
        after,
        tuple(pairs),
        tuple(row for row in before.rows if row.id not in both),
        tuple(row for row in after.rows if row.id not in both),
    )


def _shown(label: str, pairs: Sequence[Pair], limit: int) -> list[str]:
    lines: list[str] = []
    for pair in pairs[:limit]:
        lines.append(f"{label}  {pair.after.id}  {pair.after.title()}  ({pair.after.where})")
        lines += [f"  {line}" for line in _answers(pair)]
        lines += [f"  {finding.check}: {finding.why}" for finding in pair.after.failures]
    return lines + rest(len(pairs) - limit, f"rows: {label}")


def _answers(pair: Pair) -> Iterable[str]:
    """Both answers around the place where they part; one line where they are the same."""
    old, new = pair.before.answer, pair.after.answer
    if old == new:
        return [f"= {cut(new) or '(nothing)'}"]
    place = parting(old, new)
    return [
        f"{sign} {cut(text, middle=place) or '(nothing)'}"
        for sign, text in (("-", old), ("+", new))
    ]


def _alone(which: str, rows: Sequence[GoldenRow], limit: int) -> list[str]:
    lines = [f"only {which}  {row.id}  {row.title()}" for row in rows[:limit]]
    return lines + rest(len(rows) - limit, f"rows only {which}")
