"""From counts to BLEU: what a row adds to the sums, and the score of the sums.

The ten counts of a row are all that BLEU keeps of it: two lengths, and for n = 1 … 4 the n-grams
that match and those there are. Rows add up, so a corpus, a resample of one and a single row are the
same thing, and `score` serves them all. The formula is told in bleu.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_core.evaluate.ngrams import Ngram, ngrams

ORDERS = (1, 2, 3, 4)
SMOOTHING = {"exp": None, "floor": 0.1, "add-k": 1.0, "none": None}
"""the methods, and the amount that a method adds where none is given"""


@dataclass(frozen=True)
class Scoring:
    """What turns sums into a score, checked."""

    smooth: str = "exp"
    """a key of `SMOOTHING`"""
    value: float | None = None
    """what floor and add-k add; None: the usual"""
    effective_order: bool = False
    """whether orders without any n-gram are left out of the product"""

    def __post_init__(self) -> None:
        if self.smooth not in SMOOTHING:
            raise ValueError(f"smooth must be one of {', '.join(SMOOTHING)}; got {self.smooth!r}")
        if self.value is None:
            return
        if SMOOTHING[self.smooth] is None:
            raise ValueError(
                f"only floor and add-k take a smooth_value; got {self.value} for {self.smooth!r}"
            )
        if not 0 < self.value < math.inf:
            raise ValueError(f"smooth_value must be above 0; got {self.value}")

    @property
    def amount(self) -> float:
        """What floor and add-k add."""
        return self.value or SMOOTHING[self.smooth] or 0.0

    def __str__(self) -> str:
        return f"{self.smooth}[{self.amount:.2f}]" if SMOOTHING[self.smooth] else self.smooth


def row_sums(
    said: Sequence[str], allowed: Callable[[Ngram], int], lengths: Iterable[int]
) -> list[int]:
    """What a row adds to the sums.

    Args:
        said: tokens of the prediction.
        allowed: how often at most an n-gram counts: its count in the reference that has most of it.
        lengths: of the references, in tokens; one or more.

    Returns:
        Tokens of the prediction, of the reference nearest in length, four counts of matches and
        four of n-grams.
    """
    counts = [ngrams(said, n) for n in ORDERS]
    matches = [sum(min(often, allowed(ngram)) for ngram, often in c.items()) for c in counts]
    nearest = min((abs(length - len(said)), length) for length in lengths)[1]
    return [len(said), nearest, *matches, *(c.total() for c in counts)]


def score(sums: Sequence[float], scoring: Scoring) -> tuple[float, list[float], float]:
    """The score of summed counts.

    Args:
        sums: ten, as `row_sums` gives them.
        scoring: the options.

    Returns:
        BLEU in [0, 100], the smoothed precisions in percent, and the brevity penalty.
    """
    said, right = sums[:2]
    matches, totals = sums[2:6], sums[6:]
    penalty = 1.0 if said >= right else math.exp(1 - right / said) if said else 0.0
    if not any(matches):  # nothing to smooth
        return 0.0, [0.0] * len(ORDERS), penalty
    found = _precisions(matches, totals, scoring)
    percent = found + [0.0] * (len(ORDERS) - len(found))
    used = found if scoring.effective_order else percent
    if not all(used):
        return 0.0, percent, penalty
    return penalty * math.exp(sum(map(math.log, used)) / len(used)), percent, penalty


def _precisions(matches: Sequence[float], totals: Sequence[float], scoring: Scoring) -> list[float]:
    """Percent, for each order up to the last that has n-grams."""
    found: list[float] = []
    share = 1.0  # of one match, which exp gives to an order without any
    for n, match, total in zip(ORDERS, matches, totals, strict=True):
        added = scoring.amount if scoring.smooth == "add-k" and n > 1 else 0.0
        if not total + added:
            break
        if match + added:
            found.append(100 * (match + added) / (total + added))
            continue
        share /= 2
        smoothed = {"exp": share, "floor": scoring.amount}.get(scoring.smooth, 0.0)
        found.append(100 * smoothed / total)
    return found
