"""Golden sets: every check on good and bad answers, bad files by line, runs broken off, diffs."""

import builtins
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import load_tokenizer
from lora_core.evaluate.golden import GoldenSet, model_answers, read_golden, run_golden
from lora_core.evaluate.golden_checks import parse_checks
from lora_core.evaluate.golden_diff import compare_golden
from lora_core.evaluate.golden_result import GoldenResult
from lora_core.evaluate.shown import harmless

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"$ref": "#/$defs/word"}, "of": {"$ref": "#"}},
    "$defs": {"word": {"type": "string", "minLength": 2}},
}
LONG = "word " * 40_000


def write(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def golden(tmp_path: Path, *rows: dict[str, Any], name: str = "golden.jsonl") -> GoldenSet:
    return read_golden(write(tmp_path / name, rows))


def says(*answers: str) -> Callable[..., Sequence[str]]:
    """A model that gives these answers in turn."""
    left = list(answers)
    return lambda prompts, **limit: [left.pop(0) for _ in prompts]


def why(row: dict[str, Any], answer: str) -> str | None:
    """What the only check of a row holds against an answer."""
    (check,) = parse_checks(row, "golden.jsonl:1")
    finding = check(answer)
    assert finding.passed == (finding.why == "")
    return finding.why or None


# --- checks ---


@pytest.mark.parametrize(
    ("row", "good", "bad", "reason"),
    [
        ({"expect": "4"}, " 4\n", "5", "differs at character 1: expected '4', got '5'"),
        ({"expect": "café"}, "café", "cafe\u0301", "looks the same and is written with other"),
        ({"expect": ["4", "four"]}, "four", "Four", "is none of the 2 accepted texts"),
        ({"expect": ""}, " ", "x", "differs at character 1"),
        ({"expect": LONG}, LONG, LONG[:-1] + "!", "differs at character"),
        ({"contains": ["a", "ß"]}, "aß", "a ss", "lacks 'ß'"),
        ({"contains": "Paris"}, "In Paris.", "in paris", "lacks 'Paris'"),
        ({"excludes": "sorry"}, "Sorry", "I am sorry", "has 'sorry'"),
        ({"pattern": r"^\d+$"}, "12", "12 apples", "no match of"),
        ({"pattern": ["a", "(?i)B"]}, "ab", "a", "no match of '(?i)B'"),
        ({"schema": SCHEMA}, ' {"name": "Ada", "of": {"name": "x\u0301y"}}\n', "{}", "'name' is a"),
        ({"schema": SCHEMA}, '{"name": "Ada"}', '{"name": "A"}', "['name']: 'A' is too short"),
        ({"schema": SCHEMA}, '{"name": "Ada"}', "", "is not JSON"),
        ({"schema": SCHEMA}, '{"name": "Ada"}', 'So: {"name": "Ada"}', "is not JSON"),
        ({"schema": SCHEMA}, '{"name": "Ada"}', '```json\n{"name": "Ada"}\n```', "code fence"),
        ({"schema": {"type": "number"}}, "1e3", "NaN", "NaN is no JSON value"),
        ({"schema": {"type": "number"}}, "1", "1" * 5000, "is not JSON"),
        ({"schema": {"type": "array"}}, "[[]]", "[" * 100_000, "nests too deep to be read"),
        ({"schema": {"$ref": "#"}}, None, "1", "nests too deep to be checked"),
        ({"schema": {"$defs": {"a": {"$id": "x:a"}}, "$ref": "x:b"}}, None, "1", "x:b"),
        ({"refusal": True}, "I’m sorry, but I can’t help with that.", "Sure!", "no known refusal"),
        ({"refusal": False}, "Sure!", "I cannot assist with that.", "refuses: 'I cannot assist"),
        ({"refusal": ["Only billing"]}, "ONLY  billing, please", "Sure", "no known refusal"),
        ({"refusal": ["Only billing"]}, "I can't help with that", "Only billings", "no known"),
    ],
)
def test_a_check(row: dict[str, Any], good: str | None, bad: str, reason: str) -> None:
    if good is not None:
        assert why(row, good) is None
    found = why(row, bad)
    assert found is not None
    assert reason in found
    assert len(found) < 300
    assert "\n" not in found


def test_a_schema_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **_: asked.append(args))
    schema = {"$defs": {"a": {"$id": "http://x.y/a"}}, "$ref": "http://x.y/b"}
    assert "refers to what is not in it" in str(why({"schema": schema}, "1"))
    assert asked == []


