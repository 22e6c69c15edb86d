"""Questions with choices, read from JSON Lines; every error says file:line.

    {"question": "What is …?",        "choices": ["a", "b"], "answer": 1}       a user's message
    {"prompt": "The capital of …",    "choices": [" Paris", " Rome"], "answer": "A"}
    {"messages": [{"role": …}, …],    "choices": [...], "answer": " Paris"}

A prompt is raw text, and a choice is put behind it as it stands. The answer is the right choice's
number, from 0; a letter, from A; or its text. Text is looked for first, so that a choice "B" is
that choice; numbers written as text ("1") are refused, since data sets count them from 0 and from
1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from lora_core.data import Chat, parse_record
from lora_core.data.lines import read_rows

Messages = Sequence[Mapping[str, Any]]
_CONTEXTS = ("messages", "prompt", "question")


@dataclass(frozen=True)
class Choice:
    """One question.

    Raises:
        ValueError: fewer than two choices, one that is empty, or an answer that is none of them.
    """

    context: str | Messages
    """raw text, or messages for the chat template"""
    choices: tuple[str, ...]
    """continuations, at least two"""
    answer: int
    """number of the right one"""
    where: str = "question"
    """file:line, for messages"""

    def __post_init__(self) -> None:
        count = len(self.choices)
        if count < 2:
            raise ValueError(f"{self.where}: a choice needs two or more choices; got {count}")
        for i, text in enumerate(self.choices):
            if not isinstance(text, str) or not text:
                raise ValueError(
                    f"{self.where}: choices[{i}] must be a text that is not empty; got {text!r}"
                )
        if not 0 <= self.answer < count:
            raise ValueError(
                f"{self.where}: answer {self.answer} is out of range: {count} choices are "
                f"numbered 0 … {count - 1}"
            )


def read_choices(path: str | Path) -> list[Choice]:
    """Read questions with choices.

    Args:
        path: JSON Lines, in the shapes above; further fields are left alone.

    Returns:
        The questions in the file's order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of the shapes, with its file:line.
    """
    return [_parsed(row, where) for where, row in read_rows(path)]


def _parsed(row: Mapping[str, Any], where: str) -> Choice:
    given = [name for name in _CONTEXTS if name in row]
    if len(given) != 1:
        raise ValueError(
            f"{where}: a question needs one of messages, prompt and question; keys are "
            f"{sorted(row)}"
        )
    for name in ("choices", "answer"):
        if name not in row:
            raise ValueError(f"{where}: no {name!r}; keys are {sorted(row)}")
    choices = row["choices"]
    if not isinstance(choices, list):
        raise ValueError(f"{where}: choices must be a list of texts; got {choices!r:.80}")
    context = _context(row, given[0], where)
    return Choice(context, tuple(choices), _number(row["answer"], choices, where), where)


def _context(row: Mapping[str, Any], name: str, where: str) -> str | Messages:
    if name == "messages":
        record = parse_record({"messages": row["messages"]}, where)
        assert isinstance(record, Chat)
        return record.messages
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {name} must be a text; got {text!r:.80}")
    return text if name == "prompt" else [{"role": "user", "content": text}]


def _number(answer: object, choices: Sequence[object], where: str) -> int:
    """The number of the right choice."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    if isinstance(answer, str) and answer in choices:
        if choices.count(answer) > 1:
            raise ValueError(f"{where}: answer {answer!r} is several choices: give its number")
        return choices.index(answer)
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    raise ValueError(
        f"{where}: answer {answer!r} is no choice: give its number from 0, its letter (A … "
        f"{letters[-1:]}) or its text"
    )
