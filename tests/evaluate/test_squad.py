"""Exact match and F1 against the definition written out, and against facts of SQuAD's scripts."""

import re
import string
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.squad import exact, exact_match, f1, f1_score, normalize_answer

PIECES = [
    "the",
    "The",
    "a",
    "an",
    "THE",
    "cat",
    "Cat",
    "sat",
    ".",
    "!",
    "'s",
    "-",
    "“",
    "é",
    "the.",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map(" ".join),
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(max_size=10),
    st.text(alphabet="athen .,!\t\n\u200b\u0301今\ud800", max_size=12),
)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a theatre, an anthem; the a", "theatre anthem"),
        ("don't", "dont"),
        ("1,000.5", "10005"),
        ("well-known", "wellknown"),
        ("U.S.A.", "usa"),  # punctuation goes first, or "A" would be an article
        ("the-end", "theend"),
        ("“quoted” — dash", "“quoted” — dash"),  # ASCII punctuation alone
        ("thé the", "thé"),  # é is of the word
        ("the\u0301", "\u0301"),  # a combining mark is not, as Python's \b has it
        ("今日は、いい", "今日は、いい"),
        ("\u200bthe\u200b", "\u200b \u200b"),
        ("a\x00an", "\x00"),
        ("İ", "i̇"),
        ("\u3000tab\t\nline\x1f", "tab line"),
        ("\ud800 the", "\ud800"),
        ("", ""),
        (" The! ", ""),
    ],
)
def test_normalization(text: str, bare: str) -> None:
    assert normalize_answer(text) == bare


def slow_normalize(text: str) -> str:
    """By the definition, a character and a word at a time."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    words, word = [], ""
    for character in kept + " ":
        if re.match(r"\w", character):
            word += character
            continue
        words += [" " if word in ("a", "an", "the") else word, character]
        word = ""
    out = ""
    for character in "".join(words):
        space = character.isspace()
        out += " " if space and not out.endswith(" ") else "" if space else character
    return out.strip(" ")


def slow_f1(prediction: str, reference: str) -> float:
    said, right = slow_normalize(prediction).split(), slow_normalize(reference).split()
    if not said or not right:
        return 1.0 if said == right else 0.0
    left, shared = list(right), 0
    for word in said:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(right)
    return 2 * precision * recall / (precision + recall)


@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_rows_against_the_definition(prediction: str, references: list[str]) -> None:
    assert normalize_answer(prediction) == slow_normalize(prediction)
    said = slow_normalize(prediction)
    assert exact(prediction, references) == any(said == slow_normalize(r) for r in references)
    best = max(slow_f1(prediction, r) for r in references)
    assert f1(prediction, references) == pytest.approx(best, abs=1e-15)
    assert f1(prediction, references) >= exact(prediction, references)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("the cat sat", ["cat"], 2 / 3),
        ("cat cat dog", ["cat dog dog"], 2 / 3),  # each word as often as both have it
        ("cat cat", ["cat cat dog"], 4 / 5),
        ("dog", ["cat", "a dog", "dog house"], 1.0),
        ("", [""], 1.0),
        ("the", [""], 1.0),  # nothing is left of it
        ("", ["cat"], 0.0),
        ("cat", [""], 0.0),
        ("", ["cat", ""], 1.0),
        ("cat", ["", "the cat"], 1.0),
    ],
)
def test_f1_of_a_row(prediction: str, references: list[str], score: float) -> None:
    assert f1(prediction, references) == pytest.approx(score)
    assert exact(prediction, references) is (score == 1.0)


def test_a_corpus() -> None:
    predictions = ["The cat.", "dog house", "", "no idea"]
    references = [["cat"], ["dog", "a big dog"], [""], ["", "unknown"]]
    matched = exact_match(predictions, references)
    assert (matched.value, matched.count, matched.method) == (0.5, 4, "wilson")
    overlap = f1_score(predictions, references)
    assert overlap.value == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert (overlap.count, overlap.method) == (4, "bootstrap")
    assert overlap.low < overlap.value < overlap.high


def test_very_long_answers() -> None:
    words = [f"w{i}" for i in range(50_000)]
    assert f1(" ".join(words), [" ".join(words[::2])]) == pytest.approx(2 / 3)
    assert exact("the " * 50_000 + "End.", ["end"])


def test_every_space_of_unicode_parts_words() -> None:
    spaces = [chr(c) for c in range(0x3001) if unicodedata.category(chr(c)) == "Zs"]
    for space in spaces:
        assert normalize_answer(f"one{space}the{space}two") == "one two"


SCORES: list[Callable[..., Any]] = [exact_match, f1_score]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        (["a", "b"], [["a"]], ValueError, "^2 predictions and references for 1 rows: each"),
        (["a"], [["a"], ["b"]], ValueError, "^1 predictions and references for 2 rows"),
        (["a", "b"], [["a"], []], ValueError, r'^references\[1\] is empty: .* has \[""\]$'),
        ([], [], ValueError, "^predictions is empty: there is nothing to measure$"),
        ("ab", [["a"], ["b"]], TypeError, "^predictions must be a list of strings; got the str"),
        (["a"], "a", TypeError, "^references must be one list a row; got the string 'a'$"),
        (["a", "b"], ["a", "b"], TypeError, r"^references\[0\] must be a list of strings; got the"),
        (["a", None], [["a"], ["b"]], TypeError, r"^predictions\[1\] must be a string; got None"),
        (["a"], [[1]], TypeError, r"^references\[0\]\[0\] must be a string; got int$"),
        (["a"], [{"a": 1}], TypeError, r"^references\[0\] must be a list of strings; got dict$"),
        (iter(["a"]), [["a"]], TypeError, "^predictions must be a list of strings; got list_it"),
    ],
)
def test_errors(
    score: Callable[..., Any], predictions: Any, references: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        score(predictions, references)


@pytest.mark.parametrize("row", [exact, f1])
def test_errors_of_a_row(row: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^references is empty: a row whose right answer"):
        row("a", [])
    with pytest.raises(TypeError, match=r"^references must be a list of strings; got the str"):
        row("a", "a")
