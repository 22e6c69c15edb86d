"""Pairs and rated completions: every shape that users have, and every error with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.data.preferences import parse_pair, parse_rated, read_pairs, read_rated

USER = {"role": "user", "content": "what is x?"}
SYSTEM = {"role": "system", "content": "be short"}
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
GOOD = {"role": "assistant", "content": "a letter"}
BAD = {"role": "assistant", "content": "no idea"}
CONTEXT = {**HELLO, "train": False}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "x = ", "chosen": "4", "rejected": "5"}, "x = ", "4", "5"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], [GOOD], [BAD]),
        # texts that answer messages, messages that answer a text
        (
            {"prompt": [USER], "chosen": "a letter", "rejected": "no idea"},
            [USER],
            [GOOD],
            [BAD],
        ),
        ({"prompt": "what is x?", "chosen": [GOOD], "rejected": "no idea"}, [USER], [GOOD], [BAD]),
        # whole conversations, their prompt left out, repeated in words or in messages
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD], [BAD]),
        (
            {"prompt": "what is x?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            [USER],
            [GOOD],
            [BAD],
        ),
        (
            {"prompt": [HI], "chosen": [HI, HELLO, USER, GOOD], "rejected": [HI, HELLO, USER, BAD]},
            [HI, CONTEXT, USER],
            [GOOD],
            [BAD],
        ),
        # both sides begin with the same answer, and go on differently
        (
            {"prompt": [HI], "chosen": [HELLO, USER, GOOD], "rejected": [HELLO, USER, BAD]},
            [HI],
            [HELLO, USER, GOOD],
            [HELLO, USER, BAD],
        ),
        # turns of several kinds before one message each, as ShareGPT's files have them
        (
            {
                "conversations": [{"from": "human", "value": "what is x?"}],
                "chosen": {"from": "gpt", "value": "a letter"},
                "rejected": {"from": "gpt", "value": "no idea"},
            },
            [USER],
            [GOOD],
            [BAD],
        ),
        (
            {"system": "be short", "prompt": "what is x?", "chosen": "a letter", "rejected": "?"},
            [SYSTEM, USER],
            [GOOD],
            [{"role": "assistant", "content": "?"}],
        ),
        ({"messages": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], [GOOD], [BAD]),
    ],
)
def test_pairs_in_each_shape(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    pair = parse_pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)
    assert pair.margin is None


def test_an_alpaca_pair_answers_the_instruction() -> None:
    row = {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4", "margin": 2}
    pair = parse_pair(row)
    turns: list[Any] = [*pair.prompt, *pair.chosen, *pair.rejected]
    assert [m["content"] for m in turns] == ["add\n\n1 2", "3", "4"]
    assert pair.margin == 2.0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "rejected": "b"}, ":1: chosen is missing; keys are"),
        ({"prompt": "p", "chosen": "a"}, r":1: rejected is missing.*--columns rejected=NAME"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, ":1: chosen is null; a pair needs it"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, ":1: chosen is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, ":1: rejected must be a string or a list"),
        ({"prompt": "p", "chosen": [], "rejected": "b"}, ":1: chosen is an empty list"),
        ({"chosen": "a", "rejected": "b"}, ":1: a pair of texts needs the prompt they answer"),
        ({"chosen": "a", "rejected": [BAD]}, ":1: a pair of texts needs the prompt they answer"),
        (
            {"chosen": [USER, GOOD], "rejected": [HI, BAD]},
            ":1: chosen and rejected begin with",
        ),
        (
            {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            ":1: .* the prompt is not among them",
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [HI]}, ":1: rejected has no assistant"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "content": ""}]},
            ":1: rejected has no assistant",
        ),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [BAD]},
            r":1: chosen\[0\].content must be a string; it is missing",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"},
            ":1: margin must be a finite number; got 'big'",
        ),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, ":1: prompt must be a string or a list"),
    ],
)
def test_bad_pairs_are_named(jsonl: Callable[..., Path], row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(read_pairs(jsonl(row)))


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_rated_completions(label: Any) -> None:
    raw = parse_rated({"prompt": "x = ", "completion": "4", "label": label})
    assert (raw.prompt, raw.completion, raw.label) == ("x = ", "4", bool(label))
    assert raw.label is bool(label)
    chat = parse_rated({"prompt": [USER], "completion": [GOOD], "label": label})
    assert (chat.prompt, chat.completion) == ([USER], [GOOD])
    mixed = parse_rated({"prompt": [USER], "completion": "a letter", "label": label})
    assert (mixed.prompt, mixed.completion) == ([USER], [GOOD])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "label": True}, ":1: completion is missing"),
        ({"prompt": "p", "completion": "c"}, ":1: label is missing"),
        ({"completion": "c", "label": True}, ":1: no prompt; keys are"),
        (
            {"prompt": "p", "completion": "c", "label": "yes"},
            ":1: label must be true or false, or 1 or 0; got 'yes'",
        ),
        ({"prompt": "p", "completion": "c", "label": 2}, "got 2"),
        ({"prompt": "p", "completion": "c", "label": 1.0}, "got 1.0"),
        ({"prompt": [USER], "completion": [HI], "label": 1}, ":1: completion has no assistant's"),
    ],
)
def test_bad_ratings_are_named(jsonl: Callable[..., Path], row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(read_rated(jsonl(row)))


def test_columns_give_other_names(jsonl: Callable[..., Path]) -> None:
    file = jsonl({"q": "p", "win": "a", "lose": "b"})
    (pair,) = read_pairs(file, {"prompt": "q", "chosen": "win", "rejected": "lose"})
    assert (pair.prompt, pair.chosen, pair.rejected, pair.where) == ("p", "a", "b", f"{file}:1")
