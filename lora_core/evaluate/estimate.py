r"""A figure with its count and its interval: what every measure of this room returns.

A test set is a sample, and a score on it is known only as well as the sample allows: 80 % of 64
answers is anything from 69 to 88 %. Three ways to an interval, by what the figure is:

    proportion     successes of so many tries: Wilson's score interval, which stays within [0, 1]
                   and is honest for 0 of 20 (Wilson 1927; Brown, Cai & DasGupta 2001)
    mean, ratio    a mean over rows, or a sum over rows by another (nats by tokens): percentile
                   bootstrap over rows (Efron 1979), since the tokens of a row belong together
    bootstrap      any statistic of the rows, corpus BLEU for one (Koehn 2004)

Resamples are drawn from a fixed seed, so a figure and its interval repeat to the bit. Two systems
on the same rows are compared by `paired_difference`, whose interval is that of the difference; two
overlapping intervals say less.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Numbers: TypeAlias = "Sequence[float] | npt.NDArray[np.float64]"
RESAMPLES = 1000
_CELLS = 4_000_000  # of resampled numbers held at once


@dataclass(frozen=True)
class Estimate:
    """A figure, what it was counted on, and the interval that the sample allows."""

    value: float
    """the figure itself, on all rows"""
    count: int
    """how many units it was taken over"""
    low: float
    """lower end of the interval; NaN where one unit alone gives none"""
    high: float
    """upper end"""
    unit: str = "rows"
    """what is counted: rows, tokens, pairs …"""
    level: float = 0.95
    """confidence of the interval, in (0, 1)"""
    method: str = "bootstrap"
    """how the interval was made: "wilson", "bootstrap" or "jackknife" """

    def __str__(self) -> str:
        text = f"{self.value:.4g}"
        if not math.isnan(self.low):
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{text} ({self.count} {self.unit})"

    def facts(self) -> dict[str, Any]:
        """The fields as JSON holds them: NaN and infinity as null."""
        return {k: None if _beyond(v) else v for k, v in asdict(self).items()}

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The same estimate on another scale.

        Args:
            function: increasing, as exp is: perplexity from a mean loss.

        Returns:
            An estimate whose value and ends are the function's of these.
        """
        value, low, high = map(function, (self.value, self.low, self.high))
        return Estimate(value, self.count, low, high, self.unit, self.level, self.method)