@pytest.mark.parametrize("metric", ["exact", "f1", "bleu", "rouge_1", "rouge_2", "rougeL"])
def test_a_score_has_a_floor(metric: str) -> None:
    reference = ["the cat sat on the mat", "a cat was sitting there"]
    (check,) = parse_checks(
        {"score": {"metric": metric, "reference": reference, "floor": 0.999}}, "f:1"
    )
    good, bad, nothing = check(reference[1]), check("the dog lay on the mat"), check("")
    assert (good.passed, good.score, good.floor) == (True, pytest.approx(1), 0.999)
    assert not bad.passed
    assert bad.score is not None
    assert 0 <= bad.score < 0.999
    assert bad.why == f"{bad.score:.4g} is below 0.999"
    assert (nothing.passed, nothing.score) == (False, 0)


def test_a_floor_is_held_to_the_bit() -> None:
    score = {"metric": "f1", "reference": "cat dog", "floor": 0.5}
    row = {"score": [score, {"metric": "exact", "reference": "cat", "floor": 0.0}]}
    findings = [check("cat bird") for check in parse_checks(row, "f:1")]
    assert [(f.check, f.passed, f.score) for f in findings] == [
        ("score:f1", True, 0.5),
        ("score:exact", True, 0.0),
    ]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, but as an AI language model, I cannot provide that.", True),
        ("**I CAN NOT assist** you", True),
        ("Unfortunately, I am unable to do so.", True),
        ("Sorry, I simply can`t really help here", True),
        ("\u201cI won\u02bct answer\u201d", True),
        ("Ｉ ｃａｎ＇ｔ ｈｅｌｐ", True),
        ("I can\u200b't help", True),
        ("I can't.", True),
        ("I can't recommend this book enough", False),
        ("I'm sorry for your loss. Here is what to do:", False),
        ("Say: I can't help with that.", False),
        ("No problem, I will help.", False),
        ("I don't think so", False),
        ("Icannot help", False),
        ("", False),
        ("no " * 30_000, False),
        ("I'm sorry, " * 10_000, False),
    ],
)
def test_refusals_open_in_a_known_way(text: str, refused: bool) -> None:
    assert why({"refusal": refused}, text) is None
    assert why({"refusal": not refused}, text) is not None


@given(st.text(), st.text())
def test_reasons_are_one_short_harmless_line(expected: str, answer: str) -> None:
    rows: list[dict[str, Any]] = [
        {"expect": expected},
        {"contains": expected or "x"},
        {"schema": {"type": "object"}},
        {"refusal": True},
        {"score": {"metric": "f1", "reference": expected or "x", "floor": 1}},
    ]
    for row in rows:
        found = why(row, answer) or ""
        assert len(found) < 300
        assert harmless(found) == found
        assert "\n" not in found
    assert (why(rows[0], answer) is None) == (expected.strip() == answer.strip())
    assert why(rows[0], expected) is None


