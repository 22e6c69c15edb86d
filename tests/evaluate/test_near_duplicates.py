"""Near duplicates: the plain double loop's answer, with ROUGE's own figure, and what is not one."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate import near_duplicates
from lora_core.evaluate.near_duplicates import NearDuplicates, similarity, words_of
from lora_core.evaluate.rouge import rouge_row

WORDS = st.lists(st.sampled_from("abcdef"), max_size=9).map(" ".join)


def f1(a: str, b: str) -> float:
    """ROUGE-L of this library's own metric."""
    return rouge_row(a, [b], ["rougeL"])["rougeL"].f1


def alike(a: str, b: str, threshold: float) -> bool:
    return a == b or round(f1(a, b), 12) >= round(threshold, 12)


def by_double_loop(rows: Sequence[tuple[str, str]], threshold: float) -> list[str | None]:
    """Every row against every kept one, with nothing left out."""
    kept: list[tuple[str, str]] = []
    found: list[str | None] = []
    for row in rows:
        if row in kept:
            found.append("duplicate")
        elif any(all(map(alike, row, other, [threshold] * 2)) for other in kept):
            found.append("near duplicate")
        else:
            found.append(None)
            kept.append(row)
    return found


def by_class(rows: Sequence[tuple[str, str]], threshold: float) -> list[str | None]:
    kept = NearDuplicates(threshold)
    found = []
    for row in rows:
        found.append(kept.found(*row))
        if found[-1] is None:
            kept.keep(*row)
    assert len(kept) == found.count(None)
    return found


@given(WORDS, WORDS)
def test_the_figure_is_rouge_l(a: str, b: str) -> None:
    if a or b:
        assert similarity(a, b) == pytest.approx(f1(a, b), abs=1e-12)
    assert similarity(a, b) == similarity(b, a)
    assert similarity(a, a) == 1


@given(
    st.lists(st.tuples(st.sampled_from(["a b c", "a b d", "e"]), WORDS.filter(bool)), max_size=14),
    st.sampled_from([0.3, 0.5, 2 / 3, 0.7, 1.0]),
)
def test_what_is_dropped_is_what_the_double_loop_drops(
    rows: list[tuple[str, str]], threshold: float
) -> None:
    assert by_class(rows, threshold) == by_double_loop(rows, threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_many_rows_and_long_ones(threshold: float) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(1, 40))) for _ in range(60)]
    for text in texts[:40]:  # and variants of them, near the threshold
        words = text.split()
        for _ in range(draw.randint(0, max(len(words) // 2, 1))):
            words[draw.randrange(len(words))] = draw.choice("xyz")
        texts.append(" ".join(words))
    rows = [("the same question", text) for text in texts]
    found = by_class(rows, threshold)
    assert found == by_double_loop(rows, threshold)
    assert 3 < found.count("near duplicate") < 100


def test_few_pairs_get_as_far_as_the_subsequence(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    real = near_duplicates.lcs_length

    def counted(a: Sequence[str], b: Sequence[str]) -> int:
        calls.append(None)
        return real(a, b)

    monkeypatch.setattr(near_duplicates, "lcs_length", counted)
    rows = [("ask", " ".join(f"w{number}{place}" for place in range(20))) for number in range(100)]
    assert by_class(rows, 0.7) == [None] * 100
    assert len(calls) < 50, "of 4950 pairs"


def test_words_of_any_script_and_signs_tell_texts_apart() -> None:
    assert words_of("Größe x_1 是否。") == ["größe", "x", "_", "1", "是", "否", "。"]
    kept = NearDuplicates(0.7)
    kept.keep("ask", "return x + 1")
    kept.keep("ask", "да, конечно")
    kept.keep("ask", "是这样的")
    assert kept.found("ask", "return x - y") is None
    assert kept.found("ask", "нет, никогда") is None
    assert kept.found("ask", "不可能吧") is None
    assert kept.found("ask", "Да , КОНЕЧНО") == "near duplicate"
    assert kept.found("ask", "是这样的!") == "near duplicate"


def test_the_same_answer_to_another_prompt_is_another_row() -> None:
    kept = NearDuplicates(0.7)
    kept.keep("Is two an even number?", "yes")
    assert kept.found("Who wrote the book of sand?", "yes") is None
    assert kept.found("Is two an even number ?", "yes") == "near duplicate"
    assert kept.found("Is two an even number?", "yes") == "duplicate"
    assert kept.found("Is two an even number?", "no") is None


def test_at_the_threshold_a_row_repeats() -> None:
    kept = NearDuplicates(0.7)
    kept.keep("ask", "a b c d e f g h i j")
    assert kept.found("ask", "a b c d e f g x y z") == "near duplicate", "2 * 7 / 20 = 0.7"
    assert kept.found("ask", "a b c d e f v x y z") is None


def test_without_a_threshold_exact_duplicates_alone_are_dropped() -> None:
    exact, same_words = NearDuplicates(0), NearDuplicates(1)
    for kept in (exact, same_words):
        kept.keep("ask", "An answer")
        assert kept.found("ask", "An answer") == "duplicate"
        assert kept.found("ask", "An answer!") is None
    assert exact.found("ask", "an  answer") is None
    assert same_words.found("ask", "an  answer") == "near duplicate"


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"dedupe must be in \(0, 1\], or 0 for exact duplicates"):
        NearDuplicates(threshold)
