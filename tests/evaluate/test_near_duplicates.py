"""Near duplicates: the figure is ROUGE-L's, and the bound before it loses none."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate import rouge_row
from lora_core.evaluate.near_duplicates import NearDuplicates, similarity, words_of

WORDS = st.lists(st.sampled_from(["a", "bb", "c", "dd", "e1", "f"]), min_size=1, max_size=12).map(
    " ".join
)


@given(WORDS, WORDS)
def test_on_plain_words_it_is_rouge_l(a: str, b: str) -> None:
    assert similarity(a, b) == pytest.approx(rouge_row(a, [b], ["rougeL"])["rougeL"].f1)


def test_signs_and_other_scripts_are_words() -> None:
    assert similarity("x + 1", "x - 1") == pytest.approx(2 / 3)
    assert words_of("Ürün_1 好吗") == ["ürün", "_", "1", "好", "吗"]
    assert similarity("你好", "再见") == 0
    assert similarity("", "") == 1
    assert similarity("", "a") == 0


def kept(rows: list[tuple[str, str]], threshold: float) -> list[int]:
    """The definition: each row against every kept one."""
    found: list[int] = []
    for number, (prompt, answer) in enumerate(rows):
        if not any(
            rows[other] == (prompt, answer)
            or min(similarity(prompt, rows[other][0]), similarity(answer, rows[other][1]))
            > threshold
            for other in found
        ):
            found.append(number)
    return found


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9])
def test_the_bounds_lose_no_duplicate(threshold: float) -> None:
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(30)]  # more rows than the first room for counts
    rows = [
        (draw.choice(["p q r", "p q s", "z"]), " ".join(draw.choices(vocabulary[:6], k=size)))
        for size in (draw.randint(0, 7) for _ in range(200))
    ]
    pool, found = NearDuplicates(threshold), []
    for number, row in enumerate(rows):
        if pool.found(*row) is None:
            pool.keep(*row)
            found.append(number)
    assert found == kept(rows, threshold)
    assert 0 < len(found) < len(rows)


def test_the_same_answer_to_another_prompt_is_no_duplicate() -> None:
    pool = NearDuplicates(0.7)
    pool.keep("Is 3 odd?", "yes it is")
    assert pool.found("Is 3 odd?", "yes it is") == "duplicate"
    assert pool.found("Is 3 odd?", "yes it is!") == "near duplicate"
    assert pool.found("Where does the sun set?", "yes it is") is None
    off = NearDuplicates(1)
    off.keep("a", "yes it is")
    assert off.found("a", "yes it is!") is None
    assert off.found("a", "yes it is") == "duplicate"
    assert len(off) == 1


@pytest.mark.parametrize("threshold", [0, 1.5, float("nan")])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match="dedupe must be above 0 and at most 1"):
        NearDuplicates(threshold)
