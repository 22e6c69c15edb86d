"""JSON Lines to what is preferred, rated or asked; every error says file:line and the key.

Three kinds of record, and the objective asks for the one it needs, so nothing is guessed:

    Pair       prompt, chosen, rejected (margin)      read_pairs
    Rated      prompt, completion, label              read_rated
    Prompted   prompt, and any further fields         read_prompts

A prompt is a text, which goes to the model as it stands, or messages, which go through the chat
template. It is written as `prompt` (either), `messages`, ShareGPT's `conversations` or Alpaca's
`instruction/input`. Sides follow it in its own form: a text continues a text and answers messages,
a message or a list of them continues messages. Sides that are whole conversations need no prompt:
it is the messages that both begin with. A row without one side is an error, never half a pair.

How it differs from the known trainers: they tell the same shapes by their columns once for the
whole file, cut a common beginning of two *strings* for a prompt (here that is refused: where a
sentence's beginning ends is not to be told), and rate by truth of anything that Python calls true.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

from lora_core.data.lines import read_rows
from lora_core.data.messages import (
    alpaca_user,
    checked_messages,
    checked_tools,
    from_sharegpt,
    ungraded,
    with_system,
)
from lora_core.data.records import Record, rename_columns

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]
"""Raw text, or messages."""

PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction")


@dataclass(frozen=True)
class Pair(Record):
    """Two completions of a prompt, the better one first."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    """how much better, in the scores' unit"""
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Rated(Record):
    """A completion that is good (True) or bad on its own."""

    prompt: Text
    completion: Text
    label: bool
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Prompted(Record):
    """A prompt to be answered, and what the reward is told about it."""

    prompt: Text
    fields: dict[str, Any]
    tools: list[Any] | None = None


def read_pairs(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Pair]:
    """Pairs of a JSON Lines file.

    Args:
        path: the file, UTF-8, one JSON object a line.
        columns: this library's name to the file's name, {"chosen": "answer_a"}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: file:line of a row that is no pair, and the key.
    """
    for where, row in read_rows(path):
        yield parse_pair(rename_columns(row, columns or {}, where), where)


def read_rated(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Rated]:
    """Rated completions of a JSON Lines file; arguments and errors as `read_pairs`'."""
    for where, row in read_rows(path):
        yield parse_rated(rename_columns(row, columns or {}, where), where)


def read_prompts(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Prompted]:
    """Prompts of a JSON Lines file; arguments and errors as `read_pairs`'."""
    for where, row in read_rows(path):
        yield parse_prompted(rename_columns(row, columns or {}, where), where)


def parse_pair(row: Mapping[str, Any], where: str = "record") -> Pair:
    """One JSON object as a pair; `where` stands at the front of error messages."""
    _need(row, ("chosen", "rejected"), where, "a pair")
    prompt = _prompt(row, where)
    chosen, rejected = (_side(row, key, where) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversations(prompt, chosen, rejected, where)
    elif prompt is None:
        raise ValueError(
            f"{where}: a pair of texts needs the prompt they answer; without one, write chosen and "
            "rejected as lists of messages that begin alike"
        )
    assert prompt is not None  # seen just now, whichever form the sides have
    sides = {"chosen": chosen, "rejected": rejected}
    before, (better, worse) = _in_one_form(prompt, sides, where)
    return Pair(where, before, better, worse, _margin(row, where), checked_tools(row, where))


def parse_rated(row: Mapping[str, Any], where: str = "record") -> Rated:
    """One JSON object as a rated completion; `where` stands at the front of error messages."""
    _need(row, ("completion", "label"), where, "a rated completion")
    prompt = _prompt(row, where)
    if prompt is None:
        raise ValueError(f"{where}: no prompt; keys are {sorted(row)}")
    label = row["label"]
    if not isinstance(label, bool | int) or label not in (0, 1):
        raise ValueError(f"{where}: label must be true or false, or 1 or 0; got {label!r}")
    completion = _side(row, "completion", where)
    before, (after,) = _in_one_form(prompt, {"completion": completion}, where)
    return Rated(where, before, after, bool(label), checked_tools(row, where))


def parse_prompted(row: Mapping[str, Any], where: str = "record") -> Prompted:
    """One JSON object as a prompt; `where` stands at the front of error messages."""
    prompt = _prompt(row, where)
    if prompt is None:
        raise ValueError(
            f"{where}: no prompt; keys are {sorted(row)} (map another name: "
            "--columns prompt=question)"
        )
    if not prompt:
        raise ValueError(f"{where}: prompt is empty; there is nothing to answer")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: the prompt ends with an assistant's turn; it must end with what is to be "
            "answered (keep a reference answer in a field of its own)"
        )
    if "completion" in row:
        raise ValueError(
            f"{where}: completion is what the model will write; give a reference answer another "
            "name: --columns answer=completion"
        )
    key = _prompt_key(row, where)
    used = {key, "tools", "system"} | ({"input"} if key == "instruction" else set())
    fields = {name: value for name, value in row.items() if name not in used}
    return Prompted(where, prompt, fields, checked_tools(row, where))


