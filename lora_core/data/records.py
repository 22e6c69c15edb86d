"""JSON Lines to typed records, one at a time; every error says file:line and the offending key.

What it does: `read_records(path)` yields one `Record` a line: a `Chat`, a `Completion`, a
`PlainText` or `Tokens`. Chats come from `messages`, ShareGPT's `conversations` and Alpaca's
`instruction/input/output`, all brought to the same messages. Formats of other objectives
(`chosen/rejected`, `text/label` …) are recognised and refused by name, so that preference data
never trains as something else.

How: the format is told by the keys of each line, after `columns` has renamed them. The file is
read line by line in binary, so a bad byte is reported with its line, and nothing is kept.

How it differs from the `datasets` library: no cache folder, no schema guessed from the first rows,
no Arrow; a wrong type on line 70 000 is an error on line 70 000. The trade-off is one pass of pure
Python, some 100 000 short lines a second.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.data.lines import read_rows
from lora_core.data.messages import (
    alpaca_user,
    checked_messages,
    checked_tools,
    from_sharegpt,
    typed,
    ungraded,
    with_system,
)


@dataclass(frozen=True)
class Record:
    """What every record has: `where`, its file:line for messages."""

    where: str


@dataclass(frozen=True)
class Chat(Record):
    """Messages with `role`, `content` and, per message, an optional `train` (bool)."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion(Record):
    """Raw text before and after the point where the model takes over."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class PlainText(Record):
    """A document; every token of it is graded."""

    text: str


@dataclass(frozen=True)
class Tokens(Record):
    """Ready ids; `labels` are the ids, -100 where not graded (not shifted), or None for all."""

    input_ids: list[int]
    labels: list[int] | None = field(default=None)


# (keys that must be there, name, the objective it belongs to or None for supervised); first match
_FORMATS: tuple[tuple[frozenset[str], str, str | None], ...] = tuple(
    (frozenset(keys.split()), keys.replace(" ", "/"), objective)
    for keys, objective in (
        ("chosen rejected", "preference training (--objective dpo, ipo, simpo, orpo, reward)"),
        ("messages", None),
        ("conversations", None),
        ("input_ids", None),
        ("prompt completion label", "KTO (--objective kto)"),
        ("prompt completion", None),
        ("instruction output", None),
        ("text label", "sequence classification"),
        ("tokens tags", "token classification"),
        ("question context answers", "extractive question answering"),
        ("text", None),
        ("prompt", "reinforcement learning (--objective grpo, rloo, ppo, rft), by a reward"),
    )
)
_SUPERVISED = ", ".join(name for _, name, objective in _FORMATS if objective is None)


def parse_columns(text: str) -> dict[str, str]:
    """`"prompt=question,completion=answer"` as {"prompt": "question", "completion": "answer"}.

    Raises:
        ValueError: an entry is not NAME=COLUMN, or a name is given twice.
    """
    columns: dict[str, str] = {}
    for entry in text.split(","):
        name, equals, column = (part.strip() for part in entry.partition("="))
        if not (name and equals and column):
            raise ValueError(f"columns entry {entry!r} is not NAME=COLUMN, as in prompt=question")
        if name in columns:
            raise ValueError(f"columns names {name!r} twice")
        columns[name] = column
    return columns


def parse_sources(words: Iterable[str]) -> list[tuple[str, float]]:
    """`FILE[:weight]` words as (file, weight) pairs, the weight 1 where none is given.

    Raises:
        ValueError: a weight that is not above 0.
    """
    pairs = []
    for word in words:
        path, colon, last = word.rpartition(":")
        try:
            weight = float(last) if colon else None
        except ValueError:  # the colon belongs to the path
            weight = None
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {path} must be above 0; got {last}")
        pairs.append((word, 1.0) if weight is None else (path, weight))
    return pairs


def read_records(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Typed records of a JSON Lines file.

    Args:
        path: the file, UTF-8, one JSON object a line.
        columns: this library's name to the file's name, {"prompt": "question"}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read_rows`; also an unknown format, key type or role.
    """
    for where, row in read_rows(path):
        yield parse_record(rename_columns(row, columns or {}, where), where)