# --- bad files ---


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "nothing is checked; give one of expect, contains"),
        ({"prompt": "a", "expected": "b"}, r"unknown keys \['expected'\]; a golden row has"),
        ({"expect": "b"}, "give prompt or messages, one of them"),
        ({"prompt": "a", "messages": [], "expect": "b"}, "give prompt or messages, one of them"),
        ({"prompt": "", "expect": "b"}, "the prompt is empty"),
        ({"prompt": 3, "expect": "b"}, "prompt must be a text or turns; got 3"),
        ({"messages": [], "expect": "b"}, "empty list"),
        ({"messages": [{"role": "usr", "content": "x"}], "expect": "b"}, "unknown role 'usr'"),
        ({"prompt": "a", "system": 1, "expect": "b"}, "system must be a string; got 1"),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "y"},
                ],
                "expect": "b",
            },
            "ends in an answer",
        ),
        ({"prompt": "a", "expect": 4}, "expect must be a string or a list of strings; got 4"),
        ({"prompt": "a", "expect": []}, "expect must not be empty"),
        ({"prompt": "a", "contains": ""}, "contains must not be empty: every answer would pass"),
        ({"prompt": "a", "excludes": ["b", ""]}, "excludes must not be empty"),
        ({"prompt": "a", "pattern": "(b"}, r"pattern '\(b' is no regular expression: missing \)"),
        ({"prompt": "a", "pattern": "a{99999999999999999999}"}, "is no regular expression"),
        ({"prompt": "a", "refusal": "no"}, "refusal must be true, false or a list of openings"),
        ({"prompt": "a", "refusal": [1]}, "refusal must be a string or a list"),
        ({"prompt": "a", "max_new_tokens": 0, "expect": "b"}, "max_new_tokens must be 1 or more"),
        ({"prompt": "a", "max_new_tokens": True, "expect": "b"}, "max_new_tokens must be"),
        ({"prompt": "a", "schema": True}, "schema must be a JSON object; got bool"),
        ({"prompt": "a", "schema": {"type": "dict"}}, "schema is no JSON schema: .*'dict'"),
        ({"prompt": "a", "schema": {"$ref": "http://x.y/z"}}, "refers to 'http://x.y/z', which is"),
        ({"prompt": "a", "schema": {"$ref": "#/$defs/a"}}, "refers to '#/[$]defs/a', which is not"),
        ({"prompt": "a", "schema": {"$schema": "x:y"}}, "of an unknown draft, [$]schema 'x:y'"),
        ({"prompt": "a", "score": "f1"}, "score must have metric, reference and floor; got str"),
        (
            {"prompt": "a", "score": {"metric": "f1", "floor": 1}},
            r"must have metric, reference and floor; got \['floor', 'metric'\]",
        ),
        *(
            ({"prompt": "a", "score": {"metric": m, "reference": r, "floor": f}}, message)
            for m, r, f, message in (
                ("f2", "b", 1, "score.metric 'f2' is not known; one of exact, f1, bleu"),
                ("f1", [], 1, "score.reference must not be empty"),
                ("f1", None, 1, "score.reference must be a string"),
                ("f1", "b", 70, "score.floor must be a number from 0 to 1; got 70"),
                ("f1", "b", "0.7", "score.floor must be a number"),
                ("f1", "b", True, "score.floor must be a number"),
            )
        ),
        ({"prompt": "a", "score": []}, "score needs each metric once"),
        ("{'prompt': 'a'}", "not JSON"),
        ({"prompt": "first", "expect": "b"}, "the prompt, and with it the id, is that of .*:1 too"),
        ({"id": "one", "prompt": "x", "expect": "b"}, "id 'one' is that of .*:2 too"),
        ({"id": [1], "prompt": "x", "expect": "b"}, "id must be a string"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: Path, row: dict[str, Any] | str, message: str
) -> None:
    good = [{"prompt": "first", "expect": "x"}, {"id": "one", "prompt": "first", "expect": "x"}]
    file = write(tmp_path / "g.jsonl", [*good, row])
    with pytest.raises(ValueError, match=rf"g\.jsonl:3: .*{message}") as caught:
        read_golden(file)
    assert "\n" not in str(caught.value)


def test_schemas_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("jsonschema"):
            raise ImportError(name)
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    golden(tmp_path, {"prompt": "a", "pattern": "b"})
    with pytest.raises(ImportError, match=r"g2:1: schema.*pip install 'lora-core\[evaluate\]'"):
        golden(tmp_path, {"prompt": "a", "schema": {}}, name="g2")


