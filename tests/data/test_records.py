"""Every format becomes the right record; every bad file an error with file:line and the key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import (
    Chat,
    Completion,
    PlainText,
    Tokens,
    parse_columns,
    parse_record,
    parse_records,
    parse_sources,
    read_records,
)

USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}


def test_messages_keep_train_flags_and_further_keys(jsonl: Callable[..., Path]) -> None:
    file = jsonl(
        {
            "messages": [USER, {**BOT, "train": False, "name": "n"}, {**BOT, "weight": 1}],
            "tools": json.dumps([{"name": "f"}]),
        }
    )
    (record,) = read_records(file)
    expected = [USER, {**BOT, "train": False, "name": "n"}, {**BOT, "train": True}]
    assert record == Chat(f"{file}:1", expected, [{"name": "f"}])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Chat("record", [USER, BOT]),
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, BOT]},
            Chat("record", [{"role": "system", "content": "s"}, USER, BOT]),
        ),
        (
            {"instruction": "q", "input": "", "output": "a"},
            Chat("record", [{**USER, "instruction": "q", "input": ""}, BOT]),
        ),
        (
            {"instruction": "q", "input": "i", "output": "a", "text": "ignored"},
            Chat("record", [{**USER, "content": "q\n\ni", "instruction": "q", "input": "i"}, BOT]),
        ),
        ({"prompt": "p", "completion": "c"}, Completion("record", "p", "c")),
        (
            {"prompt": [USER, BOT, USER], "completion": [BOT]},
            Chat("record", [USER, {**BOT, "train": False}, USER, BOT]),
        ),
        ({"text": "t"}, PlainText("record", "t")),
        ({"input_ids": [1, 2]}, Tokens("record", [1, 2])),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, Tokens("record", [1, 2], [-100, 2])),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, BOT]},
            Chat("record", [USER, BOT]),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            Chat("record", [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}]),
        ),
    ],
)
def test_formats(row: dict[str, Any], expected: object) -> None:
    assert parse_record(row) == expected


@pytest.mark.parametrize(
    ("row", "objective"),
    [
        ({"chosen": "a", "rejected": "b", "prompt": "p"}, r"preference training \(--objective dpo"),
        ({"chosen": [BOT], "rejected": [BOT], "messages": [BOT]}, "preference training"),
        ({"prompt": "p", "completion": "c", "label": True}, r"KTO \(--objective kto"),
        ({"prompt": "p", "answer": "4"}, r"reinforcement learning \(--objective grpo"),
        ({"text": "t", "label": 1}, "sequence classification"),
        ({"tokens": ["a"], "tags": [0]}, "token classification"),
        ({"question": "q", "context": "c", "answers": {}}, "extractive question answering"),
    ],
)
def test_other_objectives_are_named(row: dict[str, Any], objective: str) -> None:
    with pytest.raises(ValueError, match=f"is data for {objective}.*not for fine-tuning"):
        parse_record(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, r"keys \['a'\] match no format .*--columns prompt=question"),
        ({"messages": "x"}, "messages must be a list; got str"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": ["x"]}, r"messages\[0\] must be an object; got str"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no 'role'"),
        (
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            r"messages\[1\].role: unknown role 'asistant'.*did you mean 'assistant'\?",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"unknown role \['user'\]"),
        ({"messages": [{"role": "user"}]}, r"\[0\].content must be a string; it is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a string; it is a int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"messages\[0\].content has a part that is not text",
        ),
        ({"messages": [{**BOT, "train": "no"}]}, "train must be true or false; got 'no'"),
        ({"messages": [{**BOT, "weight": 0.5}]}, "weight must be 0 or 1; got 0.5"),
        ({"messages": [{**USER, "train": True}]}, "train is true for role 'user'"),
        ({"messages": [USER], "tools": "{"}, "tools is a string that is not JSON"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools must be a list; got dict"),
        (
            {"conversations": [{"from": "humam", "value": "x"}]},
            r"conversations\[0\].from: unknown role 'humam'.*did you mean 'human'",
        ),
        ({"conversations": [{"from": {}, "value": "x"}]}, r"unknown role \{\}"),
        ({"instruction": 1, "output": "x"}, "instruction must be a string; got int"),
        ({"instruction": "x", "input": [], "output": "x"}, "input must be a string; got list"),
        ({"prompt": "x", "completion": None}, "completion must be a string; got NoneType"),
        ({"prompt": [USER], "completion": "x"}, "prompt must be a string; got list"),
        ({"text": ["x"]}, "text must be a string; got list"),
        ({"input_ids": [1, 2.0]}, r"input_ids\[1\] must be an integer; got 2.0"),
        ({"input_ids": [True]}, r"input_ids\[0\] must be an integer; got True"),
        ({"input_ids": [1], "labels": [1, 2]}, "1 input_ids but 2 labels"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, r"labels\[0\] is 2.*not shifted"),
        ({"input_ids": [1, 0], "attention_mask": [1, 0]}, "attention_mask hides tokens"),
    ],
)
def test_bad_values_name_line_and_key(
    jsonl: Callable[..., Path], row: dict[str, Any], message: str
) -> None:
    file = jsonl({"text": "fine"}, "", row)
    records = read_records(file)
    assert next(records) == PlainText(f"{file}:1", "fine")
    with pytest.raises(ValueError, match=message) as caught:
        next(records)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b'{"text": "a"'], r":1: not JSON: .* at column 13, near .*one JSON object a line"),
        ([b'{"text": "a"}', b"nope"], r":2: not JSON"),
        ([b'[{"text": "a"}]'], r":1: a line must be a JSON object .*got list"),
        ([b'{"text": "a", "text": "b"}'], r":1: key 'text' stands twice"),
        ([b'{"text": "ok"}', b'{"text": "\xff"}'], r":2: not UTF-8: byte 0xff at position 11"),
        (['{"text": "a"}'.encode("utf-16")], r":1: the file is UTF-16; save it as UTF-8"),
        ([rb'{"text": "\ud83d"}'], r":1: contains half of a surrogate pair"),
        ([b"[" * 100_000], r":1: "),
        ([], r"is empty: no record in it"),
        ([b"", b"  "], r"is empty: no record in it"),
    ],
)
def test_bad_files(jsonl: Callable[..., Path], lines: list[bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_records(jsonl(*lines)))


def test_utf8_byte_order_mark_is_passed_over(jsonl: Callable[..., Path]) -> None:
    file = jsonl(b'\xef\xbb\xbf{"text": "a"}')
    assert list(read_records(file)) == [PlainText(f"{file}:1", "a")]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file '.*nowhere\.jsonl'"):
        list(read_records(tmp_path / "nowhere.jsonl"))


def test_the_file_is_streamed(jsonl: Callable[..., Path]) -> None:
    file = jsonl({"text": "a"}, "broken")
    assert next(read_records(file)) == PlainText(f"{file}:1", "a")  # line 2 was not parsed yet


def test_columns(jsonl: Callable[..., Path]) -> None:
    columns = parse_columns("prompt=question, completion=answer")
    assert columns == {"prompt": "question", "completion": "answer"}
    file = jsonl({"question": "q", "answer": "a", "id": 7})
    assert list(read_records(file, columns)) == [Completion(f"{file}:1", "q", "a")]
    with pytest.raises(ValueError, match=r"data.jsonl:1: no key 'query' \(columns maps prompt"):
        list(read_records(file, {"prompt": "query"}))


@pytest.mark.parametrize("text", ["", "prompt", "prompt=", "=x", "a=b,,c=d"])
def test_columns_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=COLUMN"):
        parse_columns(text)
    with pytest.raises(ValueError, match="names 'a' twice"):
        parse_columns("a=b,a=c")


def test_sources_with_weights() -> None:
    words = ["a.jsonl", "b.jsonl:0.5", "C:\\data.jsonl", "c:d.jsonl:2"]
    assert parse_sources(words) == [
        ("a.jsonl", 1.0),
        ("b.jsonl", 0.5),
        ("C:\\data.jsonl", 1.0),
        ("c:d.jsonl", 2.0),
    ]
    for bad in ("a:0", "a:-1", "a:inf", "a:nan"):
        with pytest.raises(ValueError, match="weight of a must be above 0"):
            parse_sources([bad])


def test_records_in_memory() -> None:
    assert list(parse_records([{"text": "a"}])) == [PlainText("records[0]", "a")]
    with pytest.raises(ValueError, match="no records given"):
        list(parse_records([]))
    with pytest.raises(ValueError, match=r"records\[1\] must be a mapping; got str"):
        list(parse_records([{"text": "a"}, "b"]))  # type: ignore[list-item]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "text",
        "input_ids",
        "labels",
        "role",
        "content",
        "from",
        "value",
        "tools",
        "train",
    ]
)


@given(st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON, max_size=3)), max_size=4))
def test_any_object_is_a_record_or_a_one_line_error(row: dict[str, Any]) -> None:
    try:
        record = parse_record(row, "here:1")
    except ValueError as error:
        message = str(error)
    else:
        message = record.where + ": a record"
    assert message.startswith("here:1: ")
    assert "\n" not in message
