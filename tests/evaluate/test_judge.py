"""Judges: both orders, biased and broken ones, runs broken off; a model as a judge."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.data import load_tokenizer
from lora_core.evaluate.judge import pairwise, score_judge
from lora_core.evaluate.model_judge import JUDGE_PROMPT, model_judge
from lora_core.evaluate.questions import Question

QUESTIONS = ["q0", "q1", "q2", "q3"]
A = ["long one", "x", "same", "☃" * 9]
B = ["short", "longer", "same", ""]


def longer(prompt: Any, first: str, second: str) -> str:
    if len(first) == len(second):
        return "tie"
    return "first" if len(first) > len(second) else "second"


def test_the_better_answer_wins_wherever_it_stands() -> None:
    asked: list[tuple[str, str, str]] = []

    def judge(prompt: str, first: str, second: str) -> str:
        asked.append((prompt, first, second))
        return longer(prompt, first, second)

    found = pairwise(judge, QUESTIONS, A, B, names=("tuned", "base"))
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)
    assert (found.rate.value, found.rate.count, found.rate.unit) == (2.5 / 4, 4, "pairs")
    assert found.decided is not None
    assert (found.decided.value, found.decided.count) == (pytest.approx(2 / 3), 3)
    assert found.inconsistent is not None
    assert (found.inconsistent.value, found.inconsistent.count) == (0, 3)
    assert found.first_preferred is not None
    assert found.first_preferred.value == 0.5
    # equal answers are not asked about; every other pair is, in both orders
    assert asked == [
        pair for i in (0, 1, 3) for pair in ((QUESTIONS[i], A[i], B[i]), (QUESTIONS[i], B[i], A[i]))
    ]
    assert "tuned against base: win rate 0.625" in str(found)
    assert "2 won, 1 lost, 1 tied" in str(found)


def test_the_interval_keeps_its_width_where_all_is_one_way() -> None:
    count = 20
    found = pairwise(longer, [str(i) for i in range(count)], ["xx"] * count, ["x"] * count)
    assert (found.rate.value, found.rate.high) == (1, 1)
    assert 0.8 < found.rate.low < 0.85
    ties = pairwise(lambda *_: "tie", [str(i) for i in range(count)], ["x"] * count, ["y"] * count)
    assert ties.rate.value == 0.5
    assert ties.rate.low < 0.35
    assert (ties.decided, ties.first_preferred) == (None, None)


def test_a_judge_of_places_decides_nothing() -> None:
    found = pairwise(lambda *_: "first", QUESTIONS, A, B)
    assert (found.wins, found.losses, found.ties) == (0, 0, 4)
    assert found.rate.value == 0.5
    assert found.inconsistent is not None
    assert (found.inconsistent.value, found.inconsistent.count) == (1, 3)
    assert found.first_preferred is not None
    assert found.first_preferred.value == 1
    assert "verdict changed with the order: 1 [" in str(found)


def test_half_a_verdict_is_a_tie() -> None:
    """One order says tie, the other names a system: not consistent, so no win."""
    answers = iter(["first", "tie"])
    found = pairwise(lambda *_: next(answers), ["q"], ["x"], ["y"])
    assert (found.wins, found.ties, found.pairs[0].consistent) == (0, 1, False)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=8), st.integers(0, 99))
def test_naming_the_systems_the_other_way_round_turns_the_rate(
    pairs: list[tuple[str, str]], salt: int
) -> None:
    def judge(prompt: str, first: str, second: str) -> Any:
        return sum(map(ord, f"{salt}{first}\0{second}")) % 3

    questions = [str(i) for i in range(len(pairs))]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    one, other = pairwise(judge, questions, a, b), pairwise(judge, questions, b, a)
    assert one.rate.value == pytest.approx(1 - other.rate.value)
    assert one.rate.low == pytest.approx(1 - other.rate.high)
    assert (one.wins, one.ties) == (other.losses, other.ties)


@pytest.mark.parametrize(
    ("first", "second"),
    [("first", "second"), (" First\n", "SECOND"), (1, 2), ("1", "2")],
)
def test_spellings_of_verdicts(first: Any, second: Any) -> None:
    found = pairwise(lambda _, x, y: first if x == "good" else second, ["q"], ["good"], ["bad"])
    assert found.wins == 1


@pytest.mark.parametrize("tie", ["tie", 0, "0", "Draw", "equal"])
def test_spellings_of_ties(tie: Any) -> None:
    found = pairwise(lambda *_: tie, ["q"], ["good"], ["bad"])
    assert (found.ties, found.pairs[0].consistent) == (1, True)


NONSENSE = [None, "", "maybe", "a", "A", 3, -1, True, 1.0, math.nan, [], {"winner": 1}, "x" * 9999]


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_is_written_down_and_the_run_goes_on(value: Any, tmp_path: Path) -> None:
    def judge(prompt: str, first: str, second: str) -> Any:
        return value if prompt == "q1" else longer(prompt, first, second)

    questions = [Question(q, q, (), f"data.jsonl:{i + 1}") for i, q in enumerate(QUESTIONS)]
    found = pairwise(judge, questions, A, B, out=tmp_path / "v.jsonl")
    (error,) = found.errors
    assert error.startswith(f"data.jsonl:2: the judge returned {repr(value)[:60]}")
    assert "a verdict is 'first', 'second' or 'tie'" in error
    assert len(error) < 250
    assert (found.wins, found.losses, found.ties, found.rate.count) == (2, 0, 1, 3)
    assert "no verdict on 1 pairs; the first: data.jsonl:2" in str(found)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text("utf-8").splitlines()]
    assert [row["error"] for row in rows] == [None, error, None]


def test_a_judge_that_raises_is_asked_again_as_often_as_it_may() -> None:
    calls: list[str] = []

    def judge(prompt: str, first: str, second: str) -> str:
        calls.append(prompt)
        if prompt == "q1" and calls.count("q1") < 3:
            raise ConnectionError("no\x1b[2J answer\nfrom there")
        return longer(prompt, first, second)

    found = pairwise(judge, QUESTIONS, A, B, attempts=2)
    (error,) = found.errors
    assert error == (r"questions[1]: the judge raised ConnectionError: no\x1b[2J answer from there")
    calls.clear()
    assert pairwise(judge, QUESTIONS, A, B, attempts=3).errors == ()
    with pytest.raises(ValueError, match="attempts must be 1 or more; got 0"):
        pairwise(judge, QUESTIONS, A, B, attempts=0)


def test_a_judge_that_always_fails_is_an_error(tmp_path: Path) -> None:
    def judge(*_: Any) -> str:
        raise OSError("away")

    with pytest.raises(
        ValueError, match=r"failed on all 2 rows; the first: questions\[0\]: .*away"
    ):
        pairwise(judge, ["q", "r"], ["x", "y"], ["y", "x"])
    with pytest.raises(ValueError, match="failed on all 1 rows"):
        score_judge(judge, ["q"], ["x"])


def test_a_run_broken_off_is_continued(tmp_path: Path) -> None:
    out, asked = tmp_path / "verdicts.jsonl", []

    def judge(prompt: str, first: str, second: str) -> Any:
        asked.append(prompt)
        if prompt == "q3" and asked.count("q3") == 2:
            raise KeyboardInterrupt
        return "?" if prompt == "q0" else longer(prompt, first, second)

    with pytest.raises(KeyboardInterrupt):
        pairwise(judge, QUESTIONS, A, B, out=out)
    assert asked == ["q0", "q1", "q1", "q3", "q3"]
    with out.open("a") as stream:
        stream.write('{"key": "half a li')
    asked.clear()

    def mended(prompt: str, first: str, second: str) -> str:
        asked.append(prompt)
        return longer(prompt, first, second)

    found = pairwise(mended, QUESTIONS, A, B, out=out)
    # q1 stands; q0 had failed and q3 was not finished
    assert asked == ["q0", "q0", "q3", "q3"]
    assert found.errors == ()
    assert (found.wins, found.losses, found.ties) == (2, 1, 1)


def test_verdicts_are_kept_for_what_was_asked(tmp_path: Path) -> None:
    out, asked = tmp_path / "verdicts.jsonl", []

    def judge(prompt: str, first: str, second: str, **more: str) -> str:
        asked.append((prompt, more))
        return longer(prompt, first, second)

    def count(**options: Any) -> int:
        asked.clear()
        pairwise(judge, QUESTIONS, A, options.pop("b", B), out=out, **options)
        return len(asked)

    assert count() == 6
    assert count() == 0
    assert count(b=["other", *B[1:]]) == 2
    assert count(bound={"judge": "another"}) == 6
    assert count(references=["r"] * 4) == 6
    assert asked[0] == ("q0", {"reference": "r"})
    judge.settings = {"temperature": 1}  # type: ignore[attr-defined]
    assert count() == 6
    assert count() == 0
    rows = out.read_text("utf-8").splitlines()
    row = json.loads(rows[0])
    assert (row["prompt"], row["a"], row["b"]) == ("q0", A[0], B[0])
    broken = rows[0].replace('["first", "second"]', '["first", 7]')
    assert broken != rows[0]
    out.write_text(broken + "\n", "utf-8")
    del judge.settings  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"verdicts\.jsonl:1: not a verdict as it was written"):
        count()
    out.write_text('{"text": "my data"}\n')
    with pytest.raises(ValueError, match=r"jsonl:1: .* is no file of verdicts: write to another"):
        count()
    assert out.read_text() == '{"text": "my data"}\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "q"}, "questions must be a list; got one text"),
        ({"questions": []}, "there are no questions"),
        ({"a": ["x"]}, "2 questions and 1 answers of tuned"),
        ({"b": "xy"}, "base must be a list of answers; got one text"),
        ({"b": ["x", None]}, r"questions\[1\]: the answer of base must be a text; got NoneType"),
        ({"b": ["x", "\udc00"]}, r"questions\[1\]: the answer of base holds half of a surrogate"),
        ({"references": ["x"]}, "2 questions and 1 answers of references"),
        ({"names": ("x", "x")}, r"names must be two different ones; got \('x', 'x'\)"),
        ({"questions": [Question("1", "q", (), "f:1"), "r"]}, None),
        ({"questions": [Question("2", "q", (), "f:1"), "r"]}, "id '2' is that of f:1 too"),
    ],
)
def test_lists_that_do_not_belong_together(options: dict[str, Any], message: str | None) -> None:
    usual: dict[str, Any] = {
        "questions": ["q", "r"],
        "a": ["x", "y"],
        "b": ["y", "x"],
        "names": ("tuned", "base"),
    }
    given = usual | options
    questions, a, b = given.pop("questions"), given.pop("a"), given.pop("b")
    if message is None:
        assert pairwise(longer, questions, a, b, **given).ties == 2
        return
    with pytest.raises((ValueError, TypeError), match=message):
        pairwise(longer, questions, a, b, **given)


# --- marks ---


def test_marks(tmp_path: Path) -> None:
    marks: dict[str, Any] = {"w": 1, "x": 10.0, "y": 11, "z": "8", "n": math.nan, "t": True}
    answers, out = list(marks), tmp_path / "marks.jsonl"
    found = score_judge(
        lambda prompt, answer: marks[answer], list("qrstuv"), answers, scale=(1, 10), out=out
    )
    assert found.scores == (1, 10, None, None, None, None)
    assert (found.mean.value, found.mean.count) == (5.5, 2)
    assert [error.split(":")[0] for error in found.errors] == [
        f"questions[{i}]" for i in (2, 3, 4, 5)
    ]
    assert "returned 11: a mark is a number from 1 to 10" in found.errors[0]
    assert "no mark for 4 answers" in str(found)
    again = score_judge(lambda *_: 2, list("qrstuv"), answers, scale=(1, 10), out=out)
    assert again.scores == (1, 10, 2, 2, 2, 2)
    with pytest.raises(ValueError, match=r"from its least to its best mark; got \(1, 1\)"):
        score_judge(lambda *_: 2, ["q"], ["x"], scale=(1, 1))


# --- a model ---


class Letters(nn.Module):
    """Logits that know only the token before, so that log-likelihoods can be written down."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[list[int]] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.seen.append(input_ids[0].tolist())
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_judges_by_its_log_likelihoods(tokenizer_folder: Path, chat: bool) -> None:
    tok = load_tokenizer(tokenizer_folder)
    if not chat:
        tok.chat_template = None
    model = Letters(tok.vocab_size)
    judge = model_judge(model, tok)
    question = ({"role": "system", "content": "Brief."}, {"role": "user", "content": "{first}?"})
    margin = judge.margin(question, "{second} é", "☃ {question}", "{reference}")
    assert model.training
    shown, other = model.seen
    letters = [tok.encode(letter if chat else f" {letter}") for letter in "AB"]
    assert [shown[-len(letters[0]) :], other[-len(letters[1]) :]] == letters
    start = shown[: -len(letters[0])]
    assert start == other[: -len(letters[1])]
    expected = [
        sum(
            float(model.table[before].detach().double().log_softmax(0)[token])
            for before, token in zip([start[-1], *ends], ends, strict=False)
        )
        for ends in letters
    ]
    assert margin == pytest.approx(expected[0] - expected[1])
    text = tok.decode(start)
    for part in (
        "[Question]\nsystem: Brief.\n\nuser: {first}?\n\n[Reference answer]\n{reference}\n",
        "[Answer A]\n{second} é\n\n[Answer B]\n☃ {question}\n",
    ):
        assert part in text
    # such a model sees no text at all: it names one place whatever stands there
    found = pairwise(judge, ["q", "r"], ["x", "y"], ["y", "x"])
    assert found.inconsistent is not None
    assert found.inconsistent.value == 1
    assert judge(question, "x", "y") == ("first" if margin > 0 else "second")
    assert model_judge(model, tok, tie=abs(margin) + 1)(question, "x", "y") == "tie"


