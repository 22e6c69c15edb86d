"""Distinct n-grams, repetition and self-BLEU against their definitions."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.bleu import sentence_bleu
from lora_core.evaluate.diversity import distinct, repetition, repetition_rows, self_bleu

TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "d."]), max_size=8).map(" ".join),
    min_size=2,
    max_size=5,
)


def runs(text: str, n: int) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def share(texts: list[str], n: int) -> float:
    every = [gram for text in texts for gram in runs(text, n)]
    return len(set(every)) / len(every) if every else math.nan


@given(texts=TEXTS, n=st.integers(1, 3))
def test_distinct_and_its_jackknife(texts: list[str], n: int) -> None:
    found = distinct(texts, n, tokenize="none")
    assert found.value == pytest.approx(share(texts, n), nan_ok=True)
    assert found.count == sum(len(runs(text, n)) for text in texts)
    assert (found.unit, found.method) == (f"{n}-grams", "jackknife")
    without = [share(texts[:i] + texts[i + 1 :], n) for i in range(len(texts))]
    left = [value for value in without if not math.isnan(value)]
    if not found.count or len(left) < 2:
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        return
    middle = sum(left) / len(left)
    error = math.sqrt((len(left) - 1) / len(left) * sum((x - middle) ** 2 for x in left))
    assert found.low == pytest.approx(max(0.0, found.value - 1.959963984540054 * error))
    assert found.high == pytest.approx(min(1.0, found.value + 1.959963984540054 * error))


def test_distinct_facts() -> None:
    assert distinct(["a b c", "a b d"], 1).value == 4 / 6
    assert distinct(["a b c", "a b d"], 2).value == 3 / 4
    assert distinct(["I do not know."] * 50, 1).value == 5 / 250
    assert distinct(["今日は", "今日も"], 1, tokenize="char").value == 4 / 6


def test_the_intervals_hold_what_more_such_texts_have(full_run: bool) -> None:
    """Over many samples the interval holds their mean figure about as often as it says."""
    generator = random.Random(0)
    weights = [1 / (k + 1) for k in range(500)]

    def sample() -> list[str]:
        sizes = [generator.randrange(3, 20) for _ in range(60)]
        return [
            " ".join(f"w{k}" for k in generator.choices(range(500), weights, k=size))
            for size in sizes
        ]

    found = [distinct(sample(), 1, tokenize="none") for _ in range(2000 if full_run else 80)]
    truth = sum(one.value for one in found) / len(found)
    held = sum(one.low <= truth <= one.high for one in found) / len(found)
    assert 0.88 < held < 1
    assert sum(one.high - one.low for one in found) / len(found) < 0.12


@given(texts=TEXTS, n=st.integers(1, 3))
def test_repetition(texts: list[str], n: int) -> None:
    shares = [1 - len(set(g)) / len(g) for g in (runs(text, n) for text in texts) if g]
    found = repetition(texts, n, tokenize="none")
    assert found.count == len(shares)
    assert found.unit == "texts"
    if not shares:
        assert math.isnan(found.value)
        return
    assert found.value == pytest.approx(sum(shares) / len(shares))
    if len(shares) > 1:
        assert found.low <= found.value + 1e-12
        assert found.value <= found.high + 1e-12


def test_repetition_facts() -> None:
    assert repetition(["a b c d " * 3]).value == 1 - 4 / 9
    assert repetition(["one two three four five", "a a a a a"]).value == 0.25
    shares = repetition_rows(["a b c d " * 3, "a b c"])
    assert shares[0] == 1 - 4 / 9
    assert math.isnan(shares[1])
    short = repetition(["a b c", ""])
    assert (str(short), short.count) == ("nan (0 texts)", 0)
    assert short.facts()["value"] is None
    assert str(distinct(["", "a"], 2)) == "nan (0 2-grams)"


@given(texts=TEXTS)
def test_self_bleu_is_bleu_against_all_others(texts: list[str]) -> None:
    scores = [sentence_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    found = self_bleu(texts)
    assert found.value == pytest.approx(sum(scores) / len(scores), rel=1e-12)
    assert found.count == len(texts)


def test_self_bleu_sees_sameness() -> None:
    assert self_bleu(["I do not know that."] * 3).value == pytest.approx(100)
    assert self_bleu(["a b c d", "e f g h"]).value == 0.0


def test_long_text() -> None:
    words = " ".join(f"w{i}" for i in range(30_000))
    assert distinct([words, words], 2).value == 0.5
    assert repetition([words]).value == 0.0


CALLS: list[Callable[..., Any]] = [lambda texts: distinct(texts, 1), repetition, self_bleu]


@pytest.mark.parametrize("call", CALLS)
def test_errors(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^texts must be a list of strings; got the string 'a b'$"):
        call("a b")
    with pytest.raises(TypeError, match=r"^texts\[1\] must be a string; got NoneType$"):
        call(["a", None])
    with pytest.raises(ValueError, match=r"^texts is empty: there is nothing to measure$"):
        call([])


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match=r"^n-grams need n ≥ 1; got 0$"):
        distinct(["a"], 0)
    with pytest.raises(ValueError, match=r"^tokenize must be one of 13a, char, intl, none; got"):
        repetition(["a"], tokenize="words")
    with pytest.raises(ValueError, match=r"^self-BLEU compares each text with the others; got one"):
        self_bleu(["a"])
