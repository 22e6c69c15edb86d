"""Verdicts follow from figures: every outcome, on made-up figures."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.estimate import Estimate

ENDS = st.floats(-5, 5).map(lambda x: round(x, 3))


@pytest.fixture(scope="module")
def claim(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("papers.claim")


def between(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, 3, low, high, "seeds")


@pytest.mark.parametrize(
    ("low", "high", "expects", "margin", "verdict"),
    [
        (-2, -1, "below", 0, "agrees"),
        (1, 2, "below", 0, "disagrees"),
        (-1, 2, "below", 0, "undecided"),
        (0, 1, "below", 0, "undecided"),  # zero itself is no difference
        (1, 2, "above", 0, "agrees"),
        (-2, -1, "above", 0, "disagrees"),
        (-2, 1, "above", 0, "undecided"),
        (-1, 0, "above", 0, "undecided"),
        (-0.5, 0.4, "within", 1, "agrees"),
        (1.5, 2, "within", 1, "disagrees"),
        (-2, -1.5, "within", 1, "disagrees"),
        (0.5, 2, "within", 1, "undecided"),
        (-9, 9, "within", 1, "undecided"),  # a wide interval shows nothing, not "no difference"
        (0.2, 0.4, "within", 1, "agrees"),  # a difference, and too small to count
        (math.nan, math.nan, "below", 0, "undecided"),  # a single seed
        (math.nan, math.nan, "within", 1, "undecided"),
    ],
)
def test_the_interval_decides(
    claim: ModuleType, low: float, high: float, expects: str, margin: float, verdict: str
) -> None:
    assert claim.Check("x", between(low, high), expects, margin).verdict == verdict


@given(one=ENDS, other=ENDS)
def test_above_is_below_seen_from_the_other_side(
    claim: ModuleType, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    below = claim.Check("x", between(low, high), "below").verdict
    assert below == claim.Check("x", between(-high, -low), "above").verdict


@given(one=ENDS, other=ENDS, wider=st.floats(0, 3))
def test_a_wider_interval_never_turns_a_verdict_round(
    claim: ModuleType, one: float, other: float, wider: float
) -> None:
    low, high = sorted((one, other))
    for expects, margin in (("below", 0), ("above", 0), ("within", 1)):
        narrow = claim.Check("x", between(low, high), expects, margin).verdict
        wide = claim.Check("x", between(low - wider, high + wider), expects, margin).verdict
        assert wide in (narrow, "undecided")


def test_a_margin_goes_with_within_alone(claim: ModuleType) -> None:
    with pytest.raises(ValueError, match="x: a margin above 0 goes with expects='within'"):
        claim.Check("x", between(0, 1), "below", 0.5)
    with pytest.raises(ValueError, match="got expects='within', margin=0"):
        claim.Check("x", between(0, 1), "within")


@pytest.mark.parametrize(
    ("verdicts", "together"),
    [
        ("aaa", "agrees"),
        ("aua", "undecided"),
        ("uuu", "undecided"),
        ("aud", "disagrees"),
        ("ddd", "disagrees"),
        ("", "undecided"),  # nothing was compared
    ],
)
def test_checks_decide_together(claim: ModuleType, verdicts: str, together: str) -> None:
    assert claim.Finding([], made(claim, verdicts)).verdict == together


def made(claim: ModuleType, verdicts: str) -> list[Any]:
    ends = {"a": (-2, -1), "u": (-1, 1), "d": (1, 2)}
    return [
        claim.Check(f"{letter}{place}", between(*ends[letter]), "below")
        for place, letter in enumerate(verdicts)
    ]


def test_reasons_name_first_what_decided(claim: ModuleType) -> None:
    found = claim.Finding([], made(claim, "aaaaud"))
    assert [reason[:2] for reason in found.reasons] == ["d5", "u4", "a0", "a1", "an"]
    assert found.reasons[0] == "d5 = 1.5 [1, 2] (3 seeds), expected below 0: disagrees"
    assert found.reasons[-1] == "and 2 more, of which 2 agree"
    assert found.why.startswith("d5 = 1.5 [1, 2] (3 seeds), expected below 0: disagrees; u4 = 0")
    assert len(claim.Finding([], made(claim, "aaaa")).reasons) == 4
    within = claim.Check("x", between(0, 1), "within", 0.5)
    assert str(within).endswith("expected within ±0.5: undecided")


def student_cdf(t: float, freedom: int) -> float:
    """P(T ≤ t) by integrating the density."""
    x = np.linspace(0, t, 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    return 0.5 + float(np.trapezoid(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), x))


def test_the_table_of_t_is_that_of_the_distribution(claim: ModuleType) -> None:
    for freedom, t in enumerate(claim.T_975, 1):
        assert student_cdf(t, freedom) == pytest.approx(0.975, abs=2e-5)


def test_over_seeds_is_paired_and_has_students_interval(claim: ModuleType) -> None:
    found = claim.over_seeds([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert (found.value, found.count, found.method) == (2.0, 3, "student")
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    # seeds that differ by 100 and pairs that differ by 1: the pairs count
    paired = claim.over_seeds([1.0, 101.0, 201.1], [0.0, 100.0, 200.0])
    assert paired.value == pytest.approx(1 + 0.1 / 3)
    assert paired.high - paired.low < 0.5
    alone = claim.over_seeds([1.0], [3.0])
    assert alone.value == -2
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


@given(st.lists(ENDS, min_size=2, max_size=10), st.floats(-3, 3))
def test_over_seeds_moves_with_its_figures(
    claim: ModuleType, figures: list[float], by: float
) -> None:
    one, other = claim.over_seeds(figures), claim.over_seeds([x + by for x in figures])
    assert other.low == pytest.approx(one.low + by, abs=1e-9)
    assert other.high == pytest.approx(one.high + by, abs=1e-9)
    assert one.low <= one.value <= one.high


def test_seeds_that_cannot_be_compared(claim: ModuleType) -> None:
    for after, before in (([], None), ([1.0, 2.0], [1.0]), ([0.0] * 11, None)):
        with pytest.raises(ValueError, match=f"from 1 to 10 seeds.*got {len(after)} and"):
            claim.over_seeds(after, before)
    for seeds in ((), (1, 1), tuple(range(11))):
        with pytest.raises(
            ValueError, match="seeds must be 1 to 10 different numbers: " + re.escape(str(seeds))
        ):
            claim.Settings(model=Path("m"), out=Path("o"), seeds=seeds)
