"""`lora-core evaluate` without a model: answers scored, judged in pairs, voted on."""

import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.cli import evaluate_model
from lora_core.cli.main import main

Run = Callable[..., tuple[int, str, str]]
QUESTIONS = [
    {
        "id": name,
        "messages": [
            {"role": "user", "content": f"{name}?"},
            {"role": "assistant", "content": said},
        ],
    }
    for name, said in (("one", "yes it is"), ("two", "no"), ("three", "a b c d e"))
]
JUDGES = """
def shorter(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) < len(second) else "second"
def raises(prompt, first, second):
    raise RuntimeError("the service is down")
def sometimes(prompt, first, second):
    if prompt[0]["content"] == "two?":
        return 42
    return shorter(prompt, first, second)
def leaves(prompt, first, second):
    raise SystemExit(0)
nonsense = lambda prompt, first, second: "perhaps"
number = 3
"""


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this opens a model."""
    monkeypatch.setattr(evaluate_model, "open_model", None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with questions, two systems' answers and a module of judges."""
    write(tmp_path / "data.jsonl", *QUESTIONS)
    a = {"one": "Yes, it is!", "two": "", "three": "a b c"}
    b = {"one": "it is not so", "two": "no", "three": "a b c"}
    for name, said in (("a", a), ("b", b)):
        write(tmp_path / f"{name}.jsonl", *({"id": k, "answer": v} for k, v in said.items()))
    (tmp_path / "judges_of_this_test.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the verb; gives exit code, output, errors."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["evaluate", *map(str, words)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


# --- scoring ---


def test_answers_meet_the_references_of_the_data(evaluate: Run) -> None:
    words = ["--answers", "a.jsonl", "--data", "data.jsonl", "--metrics", "exact,f1,repetition"]
    code, out, err = evaluate(*words, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["answers"], found["data"]) == ("a.jsonl", "data.jsonl")
    assert found["figures"]["exact_match"]["value"] == pytest.approx(1 / 3)
    assert found["figures"]["f1"]["value"] == pytest.approx((1 + 0 + 2 * 2 / 6) / 3)
    assert found["figures"]["empty_answers"]["value"] == pytest.approx(1 / 3)
    assert err == "note: answers: 1 of 3 are empty; the first is data.jsonl:2\n"
    text = evaluate(*words, "--limit", 1, "--out", "kept", "--html", "page.html")[1]
    assert "exact_match      1 [0.2065, 1] (1 rows)" in text
    assert json.loads(Path("kept/metrics.json").read_text())["figures"]["f1"]["count"] == 1
    assert "exact_match" in Path("page.html").read_text()


def test_answers_bring_their_own_references(evaluate: Run, folder: Path) -> None:
    write(folder / "own.jsonl", {"text": "yes", "references": ["Yes."]}, {"text": "x"})
    code, out, err = evaluate("--answers", "own.jsonl", "--metrics", "distinct", "--json")
    assert code == 0
    assert json.loads(out)["figures"]["distinct_1"]["value"] == 1
    code, _, err = evaluate("--answers", "own.jsonl", "--metrics", "exact")
    assert code == 1
    assert err.startswith("lora-core evaluate: own.jsonl:2: metric exact compares with references")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"said": "x"}], "bad.jsonl:1: an answer is a row with answer or text"),
        ([{"id": "one", "answer": "x"}], "no answer to 2 of 3 questions; the first is id 'two'"),
        ([{"answer": "x"}], "1 answers without ids, and 3 questions"),
    ],
)
def test_answers_that_do_not_fit(
    rows: list[Any], message: str, evaluate: Run, folder: Path
) -> None:
    write(folder / "bad.jsonl", *rows)
    code, _, err = evaluate("--answers", "bad.jsonl", "--data", "data.jsonl", "--metrics", "f1")
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


# --- a judge ---


def judged(evaluate: Run, function: str, *words: object) -> tuple[int, str, str]:
    pair = ["--answers", "a.jsonl", "--versus", "b.jsonl", "--data", "data.jsonl"]
    return evaluate("--judge", f"judges_of_this_test:{function}", *pair, *words)


def test_a_judge_prefers_the_shorter(evaluate: Run) -> None:
    code, out, _ = judged(evaluate, "shorter", "--json", "--out", "verdicts.jsonl")
    found = json.loads(out)
    assert code == 0
    assert (found["wins"], found["losses"], found["ties"]) == (2, 0, 1)  # three is equal
    assert found["win_rate"]["value"] == pytest.approx(2.5 / 3)
    assert found["inconsistent"]["value"] == 0
    assert len(Path("verdicts.jsonl").read_text().splitlines()) == 2
    text = judged(evaluate, "shorter")[1]
    assert text.startswith("a against b: win rate 0.8333 [")


