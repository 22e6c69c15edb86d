"""Examples for few-shot: drawn by the seed, and only such that fit."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.compare.shots import MOST, draw_shots
from lora_core.data import Tokenizer, load_tokenizer
from lora_core.evaluate.answering import prompt_of
from lora_core.evaluate.questions import Question


@pytest.fixture(scope="session")
def tok(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


def question(number: int, words: int, references: tuple[str, ...] = ("Yes.",)) -> Question:
    turn = {"role": "user", "content": " ".join(["word"] * words)}
    return Question(str(number), (turn,), references, f"f:{number}")


POOL = [question(n, 1 + n) for n in range(20)]
ASKED = [question(100, 3), question(101, 9)]


def longest(tok: Tokenizer, shots: list) -> int:
    return max(len(tok.encode_prompt(prompt_of(q, None, shots))) for q in ASKED)


@given(st.integers(60, 600), st.integers(1, 5), st.integers(0, 1000))
def test_what_is_drawn_fits_before_every_question(
    tok: Tokenizer, context: int, count: int, seed: int
) -> None:
    alone = longest(tok, [])
    shortest = sorted(longest(tok, [row.answered()]) - alone for row in POOL)
    options = {"context": context, "answer": 10, "count": count, "seed": seed}
    # so many rows are no longer than their share of the room
    short = sum(size <= (context - alone - 10) / count for size in shortest)
    if short < count:
        said = f"--shots {count} do not fit: the model has {context} positions"
        with pytest.raises(ValueError, match=said):
            draw_shots(POOL, ASKED, tok, **options)
        return
    found = draw_shots(POOL, ASKED, tok, **options)
    assert found is not None
    assert len(found) == count
    assert longest(tok, found) + 10 <= context
    assert all(shot[-1] == {"role": "assistant", "content": "Yes."} for shot in found)


def draw(tok: Tokenizer, context: int | None, seed: int = 0, count: int | None = None) -> list:
    found = draw_shots(POOL, ASKED, tok, context=context, answer=10, count=count, seed=seed)
    assert found is not None
    return found


def test_by_default_half_of_what_fits(tok: Tokenizer) -> None:
    alone = longest(tok, [])
    sizes = sorted(longest(tok, [row.answered()]) - alone for row in POOL)
    median = (sizes[9] + sizes[10]) / 2
    assert len(draw(tok, alone + 10 + int(6 * median) + 1)) == 3
    assert len(draw(tok, alone + 10 + int(2 * median) + 1)) == 1
    assert len(draw(tok, alone + 10 + sizes[0])) == 1
    assert len(draw(tok, None)) == MOST // 2
    none = draw_shots(
        POOL, ASKED, tok, context=alone + 10 + sizes[0] - 1, answer=10, count=None, seed=0
    )
    assert none is None


def test_the_seed_draws(tok: Tokenizer) -> None:
    assert draw(tok, None, 1) == draw(tok, None, 1)
    assert draw(tok, None, 1) != draw(tok, None, 2)


def test_what_cannot_be_drawn(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"at most \d+ fit, of the shortest"):
        draw(tok, 120, count=19)
    with pytest.raises(ValueError, match="not one fits"):
        draw(tok, 30, count=1)
    with pytest.raises(ValueError, match="--shots 21: the training data has 20 rows"):
        draw(tok, None, count=21)
    bare = [question(n, 2, ()) for n in range(3)]
    with pytest.raises(ValueError, match="whose rows have no answer"):
        draw_shots(bare, ASKED, tok, context=None, answer=1, count=1, seed=0)
