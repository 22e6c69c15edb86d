"""Estimates: the figure, the count, and intervals that hold what they promise."""

import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.estimate import (
    Estimate,
    bootstrap,
    mean,
    paired_difference,
    proportion,
    ratio,
)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I,
        # method 3 (Wilson without continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (51, 64, 0.683, 0.877),  # the module's own example
    ],
)
def test_wilson_of_known_cases(successes: int, count: int, low: float, high: float) -> None:
    found = proportion(successes, count)
    assert (found.value, found.count) == (successes / count, count)
    digits = 3 if count == 64 else 4
    assert (round(found.low, digits), round(found.high, digits)) == (low, high)
    assert (found.method, found.level, found.unit) == ("wilson", 0.95, "rows")


@given(count=st.integers(1, 3000), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
def test_wilson_ends_solve_their_equation(count: int, share: float, level: float) -> None:
    """At either end the observed share is z standard errors away, the error being the end's."""
    from statistics import NormalDist

    successes = round(share * count)
    found = proportion(successes, count, level=level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        apart = abs(found.value - end)
        assert apart == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-7)
    other = proportion(count - successes, count, level=level)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)


def coverage(p: float, n: int) -> float:
    """How often Wilson's interval holds p, over all outcomes of n tries."""
    held = 0.0
    for k in range(n + 1):
        found = proportion(k, n)
        held += (found.low <= p <= found.high) * math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return held


@pytest.mark.parametrize("n", [5, 20, 50])
def test_wilson_holds_the_share_as_often_as_it_says(n: int) -> None:
    shares = np.linspace(0.005, 0.995, 199)
    found = [coverage(p, n) for p in shares]
    assert 0.94 < sum(found) / len(found) < 0.97
    assert min(found) > 0.8


def test_nothing_and_everything_are_exact() -> None:
    assert proportion(0, 7).low == 0.0
    assert proportion(7, 7).high == 1.0
    assert proportion(0, 7).high == pytest.approx(1 - proportion(7, 7).low, abs=1e-15)


def slow_bootstrap(rows: list[tuple[float, float]], level: float) -> tuple[float, float]:
    """The same draws, one by one, and the percentiles by interpolation in the sorted list."""
    draws = np.random.default_rng(0).integers(len(rows), size=(1000, len(rows)))
    found = []
    for draw in draws:
        picked = [rows[i] for i in draw]
        found.append(math.fsum(a for a, _ in picked) / math.fsum(b for _, b in picked))
    found.sort()
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        place = tail * 999
        whole = int(place)
        ends.append(found[whole] + (place - whole) * (found[min(whole + 1, 999)] - found[whole]))
    return ends[0], ends[1]


def test_the_bootstrap_against_one_written_out() -> None:
    generator = random.Random(0)
    rows = [(generator.gauss(2, 1), generator.randrange(1, 9)) for _ in range(30)]
    above, below = [a for a, _ in rows], [b for _, b in rows]
    ends = slow_bootstrap(rows, 0.9)
    found = ratio(above, below, level=0.9)
    assert found.value == pytest.approx(sum(above) / sum(below))
    assert (found.low, found.high) == pytest.approx(ends)
    assert found.count == 30
    assert ratio(above, below, unit="tokens").count == sum(below)

    ones = slow_bootstrap([(a, 1.0) for a in above], 0.95)
    found = mean(above)
    assert (found.low, found.high) == pytest.approx(ones)

    picked = np.array(rows)
    found = bootstrap(30, lambda draw: picked[draw, 0].sum() / picked[draw, 1].sum(), level=0.9)
    assert (found.low, found.high) == pytest.approx(ends)
    assert found.value == pytest.approx(sum(above) / sum(below))


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(1).normal(size=50)
    whole = mean(scores)
    monkeypatch.setattr("lora_core.evaluate.estimate._CELLS", 700)  # 14 resamples a block
    assert mean(scores) == whole


def test_the_bootstrap_holds_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = mean(generator.normal(5, 2, size=40), resamples=300)
        held += found.low <= 5 <= found.high
    assert 0.88 < held / 200 < 0.99  # 0.95 by its level; a little less at 40 rows


def test_pairs_are_told_apart_where_overlapping_intervals_are_not() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(0, 5, size=100)
    after = before + 0.5 + generator.normal(0, 0.2, size=100)
    found = paired_difference(after, before)
    assert found.value == pytest.approx(float((after - before).mean()))
    assert 0 < found.low < 0.5 < found.high
    assert mean(before).high > mean(after).low


def test_it_repeats_to_the_bit_and_follows_its_seed() -> None:
    scores = [0.1, 0.9, 0.4, 0.7, 0.2]
    assert mean(scores) == mean(scores)
    assert mean(scores, seed=1) != mean(scores)


def test_one_row_has_no_interval() -> None:
    for found in (mean([0.5]), bootstrap(1, lambda draw: 0.5), ratio([1], [2])):
        assert found.value == 0.5
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert str(found) == "0.5 (1 rows)"


def test_resamples_without_a_denominator_are_left_out() -> None:
    found = ratio([3.0, 0.0], [2.0, 0.0])
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)


def test_resamples_without_a_figure_are_left_out() -> None:
    """Of two rows, half the resamples have both, and only those have a figure here."""
    found = bootstrap(2, lambda draw: 1.5 if len(set(draw.tolist())) == 2 else math.nan)
    assert (found.value, found.low, found.high, found.count) == (1.5, 1.5, 1.5, 2)


def test_a_tie_counts_half() -> None:
    found = proportion(2.5, 5)
    assert found.value == 0.5
    assert found.low == pytest.approx(1 - found.high)
    assert proportion(2, 5).low < found.low < proportion(3, 5).low


def test_text_facts_and_other_scales() -> None:
    found = Estimate(0.5, 8, 0.25, 0.75, "tokens")
    assert str(found) == "0.5 [0.25, 0.75] (8 tokens)"
    scaled = found.map(lambda x: 100 * x)
    assert (scaled.value, scaled.low, scaled.high, scaled.count) == (50, 25, 75, 8)
    assert (scaled.unit, scaled.level, scaled.method) == ("tokens", 0.95, "bootstrap")
    facts = Estimate(math.inf, 1, math.nan, math.nan).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == {
        "value": None,
        "count": 1,
        "low": None,
        "high": None,
        "unit": "rows",
        "level": 0.95,
        "method": "bootstrap",
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(1, 0), "a share needs 0 ≤ successes ≤ count, count ≥ 1; got 1/0"),
        (lambda: proportion(3, 2), "a share needs .*; got 3/2"),
        (lambda: proportion(-1, 2), "a share needs .*; got -1/2"),
        (lambda: proportion(1, 2, level=1.0), "level must be between 0 and 1, .* got 1.0"),
        (lambda: mean([1.0, 2.0], level=95), "level must be between 0 and 1, .* got 95"),
        (lambda: mean([]), "no rows to take a figure over"),
        (lambda: bootstrap(0, lambda draw: 0.0), "no rows to take a figure over"),
        (lambda: bootstrap(3, lambda draw: 0.0, resamples=0), "resamples must be 1 or more; got 0"),
        (lambda: ratio([1.0], [1.0, 2.0]), r"as many of each; got \(1,\) and \(2,\)"),
        (lambda: ratio([1.0, 1.0], [0.0, 0.0]), "the denominators of 2 rows sum to 0"),
        (lambda: paired_difference([1.0], []), "pairs need as many of each; got 1 and 0"),
    ],
)
def test_errors(call: Callable[[], Estimate], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
