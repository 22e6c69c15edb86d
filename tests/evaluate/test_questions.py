"""Questions: every supervised format, what is asked and expected of it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import read_records
from lora_core.evaluate import Question, parse_question, read_questions

USER = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "be brief"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as JSON Lines; gives the file."""

    def jsonl(*rows: Any) -> Path:
        file = tmp_path / "q.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return jsonl


@pytest.mark.parametrize(
    ("row", "messages", "references"),
    [
        ({"messages": [SYSTEM, USER, FOUR]}, (SYSTEM, USER), ("4",)),
        ({"messages": [USER, FOUR, USER, FOUR]}, (USER, FOUR, USER), ("4",)),
        ({"messages": [USER]}, (USER,), ()),
        ({"messages": [USER], "references": ["4", "four"]}, (USER,), ("4", "four")),
        ({"messages": [USER, FOUR], "references": ["four"]}, (USER,), ("four",)),
        ({"messages": [USER, FOUR], "references": []}, (USER,), ()),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            (USER,),
            ("4",),
        ),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", (" 4",)),
        ({"prompt": "2 + 2 ="}, "2 + 2 =", ()),
        ({"prompt": "2 + 2 =", "references": "4"}, "2 + 2 =", ("4",)),
        ({"prompt": [USER], "completion": [FOUR]}, (USER,), ("4",)),
        ({"prompt": [USER], "references": ["4"]}, (USER,), ("4",)),
        ({"prompt": [USER, FOUR]}, (USER,), ("4",)),
    ],
    ids=lambda value: "",
)
def test_every_format_asks(
    row: dict[str, Any], messages: Any, references: tuple[str, ...], write: Write
) -> None:
    (found,) = read_questions(file := write(row))
    assert (found.messages, found.references) == (messages, references)
    assert (found.id, found.where) == ("1", f"{file}:1")


def test_alpaca_asks_with_and_without_an_answer() -> None:
    row = {"instruction": "add", "input": "2, 2"}
    for extra, references in (({"output": "4"}, ("4",)), ({}, ()), ({"references": ["4"]}, ("4",))):
        found = parse_question({**row, **extra}, "f:1")
        assert [turn["content"] for turn in found.messages] == ["add\n\n2, 2"]
        assert found.references == references


def test_marks_for_training_do_not_reach_the_template() -> None:
    row = {"messages": [USER, {**FOUR, "train": False}, USER, {**FOUR, "train": True}]}
    assert parse_question(row, "f:1").messages == (USER, FOUR, USER)


def test_tools_and_ids_are_kept() -> None:
    row = {"id": 7, "messages": [USER, FOUR], "tools": [{"name": "add"}]}
    found = parse_question(row, "f:1")
    assert (found.id, found.tools) == ("7", ({"name": "add"},))


def test_columns_and_limit(write: Write) -> None:
    file = write({"q": "a", "good": ["b"]}, {"q": "c", "good": ["d"]}, {"other": 1})
    found = read_questions(file, {"prompt": "q", "references": "good"}, limit=2)
    assert [(q.messages, q.references, q.id) for q in found] == [
        ("a", ("b",), "1"),
        ("c", ("d",), "2"),
    ]


def test_an_example_is_the_question_with_its_first_reference() -> None:
    assert Question("1", (USER,), ("4", "four"), "f:1").answered() == (USER, FOUR)
    assert Question("1", "2 + 2 =", (" 4",), "f:1").answered() == "2 + 2 = 4"
    with pytest.raises(ValueError, match="f:1: an example needs an answer, and this row has none"):
        Question("1", (USER,), (), "f:1").answered()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a document"}], r":1: a row of text asks nothing; questions are messages or"),
        ([{"input_ids": [1, 2]}], r":1: a row of input_ids asks nothing"),
        ([{"messages": [SYSTEM, FOUR]}], r":1: nothing is asked: no user turn stands before"),
        ([{"messages": [FOUR]}], r":1: nothing is asked"),
        ([{"messages": [USER, FOUR, FOUR]}], r":1: two assistant turns end the conversation"),
        ([{"prompt": "", "completion": "4"}], r":1: the prompt is empty"),
        ([{"messages": [USER]}, {"nothing": 1}], r":2: keys \['nothing'\] match no format"),
        ([{"messages": [USER], "references": [4]}], r":1: references must be a list of strings"),
        ([{"messages": [USER], "references": {}}], r":1: references must be a list of strings"),
        ([{"messages": [USER], "id": ""}], r":1: id must be a string or a whole number; got ''"),
        ([{"messages": [USER], "id": 1.5}], r":1: id must be a string or a whole number; got 1.5"),
        (
            [{"messages": [USER], "id": "2"}, {"messages": [USER]}],
            r":2: id '2' is that of .*:1 too",
        ),
        ([{"messages": []}], r":1: messages is an empty list"),
        ([{"chosen": [USER], "rejected": [USER]}], r":1: chosen/rejected is data for preference"),
        ([{"prompt": "a", "label": True}], r":1: prompt/completion/label is data for KTO"),
    ],
)
def test_what_cannot_be_asked_is_named(rows: list[Any], message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=rf"q\.jsonl{message}"):
        read_questions(write(*rows))


def test_a_limit_below_one_and_a_missing_file(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit must be 1 or more rows; got 0"):
        read_questions(write({"messages": [USER]}), limit=0)
    with pytest.raises(FileNotFoundError, match=r"no data file .*absent\.jsonl"):
        read_questions(tmp_path / "absent.jsonl")


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_asked_is_what_is_trained_on(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]]
) -> None:
    """Question and reference together are the conversation that `read_records` gives."""
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    file = tmp_path_factory.mktemp("q") / "q.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    (asked,), (trained,) = read_questions(file), read_records(file)
    assert list(asked.answered()) == trained.messages
    assert asked.references == (turns[-1][1],)