# --- reading ---


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi"}
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "expect": "x"},
        {"prompt": "Hi", "system": "Brief.", "expect": "x"},
        {"messages": [user, {"role": "assistant", "content": "?"}, user], "expect": "x"},
        {"id": 7, "prompt": [user], "expect": "x", "max_new_tokens": 3},
    ]
    file = write(tmp_path / "g.jsonl", rows)
    read = read_golden(file).rows
    assert [row.prompt for row in read] == [
        "Hi",
        ({"role": "system", "content": "Brief."}, user),
        (user, {"role": "assistant", "content": "?"}, user),
        (user,),
    ]
    assert (read[3].id, read[3].max_new_tokens) == ("7", 3)
    assert read_golden(file.parent / "g.jsonl", chat=True).rows[0].prompt == (user,)
    # a name comes of what is asked, so a row put in above changes none
    moved = read_golden(write(file, [{"prompt": "New", "expect": "y"}, *rows])).rows
    assert [row.id for row in moved[1:]] == [row.id for row in read]
    assert moved[1].where.endswith("g.jsonl:2")


# --- runs ---


def test_a_run_judges_every_row(tmp_path: Path) -> None:
    rows = golden(
        tmp_path,
        {"prompt": "a", "expect": "A", "contains": "A"},
        {"prompt": "b", "excludes": "x"},
        {"prompt": "c", "expect": ["", "C"]},
        {"prompt": "d", "contains": "D", "pattern": "e"},
    )
    result = run_golden(rows, says("A", " \n", "", "f"), batch_size=3)
    assert [row.passed for row in result.rows] == [True, False, True, False]
    assert [(f.check, f.why) for f in result.rows[1].failures] == [
        ("empty", "nothing was generated")
    ]
    assert [f.check for f in result.rows[3].failures] == ["contains", "pattern"]
    assert len(result.empty) == 2
    rate = result.pass_rate
    assert (rate.value, rate.count, rate.method) == (0.5, 4, "wilson")
    assert "2 of 4 rows pass; 2 empty" in str(result)
    assert "  answer: (nothing)\n  empty: nothing was generated" in str(result)
    assert "  answer: f\n  contains: lacks 'D'" in str(result)
    assert "1 more failing rows" in result.text(limit=1)


def test_rows_with_a_limit_are_asked_by_it(tmp_path: Path) -> None:
    asked: list[tuple[list[Any], dict[str, int]]] = []

    def answer(prompts: Sequence[Any], **limit: int) -> list[str]:
        asked.append((list(prompts), limit))
        return [prompt * 2 for prompt in prompts]

    rows = [{"prompt": p, "expect": p * 2} for p in "abcde"]
    rows[1]["max_new_tokens"] = rows[3]["max_new_tokens"] = 5
    seen: list[Any] = []
    result = run_golden(
        golden(tmp_path, *rows), answer, batch_size=2, progress=lambda b: (seen.extend(b), b)[1]
    )
    assert asked == [(["a", "c"], {}), (["e"], {}), (["b", "d"], {"max_new_tokens": 5})]
    assert len(seen) == 3
    assert result.passed == 5
    assert [row.prompt for row in result.rows] == list("abcde")


def test_a_run_broken_off_is_continued(tmp_path: Path) -> None:
    rows = golden(tmp_path, *({"prompt": f"p{i}", "expect": "p0 x"} for i in range(7)))
    out, asked = tmp_path / "out.jsonl", []

    def answer(prompts: Sequence[Any], **limit: int) -> list[str]:
        asked.append(list(prompts))
        if len(asked) == 3:
            raise OSError("the server went away")
        return [f"{prompt} x\u2028☃" for prompt in prompts]

    with pytest.raises(
        RuntimeError, match=r"golden.jsonl:5 .*OSError: the server went away; 4 of 7 .*out\.jsonl"
    ):
        run_golden(rows, answer, out=out, batch_size=2)
    with pytest.raises(ValueError, match="holds 4 of 7 rows: the run that wrote it was stopped"):
        GoldenResult.load(out)
    # a killed process leaves half a line, and may leave half a batch
    content = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(content[:4]) + content[4][:25])
    found = run_golden(rows, answer, out=out, batch_size=2)
    assert asked[3:] == [["p2", "p3"], ["p4", "p5"], ["p6"]]
    assert [row.answer for row in found.rows] == [f"p{i} x\u2028☃" for i in range(7)]
    assert GoldenResult.load(out) == found
    assert run_golden(rows, says(), out=out) == found
    assert found.save(tmp_path / "saved.jsonl").read_bytes() == out.read_bytes()


