"""ROUGE by its definition; tests/oracles holds it against rouge-score."""

import random
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.lcs import lcs_length, lcs_places
from lora_core.evaluate.rouge import _stemmer, rouge, rouge_row

WORDS = st.lists(st.sampled_from("abcd"), max_size=9)


def longest(a: list[str], b: list[str]) -> int:
    """The longest common subsequence by trying all of a's, longest first."""
    for size in range(len(a), 0, -1):
        for picked in combinations(a, size):
            rest = iter(b)
            if all(word in rest for word in picked):
                return size
    return 0


@given(a=WORDS, b=WORDS)
def test_the_subsequence_against_trying_all(a: list[str], b: list[str]) -> None:
    length = longest(a, b)
    assert lcs_length(a, b) == lcs_length(b, a) == length
    places = lcs_places(a, b)
    assert len(places) == length
    assert places == sorted(set(places))
    rest = iter(b)
    assert all(a[place] in rest for place in places)


def table_length(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


@pytest.mark.parametrize("kinds", [2, 30, 2000])
def test_the_subsequence_of_longer_texts(kinds: int) -> None:
    """Past the 30 and 64 bits that a machine adds at once, and with carries over many of them."""
    generator = random.Random(kinds)
    for m, n in ((29, 31), (64, 65), (300, 211), (200, 500)):
        a, b = ([f"w{generator.randrange(kinds)}" for _ in range(k)] for k in (m, n))
        assert lcs_length(a, b) == table_length(a, b)
    assert lcs_length(["a"] * 200, ["a"] * 130) == 130
    assert lcs_length([], ["a"]) == lcs_length(["a"], []) == lcs_length([], []) == 0


def test_the_subsequence_of_20_000_words_each() -> None:
    """4·10⁸ cells of the table; the answer is known by how the texts are made."""
    generator = random.Random(0)
    shared = [f"s{generator.randrange(50)}" for _ in range(5_000)]

    def scattered(own: str) -> list[str]:
        places = set(generator.sample(range(20_000), len(shared)))
        words: Iterator[str] = iter(shared)
        return [
            next(words) if place in places else f"{own}{generator.randrange(50)}"
            for place in range(20_000)
        ]

    a, b = scattered("a"), scattered("b")
    assert lcs_length(a, b) == len(shared)
    found = rouge_row(" ".join(a), [" ".join(b)], ["rougeL"])["rougeL"]
    assert found == (0.25, 0.25, 0.25)


def test_facts() -> None:
    text, right = "The cat sat on the mat!", "A cat sat; the mat is the mat."
    found = rouge_row(text, [right])
    assert found["rouge1"].precision == 5 / 6  # cat sat the the mat, of 6
    assert found["rouge1"].recall == 5 / 8
    assert found["rouge2"].precision == 2 / 5  # cat sat, the mat
    assert found["rougeL"].precision == 4 / 6  # cat sat the mat
    assert found["rougeL"].f1 == pytest.approx(2 * 4 / 14)


def test_the_best_reference_by_f1_gives_all_three_figures() -> None:
    wide, near = "cat " + "x " * 20 + "dog", "cat"
    found = rouge_row("cat dog", [wide, near], ["rouge1"])["rouge1"]
    assert found == (0.5, 1.0, 2 / 3)
    found = rouge_row("a b", ["a x", "b"], ["rouge1", "rougeL"])
    assert found["rouge1"] == (0.5, 1.0, 2 / 3)


def test_of_equal_references_the_first_counts() -> None:
    one, two = "a b c d", "a"  # F1 of "a b" against both: 2/3, P and R the other way round
    assert rouge_row("a b", [one, two], ["rouge1"])["rouge1"][:2] == (1.0, 0.5)
    assert rouge_row("a b", [two, one], ["rouge1"])["rouge1"][:2] == (0.5, 1.0)


def test_sentences() -> None:
    """Lin 2004, section 3.2: reference w1…w5; sentences w1 w2 w6 w7 w8 and w1 w3 w8 w9 w5."""
    found = rouge_row("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", ["w1 w2 w3 w4 w5"], ["rougeLsum"])
    assert found["rougeLsum"].recall == 4 / 5
    assert found["rougeLsum"].precision == 4 / 10


def test_words_of_other_scripts_are_none() -> None:
    for text in ("今日は。", "مرحبا", "👍", "\u200b", "\ud800", "", " \n"):
        assert rouge_row(text, [text], ["rouge1", "rougeL", "rougeLsum"]) == dict.fromkeys(
            ("rouge1", "rougeL", "rougeLsum"), (0.0, 0.0, 0.0)
        )
    assert rouge_row("caf\u00e9", ["caf"], ["rouge1"])["rouge1"].f1 == 1.0
    assert rouge_row("1,000.5", ["5 000 1"], ["rouge1"])["rouge1"].f1 == 1.0


def test_a_corpus() -> None:
    found = rouge(["a b", "c", ""], [["a b"], ["d", "c d"], ["e"]], ["rouge1"])
    assert list(found) == ["rouge1"]
    scores = found["rouge1"]
    assert scores.precision.value == pytest.approx((1 + 1 + 0) / 3)
    assert scores.recall.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores.f1.value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (scores.f1.count, scores.f1.method) == (3, "bootstrap")
    assert list(rouge(["a"], [["a"]])) == ["rouge1", "rouge2", "rougeL"]


def test_stems() -> None:
    pytest.importorskip("nltk")
    text, right = "running cats flies", "runs cat fly"
    assert rouge_row(text, [right], ["rouge1"])["rouge1"].f1 == 0.0
    # "runs" and "flies" are stemmed; "cat" and "fly" are short, "cats" loses its s, fli is not fly
    found = rouge_row(text, [right], ["rouge1"], stem=True)["rouge1"]
    assert found.f1 == pytest.approx(2 / 3)


def test_stems_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    _stemmer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(ImportError, match=r"^stem=True needs nltk \(pip install 'lora-core\[eva"):
        rouge(["a"], [["a"]], stem=True)
    assert rouge(["a"], [["a"]])["rougeL"].f1.value == 1.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rouge(["a"], [["a"]], ["rougeW"]),
            ValueError,
            "^kinds must be of rouge1 … rouge9, rougeL, rougeLsum; got 'rougeW'$",
        ),
        (lambda: rouge(["a"], [["a"]], ["rouge0"]), ValueError, "^kinds must be of .* 'rouge0'$"),
        (lambda: rouge(["a"], [["a"]], []), ValueError, "^kinds is empty: name one"),
        (
            lambda: rouge(["a"], [["a"]], "rougeL"),
            TypeError,
            "^kinds must be a list of names; got the string 'rougeL'$",
        ),
        (lambda: rouge(["a", "b"], [["a"]]), ValueError, "^2 predictions and references for 1 row"),
        (lambda: rouge(["a", "b"], [["a"], []]), ValueError, r"^references\[1\] is empty"),
        (lambda: rouge(["a"], ["a"]), TypeError, r"^references\[0\] must be a list of strings"),
        (lambda: rouge_row("a", "a"), TypeError, "^references must be a list of strings; got the"),
        (lambda: rouge_row("a", []), ValueError, "^references is empty"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