def test_a_model_that_reads_is_consistent(tokenizer_folder: Path) -> None:
    """A planted model: it likes the letter under whose heading the word "good" stands."""
    tok = load_tokenizer(tokenizer_folder)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            text = tok.decode(input_ids[0].tolist())
            logits = torch.zeros(1, input_ids.shape[1], tok.vocab_size)
            liked = "A" if text.index("good") < text.index("[Answer B]") else "B"
            logits[..., tok.encode(liked)[0]] = 5.0
            return SimpleNamespace(logits=logits)

    judge = model_judge(Reader(), tok)
    found = pairwise(judge, ["q", "r"], ["good", "bad"], ["bad", "good"])
    assert (found.wins, found.losses) == (1, 1)
    assert found.inconsistent is not None
    assert found.inconsistent.value == 0


def test_what_a_model_cannot_judge(tokenizer_folder: Path, small_decoder: Callable) -> None:
    tok = load_tokenizer(tokenizer_folder)
    model = small_decoder(vocab_size=tok.vocab_size, max_position_embeddings=600)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    judge = model_judge(model, tok)
    found = pairwise(judge, ["q", "r"], ["x", "word " * 600], ["y", "x"])
    assert len(found.errors) == 1
    assert "more than the judge's 600 positions" in found.errors[0]
    with pytest.raises(ValueError, match=r"the judge's prompt lacks \{second\}"):
        model_judge(model, tok, prompt=JUDGE_PROMPT.replace("{second}", ""))
    with pytest.raises(ValueError, match="tie must be 0 nats or more; got -1"):
        model_judge(model, tok, tie=-1)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="log-likelihoods are NaN"):
        judge("q", "x", "y")