# --- the prompt ---


def _prompt_key(row: Mapping[str, Any], where: str) -> str | None:
    """The key that holds the row's prompt; None where there is none."""
    found = [key for key in PROMPT_KEYS if row.get(key) is not None]
    if len(found) > 1 and found[0] != "prompt":
        raise ValueError(f"{where}: {' and '.join(found)} are prompts; leave all but one out")
    return found[0] if found else None


def _prompt(row: Mapping[str, Any], where: str) -> Text | None:
    """The row's prompt in whichever of its forms; None where it has none."""
    key = _prompt_key(row, where)
    if key is None:
        return None
    value = row[key]
    if key == "instruction":
        value = [alpaca_user(row, where)]
    elif isinstance(value, str) and key == "prompt":
        if not row.get("system"):
            return value
        value = [{"role": "user", "content": value}]  # a system's text makes it a conversation
    elif not isinstance(value, list):
        wanted = "a string or a list of messages" if key == "prompt" else "a list of messages"
        raise ValueError(f"{where}: {key} must be {wanted}; got {type(value).__name__}")
    return checked_messages(with_system(row, _turns(value, where, key)), f"{where}: {key}")


def _turns(value: list[Any], where: str, key: str) -> list[Any]:
    return [from_sharegpt(turn, f"{where}: {key}[{i}]") for i, turn in enumerate(value)]


# --- the sides ---


def _need(row: Mapping[str, Any], keys: Iterable[str], where: str, what: str) -> None:
    for key in keys:
        if row.get(key) is None:
            held = "is null" if key in row else f"is missing; keys are {sorted(row)}"
            raise ValueError(
                f"{where}: {key} {held}; {what} needs it (another name: --columns {key}=NAME)"
            )


def _side(row: Mapping[str, Any], key: str, where: str) -> Text:
    """A text, or messages: a list of them, or ShareGPT's single turn."""
    value = row[key]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where}: {key} is empty")
        return value
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: {key} must be a string or a list of messages; got {type(value).__name__}"
        )
    return checked_messages(_turns(value, where, key), f"{where}: {key}")


def _conversations(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], where: str
) -> tuple[Text, list[Message], list[Message]]:
    """Prompt and sides of two lists of messages, which may repeat the prompt or hold it alone."""
    alike = _common(chosen, rejected)
    if prompt is None and not alike:
        raise ValueError(
            f"{where}: chosen and rejected begin with different messages and there is no prompt; "
            "both sides answer one prompt"
        )
    if not alike:
        assert prompt is not None  # seen just now
        return prompt, chosen, rejected
    before = chosen[:alike]
    said = [m["content"] for m in before]
    repeated = prompt is None or (
        prompt in said if isinstance(prompt, str) else prompt == before[: len(prompt)]
    )
    if not repeated and before[0]["role"] != "assistant":
        raise ValueError(
            f"{where}: chosen and rejected begin with messages of their own, and the prompt is not "
            "among them; leave the prompt out, or these messages"
        )
    if not repeated:  # both sides begin with the same answer: a turn of theirs
        assert prompt is not None
        return prompt, chosen, rejected
    return before, chosen[alike:], rejected[alike:]


def _common(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations begin with; each keeps one of its own."""
    alike = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        alike += 1
    return alike


def _in_one_form(prompt: Text, sides: Mapping[str, Text], where: str) -> tuple[Text, list[Text]]:
    """A text before texts, or messages before messages; what an assistant said before is context.

    Raises:
        ValueError: a side that no assistant says anything in.
    """
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides.values()):
        return prompt, list(sides.values())
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else ungraded(prompt)
    after: list[Text] = []
    for key, side in sides.items():
        turns = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        said = [m for m in turns if m["role"] == "assistant" and m.get("train", True)]
        if not any(m["content"] or m.get("tool_calls") for m in said):
            raise ValueError(f"{where}: {key} has no assistant's answer to be judged")
        after.append(turns)
    return before, after


def _margin(row: Mapping[str, Any], where: str) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not isfinite(margin):
        raise ValueError(f"{where}: margin must be a finite number; got {margin!r}")
    return float(margin)