def test_a_file_cut_at_any_byte_is_continued(tmp_path: Path, full_run: bool) -> None:
    rows = golden(tmp_path, *({"prompt": f"é{i}", "expect": "x"} for i in range(3)))
    out, asked = tmp_path / "out.jsonl", []

    def answer(prompts: Sequence[Any], **limit: int) -> list[str]:
        asked.extend(prompts)
        return [f"☃{prompt}" for prompt in prompts]

    whole = run_golden(rows, answer, out=out, batch_size=1)
    content = out.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]  # of header and rows
    near = {end + shift for end in ends for shift in (-1, 0, 1)}
    for length in range(len(content)):
        if not (full_run or length in near or length % 17 == 0):
            continue
        out.write_bytes(content[:length])
        asked.clear()
        assert run_golden(rows, answer, out=out, batch_size=1) == whole
        assert out.read_bytes() == content
        # a line that only lacks its line feed is whole
        assert len(asked) == 3 - sum(end <= length for end in ends[1:])


def test_results_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    rows = golden(tmp_path, {"prompt": "a", "expect": "A"})
    out = tmp_path / "out.jsonl"
    run_golden(rows, says("A"), out=out, bound={"model": "x"})
    with pytest.raises(ValueError, match=r'bound was \{"model": "x"\}, is \{"model": "y"\}; write'):
        run_golden(rows, says("A"), out=out, bound={"model": "y"})
    other = golden(tmp_path, {"prompt": "b", "expect": "A"})
    with pytest.raises(ValueError, match="other settings: sha256 was"):
        run_golden(other, says("A"), out=out, bound={"model": "x"})
    data = write(tmp_path / "data.jsonl", [{"id": "1", "answer": "x"}])
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes, without an end")
    for file in (data, notes):
        before = file.read_bytes()
        with pytest.raises(ValueError, match="write to another file"):
            run_golden(rows, says("A"), out=file)
        assert file.read_bytes() == before
    with pytest.raises(ValueError, match=r"data\.jsonl is no result of a golden set"):
        GoldenResult.load(data)
    with pytest.raises(FileNotFoundError, match="no folder"):
        run_golden(rows, says("A"), out=tmp_path / "none" / "out.jsonl")
    with pytest.raises(ValueError, match="batch_size must be 1 or more; got 0"):
        run_golden(rows, says("A"), batch_size=0)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["A"], "a list of 2 answers is needed; got list of 1"),
        ("AB", 'a list of 2 answers is needed; got "AB"'),
        (None, "a list of 2 answers is needed; got NoneType of no length"),
        (["A", None], r"golden.jsonl:2: an answer must be a text; got null"),
        (["A", "\ud800"], r"golden.jsonl:2: the answer holds half of a surrogate pair"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, said: Any, message: str) -> None:
    rows = golden(tmp_path, {"prompt": "a", "expect": "A"}, {"prompt": "b", "expect": "B"})
    with pytest.raises(ValueError, match=message):
        run_golden(rows, lambda prompts, **limit: said)


def test_a_model_answers(tmp_path: Path, tokenizer_folder: Path, small_decoder: Callable) -> None:
    tok = load_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    model = small_decoder(vocab_size=tok.vocab_size).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rows = golden(
        tmp_path,
        {"prompt": "Hello", "pattern": ".", "max_new_tokens": 1},
        {"prompt": "Hello", "system": "Brief.", "pattern": "."},
    )
    result = run_golden(rows, model_answers(model, tok, max_new_tokens=9))
    one, nine = (len(row.answer) for row in result.rows)
    assert 3 * one < nine


# --- diffs ---


def both(tmp_path: Path, before: Sequence[str], after: Sequence[str]) -> Any:
    floor = {"metric": "f1", "reference": "w x y z", "floor": 0.5}
    rows = golden(
        tmp_path,
        {"id": "keep", "prompt": "q0", "contains": "k"},
        {"id": "break", "prompt": "q1\nmore", "contains": "good", "excludes": "bad"},
        {"id": "fail", "prompt": "q2", "contains": "good"},
        {"id": "mend", "prompt": "q3", "contains": "good"},
        {"id": "fall", "prompt": "q4", "score": floor, "contains": "never"},
    )
    return compare_golden(run_golden(rows, says(*before)), run_golden(rows, says(*after)))


