"""Prompts: read in each of their forms, tokenised as generation and training rows begin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.data import SFTDataset, Tokenizer
from lora_core.data.pair_rows import PromptRows
from lora_core.data.preferences import parse_prompted, read_prompts

USER = {"role": "user", "content": "what is x?"}
SYSTEM = {"role": "system", "content": "be short"}
BOT = {"role": "assistant", "content": "a letter"}


@pytest.mark.parametrize(
    ("row", "prompt", "fields"),
    [
        ({"prompt": "x = ", "answer": 4}, "x = ", {"answer": 4}),
        ({"prompt": [USER], "tests": ["a"]}, [USER], {"tests": ["a"]}),
        ({"messages": [SYSTEM, USER], "level": None}, [SYSTEM, USER], {"level": None}),
        ({"conversations": [{"from": "human", "value": "what is x?"}]}, [USER], {}),
        ({"prompt": "what is x?", "system": "be short"}, [SYSTEM, USER], {}),
        ({"prompt": [USER], "input": "kept", "messages": "too"}, [USER], {"input": "kept"}),
        ({"prompt": "p", "label": True, "chosen": "c"}, "p", {"label": True, "chosen": "c"}),
    ],
)
def test_prompts_in_each_form(row: dict[str, Any], prompt: Any, fields: dict[str, Any]) -> None:
    record = parse_prompted(row)
    assert record.prompt == prompt
    assert {k: v for k, v in record.fields.items() if k != "messages"} == fields


def test_an_alpaca_prompt_is_the_users_turn() -> None:
    record = parse_prompted({"instruction": "add", "input": "1 2", "gold": "3"})
    assert [m["content"] for m in record.prompt] == ["add\n\n1 2"]
    assert record.fields == {"gold": "3"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "4"}, r":1: no prompt; keys are \['answer'\]"),
        ({"prompt": ""}, ":1: prompt is empty"),
        ({"prompt": 3}, ":1: prompt must be a string or a list of messages; got int"),
        ({"prompt": []}, ":1: prompt is an empty list"),
        ({"messages": "x"}, ":1: messages must be a list of messages; got str"),
        ({"messages": [USER, BOT]}, ":1: the prompt ends with an assistant's turn"),
        ({"messages": [USER], "conversations": [USER]}, ":1: messages and conversations are"),
        ({"prompt": "p", "completion": "c"}, "--columns answer=completion"),
        (
            {"prompt": [{"role": "usr", "content": "x"}]},
            r"prompt\[0\].role: unknown role 'usr'",
        ),
        ({"prompt": [USER], "tools": "{"}, ":1: tools is a string that is not JSON"),
    ],
)
def test_bad_prompts_are_named(jsonl: Callable[..., Path], row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(read_prompts(jsonl(row)))


def test_columns_give_other_names(jsonl: Callable[..., Path]) -> None:
    file = jsonl({"question": "q", "completion": "c"})
    (record,) = read_prompts(file, {"prompt": "question", "answer": "completion"})
    assert (record.prompt, record.fields) == ("q", {"answer": "c"})


def test_rows_hold_what_generation_goes_on_from(jsonl: Callable[..., Path], tok: Tokenizer) -> None:
    file = jsonl({"prompt": [USER], "answer": 4}, {"prompt": "x = "})
    rows = PromptRows.from_jsonl(file, tok)
    chat, raw = rows
    assert list(chat.ids) == tok.encode_prompt([USER])
    assert list(raw.ids) == tok.encode_prompt("x = ")
    assert (chat.prompt, chat.fields, chat.where) == ([USER], {"answer": 4}, f"{file}:1")
    # a supervised row of this conversation begins with the same ids
    row = SFTDataset([{"messages": [USER, BOT]}], tok)[0]["input_ids"]
    assert row[: len(chat.ids)] == list(chat.ids)


def test_families_prompt_as_their_rows_begin(families: dict[str, Tokenizer]) -> None:
    for tok in families.values():
        (prompt,) = PromptRows([{"prompt": [USER]}], tok)
        row = SFTDataset([{"messages": [USER, BOT]}], tok)[0]
        first = next(i for i, label in enumerate(row["labels"]) if label >= 0)
        # the text is the same; alpaca's last line feed may merge with what follows
        assert tok.decode(row["input_ids"][:first]) == tok.decode(prompt.ids)


def test_what_is_left_out_is_counted_and_named(jsonl: Callable[..., Path], tok: Tokenizer) -> None:
    file = jsonl({"prompt": "x" * 90}, {"prompt": "a <|im_end|> b"}, {"prompt": "x"})
    rows = PromptRows.from_jsonl(file, tok, max_length=8)
    assert rows.where == [f"{file}:3"]
    assert dict(rows.report.total.dropped) == {
        "prompt of more than 8 tokens": 1,
        "control token in the content": 1,
    }
    said = rows.report.why_dropped()
    assert f"{file}:1" in said
    assert f"{file}:2: prompt holds the control token '<|im_end|>'" in said
    with pytest.raises(ValueError, match=r"no prompt is left to train on. Left out: 1 x prompt of"):
        PromptRows([{"prompt": "x" * 90}], tok, max_length=8)
    assert len(PromptRows([{"prompt": "a <|im_end|> b"}], tok, control_text="keep")) == 1


def test_settings_out_of_range(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens; got 1"):
        PromptRows([{"prompt": "x"}], tok, max_length=1)
    with pytest.raises(ValueError, match="train_on all grades the prompt"):
        PromptRows([{"prompt": "x"}], tok, train_on="all")


def test_a_split_keeps_a_prompts_rows_on_one_side(tok: Tokenizer) -> None:
    rows = PromptRows([{"prompt": f"q{i % 7}", "n": i} for i in range(40)], tok)
    train, held_out = rows.split(0.3, seed=3)
    assert len(train) + len(held_out) == 40
    assert held_out
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    again = rows.split(0.3, seed=3)[1]
    assert [r.fields for r in again] == [r.fields for r in held_out]
    with pytest.raises(ValueError, match="cannot be split"):
        PromptRows([{"prompt": "q", "n": i} for i in range(4)], tok).split(0.5)


def test_files_are_mixed_by_weight(jsonl: Callable[..., Path], tok: Tokenizer) -> None:
    a = jsonl({"prompt": "a"}, name="a.jsonl")
    b = jsonl(*({"prompt": f"b{i}"} for i in range(4)), name="b.jsonl")
    rows = PromptRows.from_jsonl([(a, 3.0), (b, 0.5)], tok)
    assert sorted(rows.source) == [0, 0, 0, 1, 1]
    assert rows.names == ["a.jsonl", "b.jsonl"]
    assert rows[-1].prompt == rows[4].prompt
    assert [r.prompt for r in rows[1:3]] == [rows[1].prompt, rows[2].prompt]
    assert rows.lengths == [len(row.ids) for row in rows]