def _beyond(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def proportion(
    successes: float, count: int, *, unit: str = "rows", level: float = 0.95
) -> Estimate:
    r"""A share, with Wilson's score interval.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), with p = successes / n.

    Args:
        successes: 0 … count; a tie may count half, and the interval is then wider than need be.
        count: n, how many tries there were.
        unit: what is counted.
        level: confidence.

    Returns:
        The share in [0, 1].

    Raises:
        ValueError: no tries, or more successes than tries.

    Ref:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"a share needs 0 ≤ successes ≤ count, count ≥ 1; got {successes}/{count}")
    z = NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    p, spread = successes / count, z * z / count
    middle = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    # exact at the ends, where rounding would leave -1e-17
    low, high = (0.0 if successes == 0 else low), (1.0 if successes == count else high)
    return Estimate(p, count, low, high, unit, level, "wilson")


def bootstrap(  # options by name
    rows: int,
    statistic: Callable[["npt.NDArray[np.int64]"], float],
    *,
    unit: str = "rows",
    count: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Any statistic of rows, with the percentile interval of its bootstrap distribution.

    Args:
        rows: how many rows there are.
        statistic: the figure of the rows whose numbers it is given, (rows,) int64, some of them
            repeated and some missing.
        unit: what `count` counts.
        count: of the estimate; None: `rows`.
        resamples: how many times the rows are drawn anew.
        seed: of the drawing.
        level: confidence.

    Returns:
        The statistic on the rows as they are, and the interval. One row gives none (NaN);
        resamples of which the statistic is NaN say nothing and are left out.

    Raises:
        ValueError: no rows, or an option out of range.
    """
    import numpy as np

    _check_rows(rows, resamples)
    value = float(statistic(np.arange(rows)))
    drawn = [float(statistic(draw)) for block in _draws(rows, resamples, seed) for draw in block]
    found = [figure for figure in drawn if not math.isnan(figure)]
    return _percentiles(value, rows if count is None else count, found, unit, level)


def ratio(
    numerators: Numbers,
    denominators: Numbers,
    *,
    unit: str = "rows",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Σ numerators / Σ denominators over rows, the rows resampled together.

    Args:
        numerators: (rows,), nats of a row for one.
        denominators: (rows,), its graded tokens; their sum is the estimate's count where the unit
            is not rows.
        unit: what the denominators count.
        resamples: how many times the rows are drawn anew.
        seed: of the drawing.
        level: confidence.

    Returns:
        The ratio. Resamples whose denominators sum to 0 say nothing and are left out.

    Raises:
        ValueError: no rows, other lengths, or denominators that sum to 0.
    """
    import numpy as np

    above = np.asarray(numerators, dtype=np.float64)
    below = np.asarray(denominators, dtype=np.float64)
    if above.shape != below.shape or above.ndim != 1:
        raise ValueError(f"a ratio needs as many of each; got {above.shape} and {below.shape}")
    _check_rows(len(above), resamples)
    if not below.sum():
        raise ValueError(f"the denominators of {len(below)} rows sum to 0: there is no ratio")
    found: list[float] = []
    for block in _draws(len(above), resamples, seed):
        sums = below[block].sum(axis=1)
        kept = sums != 0
        found += (above[block].sum(axis=1)[kept] / sums[kept]).tolist()
    count = len(above) if unit == "rows" else int(below.sum())
    return _percentiles(float(above.sum() / below.sum()), count, found, unit, level)


def mean(
    scores: Numbers,
    *,
    unit: str = "rows",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """The mean of a score over rows.

    Args:
        scores: (rows,), one a row.
        unit: what the rows are.
        resamples: how many times the rows are drawn anew.
        seed: of the drawing.
        level: confidence.

    Returns:
        The mean; its count is the number of rows.

    Raises:
        ValueError: no rows.
    """
    ones = [1.0] * len(scores)
    return ratio(scores, ones, unit=unit, resamples=resamples, seed=seed, level=level)


def paired_difference(
    after: Numbers, before: Numbers, *, unit: str = "rows", seed: int = 0, level: float = 0.95
) -> Estimate:
    """The mean of after − before over the same rows, with the interval of the difference.

    Args:
        after: (rows,) scores of one system.
        before: (rows,) scores of the other on the same rows.
        unit: what the rows are.
        seed: of the resampling.
        level: confidence.

    Returns:
        The mean difference. An interval that leaves out 0 is a difference the sample can tell.

    Raises:
        ValueError: no rows, or other numbers of them.
    """
    import numpy as np

    if len(after) != len(before):
        raise ValueError(f"pairs need as many of each; got {len(after)} and {len(before)}")
    differences = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return mean(differences, unit=unit, seed=seed, level=level)


def jackknife(
    value: float, without: Sequence[float], *, count: int, unit: str = "rows", level: float = 0.95
) -> Estimate:
    r"""A statistic with the normal interval of its jackknife variance.

    (m − 1) / m · Σ (dᵢ − d̄)², dᵢ the statistic without row i of m.

    Args:
        value: the statistic of all rows.
        without: (m,), the statistic without each row.
        count: of the estimate.
        unit: what is counted.
        level: confidence.

    Returns:
        The estimate; without an interval (NaN) where fewer than two rows are left out or one
        leaves no statistic.

    Ref:
        Efron & Stein 1981, "The Jackknife Estimate of Variance".
    """
    m, half = len(without), math.nan
    if m > 1:
        middle = math.fsum(without) / m
        error = math.sqrt((m - 1) / m * math.fsum((d - middle) ** 2 for d in without))
        half = NormalDist().inv_cdf(0.5 + _checked(level) / 2) * error
    return Estimate(value, count, value - half, value + half, unit, level, "jackknife")


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, 0.95 for one; got {level}")
    return level


def _check_rows(rows: int, resamples: int) -> None:
    if rows < 1:
        raise ValueError("no rows to take a figure over")
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more; got {resamples}")


def _draws(rows: int, resamples: int, seed: int) -> Iterator["npt.NDArray[np.int64]"]:
    """Row numbers drawn with replacement, in blocks of (some resamples, rows).

    One row is not drawn from: its resamples are all itself, an interval of no width and no truth.
    """
    import numpy as np

    generator, block = np.random.default_rng(seed), max(1, _CELLS // rows)
    for start in range(0, resamples if rows > 1 else 0, block):
        yield generator.integers(rows, size=(min(block, resamples - start), rows))


def _percentiles(
    value: float, count: int, found: Sequence[float], unit: str, level: float
) -> Estimate:
    """An estimate with the percentile interval of what resampling found."""
    import numpy as np

    tail = (1 - _checked(level)) / 2
    low, high = np.quantile(found, [tail, 1 - tail]).tolist() if found else (math.nan, math.nan)
    return Estimate(value, count, low, high, unit, level, "bootstrap")
