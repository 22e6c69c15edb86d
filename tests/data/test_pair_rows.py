"""Pairs and rated completions in tokens: graded as supervised rows are, told apart, cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.checkpoint import base_model_path
from lora_core.cli.main import main
from lora_core.data import SFTDataset, Tokenizer, load_tokenizer
from lora_core.data.pair_rows import PairRows, RatedRows, _next_other

USER = {"role": "user", "content": "what is x?"}
GOOD = {"role": "assistant", "content": "a letter"}
BAD = {"role": "assistant", "content": "a digit, or not"}


def pair(prompt: str = "x is ", chosen: str = "a b", rejected: str = "c d e") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rated(prompt: str, completion: str, label: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def supervised(tok: Tokenizer, *messages: dict[str, Any]) -> tuple[list[int], list[bool]]:
    row = SFTDataset([{"messages": list(messages)}], tok)[0]
    return row["input_ids"], [label >= 0 for label in row["labels"]]


def test_sides_are_the_rows_of_supervised_training(families: dict[str, Tokenizer]) -> None:
    for tok in families.values():
        rows = PairRows([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], tok)
        (row,) = rows
        assert row.graded is not None
        for number, answer in enumerate((GOOD, BAD)):
            ids, graded = supervised(tok, USER, answer)
            assert [*row.prompt, *row.completions[number]] == ids
            assert [*[False] * len(row.prompt), *row.graded[number]] == graded
        assert row.graded[0][0]
        assert row.graded[1][0]


def test_text_sides_are_completions(tok: Tokenizer) -> None:
    (row,) = PairRows([pair()], tok)
    for number, side in enumerate(("a b", "c d e")):
        one = SFTDataset([{"prompt": "x is ", "completion": side}], tok)[0]
        assert [*row.prompt, *row.completions[number]] == one["input_ids"]
        assert row.completions[number][-1] == tok.eos_id


def test_an_assistants_turns_in_the_prompt_are_not_graded(tok: Tokenizer) -> None:
    begin = [USER, GOOD, {"role": "user", "content": "sure?"}]
    (row,) = PairRows([{"chosen": [*begin, GOOD], "rejected": [*begin, BAD]}], tok)
    assert tok.decode(row.prompt).count("a letter") == 1
    assert "a letter" not in tok.decode(row.completions[1])


def test_a_side_of_several_turns_grades_the_assistants(tok: Tokenizer) -> None:
    more = [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    record = {"prompt": [USER], "chosen": [GOOD, *more], "rejected": [BAD]}
    texts = {}
    for train_on in ("assistant", "last"):
        (row,) = PairRows([record], tok, train_on=train_on)
        assert row.graded is not None
        kept = [t for t, g in zip(row.completions[0], row.graded[0], strict=True) if g]
        texts[train_on] = tok.decode(kept)
    assert texts["assistant"] == "a letter<|im_end|>yes<|im_end|>"
    assert texts["last"] == "yes<|im_end|>"


def test_a_straddling_token_belongs_to_the_sides(tok: Tokenizer) -> None:
    merged = tok.encode(" function")
    assert len(merged) == 1  # one token, so that the prompt " func" merges with "tion"
    (row,) = PairRows([pair("a func", "tion", "x")], tok)
    assert row.graded is not None
    assert row.completions[0][0] == merged[0]
    assert row.graded[0] == (False, True)
    assert all(row.graded[1][-2:])
    assert tok.decode([*row.prompt, *row.completions[1]]) == "a funcx<|endoftext|>"


def test_completions_are_cut_from_the_right_and_counted(
    jsonl: Callable[..., Path], tok: Tokenizer
) -> None:
    (whole,) = PairRows([pair("x", "a b c d", "e f g h i j")], tok)
    size = len(whole.prompt) + len(whole.completions[0])
    file = jsonl(pair("x", "a b c d", "e f g h i j"))
    rows = PairRows.from_jsonl(file, tok, max_length=size)
    (row,) = rows
    assert row.prompt == whole.prompt
    assert row.completions[0] == whole.completions[0]
    assert row.completions[1] == whole.completions[1][: len(whole.completions[0])]
    total = rows.report.total
    lost = len(whole.completions[1]) - len(whole.completions[0])
    assert (total.truncated, total.graded_cut, total.kept) == (1, lost, 1)
    assert rows.lengths == [size]
    assert total.longest == len(whole.prompt) + len(whole.completions[1])


def test_what_teaches_nothing_is_dropped_and_named(
    jsonl: Callable[..., Path], tok: Tokenizer
) -> None:
    file = jsonl(
        pair("x" * 60),
        pair(chosen="same", rejected="same"),
        pair("x", "a b c d e f g h i j", "a b c d e f g h i jk"),
        pair(chosen="a <|im_end|>"),
        pair(),
    )
    rows = PairRows.from_jsonl(file, tok, max_length=16)
    assert rows.where == [f"{file}:5"]
    assert dict(rows.report.total.dropped) == {
        "prompt leaves no room for a completion": 1,
        "chosen and rejected are the same": 1,
        "chosen and rejected are the same in the first 16 tokens": 1,
        "control token in the content": 1,
    }
    said = rows.report.why_dropped()
    assert all(f"{file}:{line}" in said for line in (1, 2, 3, 4))
    assert str(rows.report).startswith("data.jsonl: 5 records, 1 rows")


def test_sides_that_differ_where_nothing_is_graded_are_told_from_equal_ones() -> None:
    shipped = load_tokenizer(base_model_path())  # whose tokens have a space at their front
    rows = [pair("the word ", "y", "z"), pair("the word", " y", " z")]
    found = PairRows(rows, shipped)
    assert len(found) == 1
    assert "1 x chosen and rejected differ only in ungraded tokens (does the" in str(found.report)
    long = [pair("word " * 300, "y", "z"), pair("word", " y", " z")]
    said = str(PairRows(long, shipped, max_length=64).report)
    assert "1 x prompt leaves no room for a completion (records[0])" in said


def test_nothing_left_says_why(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no pair is left to train on.*are the same \(records\[0"):
        PairRows([pair(chosen="same", rejected="same")], tok)
    with pytest.raises(ValueError, match=r"no rated completion is left to train on.*no room"):
        RatedRows([rated("x" * 60, "a")], tok, max_length=8)


def test_a_prompt_without_a_token_is_refused(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"records\[0\]: the prompt has no token"):
        PairRows([pair("", "a", "b")], tok)
    # both sides begin with one token, which nothing could predict
    (row,) = PairRows([pair("", "a b", "a c")], tok)
    assert row.prompt == tuple(tok.encode("a"))


def test_a_bos_is_prompt_enough(families: dict[str, Tokenizer]) -> None:
    tok = families["llama3"]
    if not tok.prefix_ids:
        tok = Tokenizer(tok.backend, {**tok.config}, tok.chat_template)
    rows = PairRows([{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], tok)
    assert rows[0].prompt[0] == tok.bos_id


def test_margins_stay_with_their_rows(tok: Tokenizer) -> None:
    rows = PairRows([{**pair(f"{i}"), "margin": i} for i in range(6)], tok)
    assert rows.margins == [0, 1, 2, 3, 4, 5]
    train, held_out = rows.split(0.3, seed=1)
    assert {*train.margins, *held_out.margins} == {0, 1, 2, 3, 4, 5}
    assert [row.margin for row in held_out] == held_out.margins
    assert [row.where for row in held_out] == held_out.where


def test_pairs_of_one_prompt_stay_on_one_side(tok: Tokenizer) -> None:
    rows = PairRows([pair(f"q{i % 5}", f"a{i}", f"b{i}") for i in range(30)], tok)
    train, held_out = rows.split(0.25, seed=0)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


def test_a_rated_row_has_its_completion_and_another_prompts(tok: Tokenizer) -> None:
    rows = RatedRows([rated("p", "a", True), rated("p", "b", False), rated("q", "c", True)], tok)
    alone = {p + c: PairRows([pair(p, c, "zzz")], tok)[0] for p, c in ("pa", "pb", "qc")}
    assert rows.labels == [row.label for row in rows] == [True, False, True]
    for row, (own, other) in zip(rows, [("pa", "qc"), ("pb", "qc"), ("qc", "pa")], strict=True):
        assert row.prompt == alone[own].prompt
        assert row.completions == (alone[own].completions[0], alone[other].completions[0])
    # a view has the partners of the whole
    assert rows.select([2])[0] == rows[2]


def test_a_partner_is_cut_to_the_room_of_the_prompt(tok: Tokenizer) -> None:
    rows = RatedRows([rated("p p p p", "a"), rated("q", "b c d e f g h i j")], tok, max_length=12)
    assert [len(row.prompt) + max(map(len, row.completions)) <= 12 for row in rows] == [True, True]


def test_one_prompt_has_no_baseline(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match="all 2 rows have one prompt"):
        RatedRows([rated("p", "a"), rated("p", "b", False)], tok)


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=2, max_size=12))
def test_the_next_other_prompt(keys: list[bytes]) -> None:
    if len(set(keys)) < 2:
        return
    count = len(keys)
    expected = [
        next(j % count for j in range(i + 1, i + count) if keys[j % count] != keys[i])
        for i in range(count)
    ]
    assert _next_other(keys) == expected


def test_inspect_shows_each_side_after_its_prompt(
    jsonl: Callable[..., Path],
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = jsonl({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    words = ["inspect", "--model", str(tokenizer_folder), "--data", str(file)]
    assert main([*words, "--objective", "ipo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["where"] for s in found["samples"]] == [f"{file}:1 chosen", f"{file}:1 rejected"]
    (row,) = PairRows.from_jsonl(file, load_tokenizer(tokenizer_folder))
    for number, sample in enumerate(found["samples"]):
        assert [t["id"] for t in sample["tokens"]] == [*row.prompt, *row.completions[number]]
        graded = [t["graded"] for t in sample["tokens"]]
        assert graded == [*[False] * len(row.prompt), *row.flags(number)]
    assert main([*words, "--objective", "dpo"]) == 0
    assert f"{file}:1 rejected: " in capsys.readouterr().out
    assert main([*words, "--objective", "dpo", "--summary"]) == 2
    assert "--summary is of supervised rows" in capsys.readouterr().err
    other = jsonl(*(rated(f"p{i}", "a b") for i in range(2)), name="rated.jsonl")
    words[-1] = str(other)
    assert main([*words, "--objective", "kto", "--limit", "1"]) == 0
    assert "another prompt's completion" in capsys.readouterr().out
