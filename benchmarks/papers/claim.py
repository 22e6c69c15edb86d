"""A claim of a paper, what was found when it was run again, and how a verdict follows from figures.

A verdict is never written by hand. A claim says beforehand which comparisons it makes (`Check`) and
what each should show: a difference below zero, above zero, or no larger than a margin. The figure
of a check is an interval, and the interval decides:

    below, above    agrees: all of it is on that side of zero; disagrees: all on the other side
    within          agrees: all of it is inside ± margin; disagrees: all of it is outside
    otherwise       undecided: the difference is within its spread

A claim agrees if all its checks do, disagrees if one does, and is undecided otherwise. "No
difference" is thus shown by a narrow interval and never by a wide one: the two one-sided tests of
equivalence (Schuirmann 1987), not the absence of significance.

Where training is involved the interval is over seeds: both sides of a pair have the same seed (same
data, same order), their difference is taken, and Student's t gives the interval of its mean
(`over_seeds`). With three seeds that is 2.5 standard deviations to each side: wide, and honest.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_core.evaluate.estimate import Estimate

Verdict = Literal["agrees", "disagrees", "undecided"]
MOST_REASONS = 4
_WEIGHT = {"disagrees": 0, "undecided": 1, "agrees": 2}  # the first decides before the others

# Student's t at 97.5 %, by degrees of freedom from 1
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Settings:
    """What all claims of a call share."""

    model: Path
    """Hugging Face folder of the base"""
    out: Path
    """folder of trained runs and of quick results; may be removed when all is done"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of split, start and order, one training each; from 1 to 10"""
    steps: int = 100
    """optimizer steps of a training"""
    held_out: int = 96
    """rows of the task that are held out and judged by"""
    text: Path | None = None
    """plain text file for perplexity; None: held-out modules of the standard library"""
    quick: bool = False
    """toy counts: shows that all runs, not what is true"""

    def __post_init__(self) -> None:
        if not 1 <= len(set(self.seeds)) == len(self.seeds) <= len(T_975) + 1:
            raise ValueError(f"seeds must be 1 to {len(T_975) + 1} different numbers: {self.seeds}")


@dataclass(frozen=True)
class Check:
    """One comparison: what was measured and what the claim expects of it."""

    says: str
    """the comparison in words: "loss, NF4 - FP4" """
    difference: Estimate
    """the figure with its interval"""
    expects: Literal["below", "above", "within"]
    """below zero, above zero, or within ± margin"""
    margin: float = 0.0
    """for "within": the largest difference that counts as none, in the figure's unit"""

    def __post_init__(self) -> None:
        if (self.expects == "within") != (self.margin > 0):
            raise ValueError(
                f"{self.says}: a margin above 0 goes with expects='within' and only with it; got "
                f"expects={self.expects!r}, margin={self.margin}"
            )

    @property
    def verdict(self) -> Verdict:
        """What the interval decides; one without ends (a single seed) decides nothing."""
        low, high = self.difference.low, self.difference.high
        if self.expects == "above":
            low, high = -high, -low
        if self.expects == "within":
            agrees = low > -self.margin and high < self.margin
            disagrees = low > self.margin or high < -self.margin
        else:
            agrees, disagrees = high < 0, low > 0
        return "agrees" if agrees else "disagrees" if disagrees else "undecided"

    def __str__(self) -> str:
        wanted = f"within ±{self.margin:g}" if self.expects == "within" else f"{self.expects} 0"
        return f"{self.says} = {self.difference}, expected {wanted}: {self.verdict}"


@dataclass
class Finding:
    """What a claim's run found."""

    rows: list[dict[str, Any]]
    """the table: one dict a row, the same keys in each; Estimates and numbers welcome"""
    checks: list[Check]
    """the comparisons that the verdict follows from"""
    figures: dict[str, Any] = field(default_factory=dict)
    """further figures, as JSON holds them"""
    seconds: float = 0.0
    """filled in by the command"""

    @property
    def verdict(self) -> Verdict:
        """What the checks decide together."""
        found = [check.verdict for check in self.checks]
        if "disagrees" in found:
            return "disagrees"
        return "agrees" if found and set(found) == {"agrees"} else "undecided"

    @property
    def reasons(self) -> list[str]:
        """The checks in words; of more than four those that decided it, the others counted."""
        decided = sorted(self.checks, key=lambda check: _WEIGHT[check.verdict])
        shown, left = decided[:MOST_REASONS], decided[MOST_REASONS:]
        agreeing = sum(check.verdict == "agrees" for check in left)
        more = [f"and {len(left)} more, of which {agreeing} agree"] if left else []
        return [*map(str, shown), *more]

    @property
    def why(self) -> str:
        """The reasons in a line."""
        return "; ".join(self.reasons)


@dataclass(frozen=True)
class Claim:
    """A claim of a paper and the function that runs it again."""

    name: str
    """on the command line; the file's name"""
    paper: str
    """authors, year, arXiv number, place"""
    says: str
    """the claim, in a line"""
    run: Callable[[Settings], Finding]
    """runs it"""
    scale: str
    """what differs from the paper's setting, in a line or two"""


def over_seeds(after: Sequence[float], before: Sequence[float] | None = None) -> Estimate:
    """The mean over seeds of after - before, with Student's interval.

    Args:
        after: one figure a seed.
        before: the other side's, in the same order of seeds; None: the figures themselves.

    Returns:
        The mean and its 95 % interval; with a single seed the interval is NaN.

    Raises:
        ValueError: no figures, other numbers of them, or more than 10.
    """
    others = [0.0] * len(after) if before is None else before
    if len(after) != len(others) or not 1 <= len(after) <= len(T_975) + 1:
        raise ValueError(
            f"from 1 to {len(T_975) + 1} seeds, as many of each; got {len(after)} and {len(others)}"
        )
    differences = [a - b for a, b in zip(after, others, strict=True)]
    middle, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Estimate(middle, 1, math.nan, math.nan, "seeds", 0.95, "student")
    half = T_975[count - 2] * statistics.stdev(differences) / math.sqrt(count)
    return Estimate(middle, count, middle - half, middle + half, "seeds", 0.95, "student")
