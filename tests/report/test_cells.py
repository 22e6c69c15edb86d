"""Numbers and text as a report shows them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.estimate import proportion
from lora_core.report import EstimateLike, estimate_text, number, visible
from lora_core.report.cells import value_and_interval

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (0.81254, "0.8125"),
        (12345.6, "12,346"),
        (-0.5, "-0.5"),
        (0.0000321, "3.21e-05"),
        (3.2e12, "3.2e+12"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ((0.8125, 0.7053, 0.8871), "0.81 [0.71, 0.89] (64 rows)"),
        ((27.79, 25.13, 30.41), "27.8 [25.1, 30.4] (64 rows)"),
        ((12345.6, 11111.1, 13333.3), "12,346 [11,111, 13,333] (64 rows)"),
        ((1.0, 1.0, 1.0), "1 [1, 1] (64 rows)"),
        ((0.5,), "0.5 (64 rows)"),
        ((0.5, 0.4999999999, 0.5000000001), "0.5 [0.5, 0.5] (64 rows)"),
        ((math.nan, 0.1, 0.2), "– (64 rows)"),
    ],
)
def test_an_estimate_is_rounded_by_its_interval(
    figure: Make, parts: tuple[float, ...], shown: str
) -> None:
    assert estimate_text(figure(*parts)) == shown


def test_shares_in_percent(figure: Make) -> None:
    half = figure(0.5, 0.412, 0.591)
    assert estimate_text(half, percent=True, count=False) == "50\u00a0% [41, 59]"


def test_the_evaluations_own_estimate_fits() -> None:
    mine = proportion(52, 64)
    assert isinstance(mine, EstimateLike)
    assert estimate_text(mine) == "0.81 [0.70, 0.89] (64 rows)"
    assert not isinstance(0.5, EstimateLike)
    assert not isinstance("0.5", EstimateLike)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e4), st.floats(0, 1))
def test_the_value_shown_stays_within_the_interval_shown(
    figure: Make, low: float, width: float, place: float
) -> None:
    high = low + width
    value, interval = value_and_interval(figure(low + place * width, low, high))
    ends = [float(end.replace(",", "")) for end in interval[1:-1].split(", ")]
    assert ends[0] <= float(value.replace(",", "")) <= ends[1]
    assert abs(ends[0] - low) <= 0.06 * width
    assert abs(ends[1] - high) <= 0.06 * width


def test_what_would_act_is_shown() -> None:
    assert visible("a\x00b") == "a‹U+0000›b"
    assert visible("\u202egpj.exe") == "‹U+202E›gpj.exe"
    assert visible("\x1b[31m\x7f\x85\u2028\ufeff") == (
        "‹U+001B›[31m‹U+007F›‹U+0085›‹U+2028›‹U+FEFF›"
    )
    assert visible("\ud800\ufffe\U0001ffff\ufdd0") == "‹U+D800›‹U+FFFE›‹U+1FFFF›‹U+FDD0›"
    assert visible("a\r\nb\rc\td") == "a\nb\nc\td"


@pytest.mark.parametrize("text", ["👨‍👩‍👧", "می‌خواهم", "שלום", "z\u0301", "❤\ufe0f", "plain <b>"])
def test_writing_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@given(st.text(st.characters(codec=None)))
def test_what_is_visible_is_allowed_in_a_file(text: str) -> None:
    shown = visible(text)
    shown.encode()  # no lone surrogate
    assert all(c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) for c in shown)
    assert not any(c in shown for c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
