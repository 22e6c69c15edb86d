"""Blind votes: hidden sides, every key, votes on disk at once, sittings continued, the tally."""

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data.records import parse_record
from lora_core.evaluate.blind import BlindTest, preference_rows, sign_test
from lora_core.evaluate.questions import Question

NAMES = ("tuned", "base")
QUESTIONS = [f"question {i}" for i in range(6)]
A = ["yes", "é ☃", "", "same", "long " * 5000, "right"]
B = ["no", "e\u0301 ☃", "nothing?", "same", "short", "left"]


def blind(out: Path, seed: int = 0, **options: Any) -> BlindTest:
    given = {"questions": QUESTIONS, "a": A, "b": B, "names": NAMES} | options
    questions, a, b = given.pop("questions"), given.pop("a"), given.pop("b")
    return BlindTest(questions, a, b, seed, out, **given)


def sit(test: BlindTest, keys: str) -> tuple[Any, str]:
    screen = io.StringIO()
    return test.run(io.StringIO(keys), screen), screen.getvalue()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_votes_become_preference_rows(tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    result, screen = sit(blind(out), "1\n2\nT\n s \nq\n")
    kept = rows(out)
    assert [row["id"] for row in kept] == ["1", "2", "3"]
    for i, row in enumerate(kept[:2]):
        # what was voted for is what stood under the number that was typed
        page = screen.split("── question ")[i + 1]
        under = {"1": page.split("── 1 ")[1], "2": page.split("── 2 ")[1]}
        assert under[str(i + 1)].split("\n")[1] == row["chosen"]
        assert row["prompt"] == QUESTIONS[i]
        names = dict(zip((A[i], B[i]), NAMES, strict=True))
        assert row["chosen_from"] == names[row["chosen"]]
        assert row["rejected_from"] == names[row["rejected"]]
        assert {row["chosen"], row["rejected"]} == {A[i], B[i]}
    tie = kept[2]
    assert tie == {
        "id": "3",
        "tie": True,
        "asked": QUESTIONS[2],
        "answers": {"tuned": "", "base": "nothing?"},
    }
    # neither kind trains a model by mistake
    with pytest.raises(ValueError, match="preference training"):
        parse_record(kept[0])
    with pytest.raises(ValueError, match="match no format"):
        parse_record(tie)
    assert preference_rows(out) == kept[:2]
    assert (result.wins + result.losses, result.ties) == (2, 1)
    assert (result.identical, result.left) == (1, 2)
    assert "(nothing)" in screen
    assert "question 1 of 5" in screen


def test_turns_become_message_lists(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]
    test = BlindTest([turns], ["x"], ["y"], 0, tmp_path / "v.jsonl")
    _, screen = sit(test, "1\n")
    (row,) = rows(tmp_path / "v.jsonl")
    assert row["chosen"][:-1] == row["rejected"][:-1] == turns
    assert {row["chosen"][-1]["content"], row["rejected"][-1]["content"]} == {"x", "y"}
    assert row["chosen"][-1]["role"] == "assistant"
    assert "prompt" not in row
    assert "system: Brief.\n\nuser: Hi" in screen
    again = BlindTest([turns], ["x"], ["y"], 0, tmp_path / "v.jsonl")
    assert again.result().left == 0


def test_names_are_hidden_and_sides_are_drawn(tmp_path: Path) -> None:
    count = 400
    questions = [str(i) for i in range(count)]
    options = {"questions": questions, "a": ["mine"] * count, "b": ["its"] * count}
    _, screen = sit(blind(tmp_path / "one.jsonl", seed=1, **options), "1\n" * count)
    shown = screen[: screen.index("votes for") if "votes for" in screen else -1]
    asked = shown[: shown.rindex("better: ")]
    assert not any(name in asked for name in NAMES)
    first = [row["chosen"] for row in rows(tmp_path / "one.jsonl")]
    assert 140 < first.count("mine") < 260  # 6 standard deviations of a fair coin
    # the draw repeats with its seed and changes with it
    for seed, same in ((1, True), (2, False)):
        out = tmp_path / f"{seed}.jsonl"
        sit(blind(out, seed=seed, **options), "1\n" * count)
        assert ([row["chosen"] for row in rows(out)] == first) is same
    # and does not tell by the pattern: no run of sides much longer than chance has
    longest = max(len(list(group)) for _, group in itertools.groupby(first))
    assert longest < 20


def test_a_key_that_means_nothing_is_asked_again(tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    _, screen = sit(blind(out), "3\n\n\x1b[A\nTuned\n１\n1\n")
    assert len(rows(out)) == 1
    assert screen.count("is none of 1, 2, t, s, q") == 5
    assert "\x1b" not in screen


def test_a_sitting_is_continued(tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    first, _ = sit(blind(out), "1\ns\n2\n")  # the input ends: as q
    assert first.left == 3
    with out.open("ab") as stream:
        stream.write(b'{"id": "5", "prompt": "que')
    second, screen = sit(blind(out), "t\n1\n2\n")
    assert "question 1 of 3" in screen
    assert [row["id"] for row in rows(out)] == ["1", "3", "2", "5", "6"]
    assert (second.left, second.ties, second.wins + second.losses) == (0, 1, 4)
    before = out.read_bytes()
    third, screen = sit(blind(out), "")
    assert third == second == blind(out).result()
    assert "better:" not in screen
    assert out.read_bytes() == before


def test_ctrl_c_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"

    class Keys(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            # the vote before this one is on disk already
            assert len(rows(out)) == "12t".index(line[0])
            return line

    out.touch()
    screen = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        blind(out).run(Keys("1\n2\nt\n"), screen)
    assert len(rows(out)) == 3
    assert "every vote so far is in the file" in screen.getvalue()


def test_votes_on_something_else_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    sit(blind(out), "1\nt\n2\n")
    before = out.read_bytes()
    for options in (
        {"a": ["another", *A[1:]]},
        {"b": [*B[:1], "another", *B[2:]]},
        {"questions": ["another", *QUESTIONS[1:]]},
        {"names": ("x", "base")},
        {"questions": QUESTIONS[:2], "a": A[:2], "b": B[:2]},
    ):
        with pytest.raises(ValueError, match=r"votes\.jsonl:[123]: a vote on another question, or"):
            blind(out, **options)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:1: a vote on another question"):
        blind(data)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: neither a pair nor a tie; keys are"):
        preference_rows(data)
    with pytest.raises(FileNotFoundError, match="no folder"):
        blind(tmp_path / "none" / "votes.jsonl")
    with pytest.raises(ValueError, match="6 questions and 1 answers of tuned"):
        blind(tmp_path / "new.jsonl", a=["x"])
    with pytest.raises(ValueError, match="names must be two different ones"):
        blind(tmp_path / "new.jsonl", names=("x", "x"))
    assert out.read_bytes() == before
    assert not (tmp_path / "new.jsonl").exists()


def test_answers_cannot_steer_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07 \x9b2J \u202eback\u2066 \r over"
    fine = "tab\tnew\nline 日本語\u3000👨\u200d👩 می\u200cخواهم"
    test = BlindTest([evil], [evil], [fine], 0, tmp_path / "v.jsonl")
    _, screen = sit(test, "1\n")
    assert not set(evil) & set("\x1b\x07\x9b\u202e\u2066\r") & set(screen)
    assert r"\x1b]0;title\x07 \x9b2J \u202eback\u2066 \r over" in screen
    assert fine in screen
    assert {rows(tmp_path / "v.jsonl")[0][k] for k in ("chosen", "rejected")} == {evil, fine}


def test_a_terminal_of_few_letters_still_votes(tmp_path: Path) -> None:
    raw = io.BytesIO()
    screen = io.TextIOWrapper(raw, encoding="ascii")
    result = blind(tmp_path / "v.jsonl").run(io.StringIO("1\n1\nq\n"), screen)
    assert result.wins + result.losses == 2
    assert rb"\u2603" in raw.getvalue()


def test_questions_of_a_file_name_the_votes(tmp_path: Path) -> None:
    questions = [Question("sum", "2+2", (), "f:1"), Question("ask", "why", (), "f:2")]
    out = tmp_path / "v.jsonl"
    sit(BlindTest(questions, ["4", "x"], ["5", "y"], 0, out), "1\n2\n")
    assert [row["id"] for row in rows(out)] == ["sum", "ask"]
    # in another order they are the same questions
    assert BlindTest(questions[::-1], ["x", "4"], ["y", "5"], 9, out).result().left == 0


def test_the_tally(tmp_path: Path) -> None:
    count = 10
    options = {
        "questions": [str(i) for i in range(count)],
        "a": ["mine"] * count,
        "b": ["its"] * count,
    }
    test = blind(tmp_path / "v.jsonl", **options)
    assert test.result().share is None
    assert "nothing is decided yet" in str(test.result())
    order = [test._sides(i)[0] for i in range(count)]  # 0: tuned stands first
    keys = ["2" if first else "1" for first in order[:8]] + [
        "1" if first else "2" for first in order[8:9]
    ]
    result, screen = sit(test, "\n".join([*keys, "t"]) + "\n")
    assert (result.wins, result.losses, result.ties, result.left) == (8, 1, 1, 0)
    assert result.share is not None
    assert (result.share.value, result.share.count) == (pytest.approx(8 / 9), 9)
    assert result.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert "tuned 8 : 1 base, 1 ties" in screen
    assert "sign test p = 0.0391" in screen


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_sign_test_is_the_binomial_tail(wins: int, losses: int) -> None:
    n = wins + losses
    expected = sum(
        math.comb(n, k) / 2**n for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses)
    )
    assert sign_test(wins, losses) == pytest.approx(expected)
    assert sign_test(wins, losses) == sign_test(losses, wins)


def test_the_sign_test_of_many_votes() -> None:
    assert sign_test(0, 0) == 1
    assert 0 < sign_test(0, 900) < 1e-250
    assert sign_test(3000, 3000) == 1
    with pytest.raises(ValueError, match="votes are counted from 0; got -1 and 2"):
        sign_test(-1, 2)
