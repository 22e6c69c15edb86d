r"""Figures that can be set against each other: an estimate, and how it comes out of any rows.

Two models on the same rows are compared row by row, not interval by interval: what makes a row hard
makes it hard for both, so that the difference is known better than either figure. For a mean of
scores the difference is again a mean. BLEU, distinct-n or perplexity are no means of rows; they are
figures of a set. So a `Figure` keeps, beside its estimate, the function from rows to the figure,
and `difference` takes the same rows of both models: drawn anew (paired bootstrap, Koehn 2004), or
all but one (jackknife) for what drawing a row twice would distort, as it does distinct-n.

sacreBLEU does so for its three metrics (`--paired-bs`); here it is one function for every figure.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_core.evaluate.estimate import Estimate, Numbers, bootstrap, jackknife, mean, ratio
from lora_core.evaluate.perplexity import Perplexity, exp_nats


@dataclass(frozen=True)
class Figure:
    """A figure of rows."""

    estimate: Estimate
    """on all rows, with its count and interval"""
    rows: int
    """how many rows there are"""
    on: Callable[[Any], float]
    """the figure of the rows whose numbers it is given, (n,) int64; NaN where they have none"""


def of_scores(scores: Numbers, estimate: Estimate | None = None) -> Figure:
    """The mean of a score over rows.

    Args:
        scores: (rows,), one a row; NaN for a row that has none.
        estimate: of the mean, where another than the bootstrap's is at hand.

    Returns:
        The figure.
    """
    import numpy as np

    held = np.asarray(scores, np.float64)
    there = ~np.isnan(held)
    known = np.where(there, held, 0.0)

    def on(draw: Any) -> float:
        count = there[draw].sum()
        return float(known[draw].sum() / count) if count else math.nan

    return Figure(mean(held) if estimate is None else estimate, len(held), on)


def of_ratio(
    numerators: Numbers,
    denominators: Numbers,
    unit: str,
    scale: Callable[[float], float] = lambda value: value,
) -> Figure:
    """A sum over rows by another, nats by tokens for one.

    Args:
        numerators: (rows,).
        denominators: (rows,).
        unit: what the denominators count.
        scale: increasing; exp makes a perplexity of a loss.

    Returns:
        The figure.
    """
    import numpy as np

    above, below = (np.asarray(x, np.float64) for x in (numerators, denominators))

    def on(draw: Any) -> float:
        total = below[draw].sum()
        return scale(float(above[draw].sum() / total)) if total else math.nan

    return Figure(ratio(above, below, unit=unit).map(scale), len(above), on)


def of_perplexity(found: Perplexity) -> dict[str, Figure]:
    """The figures of `perplexity`.

    Args:
        found: with the sums of its rows.

    Returns:
        loss, perplexity, accuracy, and bits_per_byte where the rows say their bytes.

    Raises:
        ValueError: the sums of the rows are not there.
    """
    estimates = found.estimates()
    nll, tokens = found.row_nll, found.row_tokens
    figures = {
        "loss": of_ratio(nll, tokens, "tokens"),
        "perplexity": of_ratio(nll, tokens, "tokens", exp_nats),
        "accuracy": of_ratio(found.row_correct, tokens, "tokens"),
    }
    if found.row_bytes is not None:
        bits = [nats / math.log(2) for nats in nll]
        figures["bits_per_byte"] = of_ratio(bits, found.row_bytes, "bytes")
    return {
        name: Figure(estimates[name], figure.rows, figure.on) for name, figure in figures.items()
    }


def difference(after: Figure, before: Figure) -> Estimate:
    """How much larger a figure is for one model than for another on the same rows.

    Args:
        after: the one's.
        before: the other's.

    Returns:
        after − before, its interval that of the difference: one that leaves out 0 is a difference
        the rows can tell.

    Raises:
        ValueError: other numbers of rows.

    Ref:
        Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4.
    """
    import numpy as np

    if after.rows != before.rows:
        raise ValueError(f"pairs need as many rows of each; got {after.rows} and {before.rows}")

    def on(draw: Any) -> float:
        return after.on(draw) - before.on(draw)

    if "jackknife" in (after.estimate.method, before.estimate.method):
        every = np.arange(after.rows)
        without = [on(np.delete(every, row)) for row in every] if after.rows > 1 else []
        return jackknife(on(every), without, count=after.rows)
    return bootstrap(after.rows, on)


def differences(after: Mapping[str, Figure], before: Mapping[str, Figure]) -> dict[str, Estimate]:
    """`difference` of each figure that both have, by name."""
    return {name: difference(after[name], before[name]) for name in after if name in before}