def parse_records(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> Iterator[Record]:
    """Typed records of objects in memory; error messages count them from 0."""
    empty = True
    for number, row in enumerate(rows):
        empty = False
        where = f"records[{number}]"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be a mapping; got {type(row).__name__}")
        yield parse_record(rename_columns(row, columns or {}, where), where)
    if empty:
        raise ValueError("no records given")


def parse_record(row: Mapping[str, Any], where: str = "record") -> Record:
    """One JSON object as a typed record; `where` stands at the front of error messages."""
    for keys, name, objective in _FORMATS:
        if keys <= row.keys():
            if objective is not None:
                raise ValueError(
                    f"{where}: {name} is data for {objective}, not for fine-tuning by sft"
                )
            return _PARSERS[name](row, where)
    raise ValueError(
        f"{where}: keys {sorted(row)} match no format ({_SUPERVISED}); if they only bear other "
        "names, map them: --columns prompt=question,completion=answer"
    )


def rename_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> dict[str, Any]:
    """A row with this library's names for the file's; `where` stands at the front of messages.

    Raises:
        ValueError: the row has no such column.
    """
    for name, column in columns.items():
        if column not in row:
            raise ValueError(
                f"{where}: no key {column!r} (columns maps {name} to it); keys are {sorted(row)}"
            )
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {name: row[column] for name, column in columns.items()}


# --- one parser a format ---


def _parse_messages(row: Mapping[str, Any], where: str) -> Chat:
    return _chat(typed(row, "messages", list, where), row, where, "messages")


def _parse_sharegpt(row: Mapping[str, Any], where: str) -> Chat:
    place = f"{where}: conversations"
    turns = typed(row, "conversations", list, where)
    messages = [from_sharegpt(turn, f"{place}[{index}]") for index, turn in enumerate(turns)]
    return _chat(with_system(row, messages), row, where, "conversations")


def _parse_alpaca(row: Mapping[str, Any], where: str) -> Chat:
    user = alpaca_user(row, where)
    answer = {"role": "assistant", "content": typed(row, "output", str, where)}
    return _chat(with_system(row, [user, answer]), row, where, "instruction/output")


def _parse_completion(row: Mapping[str, Any], where: str) -> Record:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _chat(prompt, row, where, "prompt").messages
        return _chat(ungraded(before) + completion, row, where, "prompt + completion")
    return Completion(where, typed(row, "prompt", str, where), typed(row, "completion", str, where))


def _parse_text(row: Mapping[str, Any], where: str) -> PlainText:
    return PlainText(where, typed(row, "text", str, where))


def _parse_tokens(row: Mapping[str, Any], where: str) -> Tokens:
    ids = _integers(row, "input_ids", where)
    if "attention_mask" in row and not all(_integers(row, "attention_mask", where)):
        raise ValueError(f"{where}: attention_mask hides tokens; store rows without padding")
    if row.get("labels") is None:
        return Tokens(where, ids)
    labels = _integers(row, "labels", where)
    if len(labels) != len(ids):
        raise ValueError(f"{where}: {len(ids)} input_ids but {len(labels)} labels")
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (-100, token):
            raise ValueError(
                f"{where}: labels[{index}] is {label}, input_ids[{index}] is {token}; labels are "
                "the input ids or -100, not shifted (the loss shifts them once)"
            )
    return Tokens(where, ids, labels)


_PARSERS: dict[str, Callable[[Mapping[str, Any], str], Record]] = {
    "messages": _parse_messages,
    "conversations": _parse_sharegpt,
    "input_ids": _parse_tokens,
    "prompt/completion": _parse_completion,
    "instruction/output": _parse_alpaca,
    "text": _parse_text,
}


# --- checks ---


def _chat(messages: list[Any], row: Mapping[str, Any], where: str, name: str) -> Chat:
    """A checked chat; `name` is what error messages call the list of messages."""
    checked = checked_messages(messages, f"{where}: {name}")
    return Chat(where, checked, checked_tools(row, where))


def _integers(row: Mapping[str, Any], key: str, where: str) -> list[int]:
    values: list[int] = typed(row, key, list, where)
    for index, value in enumerate(values):
        if type(value) is not int:
            raise ValueError(f"{where}: {key}[{index}] must be an integer; got {value!r}")
    return values