def test_a_judge_that_returns_nonsense_once_is_named_and_the_rest_kept(evaluate: Run) -> None:
    code, out, _ = judged(evaluate, "sometimes", "--json", "--out", "verdicts.jsonl")
    found = json.loads(out)
    assert code == 0
    assert (found["wins"], found["ties"], len(found["errors"])) == (1, 1, 1)
    assert "data.jsonl:2" in found["errors"][0]
    assert "42" in found["errors"][0]


def test_a_judge_that_was_changed_is_asked_again(
    evaluate: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts are kept for a function as it is written, not for its name."""
    words = ["--judge", "changed:f", "--answers", "a.jsonl", "--versus", "b.jsonl", "--json"]

    def wins(say: str) -> tuple[int, int]:
        (folder / "changed.py").write_text(f"def f(prompt, first, second):\n    return {say}\n")
        monkeypatch.delitem(sys.modules, "changed", raising=False)
        importlib.invalidate_caches()
        found = json.loads(evaluate(*words, "--out", "verdicts.jsonl")[1])
        return found["wins"], len(Path("verdicts.jsonl").read_text().splitlines())

    assert wins("'first' if len(first) > len(second) else 'second'") == (0, 2)
    assert wins("'first' if len(first) > len(second) else 'second'") == (0, 2)  # kept
    assert wins("'second' if len(first) > len(second) else 'first'  # the other") == (2, 4)


@pytest.mark.parametrize(
    ("function", "message"),
    [("raises", "the service is down"), ("nonsense", "perhaps"), ("leaves", "raised SystemExit")],
)
def test_a_judge_that_always_fails(function: str, message: str, evaluate: Run) -> None:
    """Equal answers are never put to it, so one row is decided without; the others are named."""
    _, out, err = judged(evaluate, function)
    told = out + err
    assert "data.jsonl:1" in told
    assert message in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("shorter", "--judge takes MODULE:FUNCTION, as in judges:shorter; got 'shorter'"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("judges_of_this_test:absent", "judges_of_this_test has no 'absent'"),
        ("judges_of_this_test:number", "has a int and no function 'number'"),
        ("broken_judges_here:f", "importing broken_judges_here failed: ZeroDivisionError"),
        ("script_here:f", "importing script_here failed: SystemExit: 0"),
    ],
)
def test_a_judge_that_is_none(judge: str, message: str, evaluate: Run, folder: Path) -> None:
    (folder / "broken_judges_here.py").write_text("1 / 0\n")
    (folder / "script_here.py").write_text("raise SystemExit(0)\n")
    code, _, err = evaluate("--judge", judge, "--answers", "a.jsonl", "--versus", "b.jsonl")
    assert code == 1
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "distinct", "--limit", "-1"], "--limit must be 1 or more; got -1"),
        (["--metrics", "distinct", "--out", "b.jsonl"], "--out b.jsonl is a file: name a folder"),
        (["--metrics", "distinct", "--html", "."], "--html . is a folder: name a file"),
        (["--metrics", "distinct", "--html", "no/x"], "--html no/x: there is no folder no"),
        (["--versus", "b.jsonl", "--judge", "m:f", "--out", "."], "--out . is a folder: name a"),
    ],
)
def test_places_and_counts_are_checked_at_once(
    words: list[str], message: str, evaluate: Run
) -> None:
    code, out, err = evaluate("--answers", "a.jsonl", *words)
    assert (code, out) == (1, "")
    assert err.startswith(f"lora-core evaluate: {message}")
    assert len(err.splitlines()) == 1


# --- a person ---


def test_votes_become_rows(evaluate: Run, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Two questions are shown, one vote and a tie; names are hidden until the tally."""
    words = ["--blind", "a.jsonl", "b.jsonl", "--data", "data.jsonl", "--out", "votes.jsonl"]
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nq\n"))
    code, out, _ = evaluate(*words)
    assert code == 0
    assert "one?" in out
    votes = [json.loads(line) for line in Path("votes.jsonl").read_text().splitlines()]
    assert len(votes) == 1
    assert {"chosen", "rejected", "chosen_from"} <= votes[0].keys()
    monkeypatch.setattr("sys.stdin", io.StringIO("t\n"))
    code, out, _ = evaluate(*words)  # goes on with the second
    assert code == 0
    assert "one?" not in out
    assert len(Path("votes.jsonl").read_text().splitlines()) == 2


def test_blind_answers_without_questions(evaluate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n2\n"))
    assert evaluate("--blind", "a.jsonl", "b.jsonl", "--out", "votes.jsonl")[0] == 0
    assert len(Path("votes.jsonl").read_text().splitlines()) == 2