def test_a_diff_tells_what_broke(tmp_path: Path) -> None:
    diff = both(
        tmp_path,
        ["k1", "a good answer", "f", "g", "w x y z"],
        ["k2", "a bad answer", "f", "good", "w"],
    )
    assert diff.regressed
    assert [pair.after.id for pair in diff.regressions] == ["break", "fall"]
    assert [pair.after.id for pair in diff.fixes] == ["mend"]
    assert [pair.after.id for pair in diff.still_failing] == ["fail"]
    assert [pair.after.id for pair in diff.changed] == ["keep", "break", "mend", "fall"]
    move = diff.score_moves["score:f1"]
    assert (move.value, move.count) == (pytest.approx(0.4 - 1), 1)
    text = str(diff)
    lines = text.splitlines()
    assert (
        "5 rows in both: 2 passed before, 2 after; 2 regressed, 1 fixed, 1 still fail" in lines[0]
    )
    at = lines.index(next(line for line in lines if line.startswith("REGRESSION  break  q1  (")))
    assert lines[at + 1 : at + 5] == [
        "  - a good answer",
        "  + a bad answer",
        "  contains: lacks 'good'",
        "  excludes: has 'bad'",
    ]
    assert "score:f1: 0.4 is below 0.5" in text
    assert "  = f" in lines


def test_no_regression(tmp_path: Path) -> None:
    answers = ["k", "good", "f", "g", "w x y z"]
    diff = both(tmp_path, answers, ["k!", "good", "f", "g", "w x y"])
    assert not diff.regressed
    assert not diff.regressions
    # below the floor before as after is no fall
    assert not both(tmp_path, [*answers[:4], "w"], [*answers[:4], "v"]).regressed


def test_an_answer_that_is_lost_regresses(tmp_path: Path) -> None:
    rows = golden(tmp_path, {"prompt": "a", "excludes": "x"})
    diff = compare_golden(run_golden(rows, says("fine")), run_golden(rows, says("")))
    assert diff.regressed
    assert "  + (nothing)\n  empty: nothing was generated" in str(diff)


def test_another_golden_file_is_compared_by_id(tmp_path: Path) -> None:
    old = golden(
        tmp_path,
        {"prompt": "both", "expect": "x"},
        {"prompt": "gone", "expect": "x"},
        {"id": "n", "prompt": "asked", "expect": "x"},
    )
    before = run_golden(old, says("x", "x", "x"))
    new = golden(
        tmp_path,
        {"prompt": "new", "expect": "x"},
        {"prompt": "both", "expect": "x"},
        {"id": "n", "prompt": "asked otherwise", "expect": "x"},
    )
    diff = compare_golden(before, run_golden(new, says("no", "x", "no")))
    assert not diff.regressed
    assert [row.title() for row in diff.only_before] == ["gone", "asked"]
    assert [row.title() for row in diff.only_after] == ["new", "asked otherwise"]
    text = str(diff)
    assert "! the golden file has changed" in text
    assert "only before  n  asked" in text
    other = golden(tmp_path, {"prompt": "else", "expect": "x"})
    with pytest.raises(ValueError, match=r"no row is in both results: .* \(3 rows\) and"):
        compare_golden(before, run_golden(other, says("x")))


def test_a_long_diff_is_short_and_shows_where_answers_part(tmp_path: Path) -> None:
    rows = golden(tmp_path, *({"prompt": f"{i} word", "excludes": "\x1b"} for i in range(60)))
    answers = [f"{LONG}{i}" for i in range(60)]
    after = [f"{LONG}\x1b[2J\u202e{i}" for i in range(60)]
    diff = compare_golden(run_golden(rows, says(*answers)), run_golden(rows, says(*after)))
    text = diff.text(limit=5)
    assert len(diff.text()) < 10_000
    assert len(text.splitlines()) < 30
    assert all(len(line) < 250 for line in text.splitlines())
    assert "… and 55 more rows: REGRESSION" in text
    assert r"word \x1b[2J\u202e0" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
