r"""Questions out of a file of conversations: what is asked, and what a good answer is.

A row that trains a model also examines it. The last assistant turn is what a good answer looks
like; what stands before it is the question:

    {"messages": [system, user, assistant]}        user turn asked; the assistant's is the reference
    {"messages": [system, user]}                   asked; no reference
    {"prompt": "2 + 2 =", "completion": " 4"}      raw text, continued without a template
    … "references": ["four", "4"]                  several good answers, in any of these formats
    … "id": "sum-1"                                a name; without one, the line's number

A conversation in which the assistant speaks more than once is asked at its last turn, with its own
earlier turns as they are written, not as the model would have said them. (lm-eval-harness makes
such rows with one Python file a task; here the file of the task is the file of the training.)

The formats are those of `read_records`, checks and messages included: what cannot be asked is an
error with its file:line, and never passed over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.data.lines import read_rows
from lora_core.data.records import Chat, Completion, parse_record, rename_columns

Message = Mapping[str, Any]
Prompt = str | tuple[Message, ...]
_ANSWERS = {"prompt": "completion", "instruction": "output"}  # what asks -> what answers it


@dataclass(frozen=True)
class Question:
    """One thing to ask a model, and what good answers to it are."""

    id: str
    """its name, unique in its file"""
    messages: Prompt
    """turns up to the one that is asked; or raw text to continue without a template"""
    references: tuple[str, ...]
    """good answers; none where the file has none"""
    where: str
    """file:line"""
    tools: tuple[Any, ...] | None = None
    """JSON schemas that the template may list"""

    def answered(self) -> Prompt:
        """The question with its first reference as the answer: an example to put before others.

        Raises:
            ValueError: it has no reference.
        """
        if not self.references:
            raise ValueError(f"{self.where}: an example needs an answer, and this row has none")
        if isinstance(self.messages, str):
            return self.messages + self.references[0]
        return (*self.messages, {"role": "assistant", "content": self.references[0]})


def read_questions(
    path: str | Path, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Question]:
    """The questions of a JSON Lines file, in its order.

    Args:
        path: the file.
        columns: this library's name to the file's, {"prompt": "question"}.
        limit: only the first so many rows; None: all. The rest of the file is not looked at.

    Returns:
        One question a row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: file:line of a row that is not UTF-8, not JSON, of no known format, without
            anything to ask, or with an id that another row has.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more rows; got {limit}")
    found: dict[str, Question] = {}
    for where, row in read_rows(path):
        question = parse_question(rename_columns(row, columns or {}, where), where)
        if question.id in found:
            raise ValueError(
                f"{where}: id {question.id!r} is that of {found[question.id].where} too; each "
                "question needs its own"
            )
        found[question.id] = question
        if len(found) == limit:
            break
    return list(found.values())


def parse_question(row: Mapping[str, Any], where: str) -> Question:
    """One JSON object as a question.

    Args:
        row: in one of the supervised formats; `references` and `id` are optional.
        where: its file:line, which error messages start with.

    Returns:
        The question.

    Raises:
        ValueError: the row has no known format, or nothing to ask.
    """
    rest = dict(row)
    name = _id(rest.pop("id", None), where)
    listed = _references(rest.pop("references", None), where)
    last = _completed(rest)
    record = parse_record(rest, where)
    tools: list[Any] | None = None
    messages: Prompt
    said: str | None
    if isinstance(record, Completion):
        messages, said = record.prompt, record.completion
        if not messages:
            raise ValueError(f"{where}: the prompt is empty: there is nothing to continue")
    elif isinstance(record, Chat):
        messages, said, tools = *_split(record.messages, where), record.tools
        last = last and said is not None
    else:
        kind = "input_ids" if "input_ids" in rest else "text"
        raise ValueError(
            f"{where}: a row of {kind} asks nothing; questions are messages or prompt/completion"
        )
    own = (said,) if last and said is not None else ()
    references = own if listed is None else listed
    return Question(name, messages, references, where, None if tools is None else tuple(tools))


def _completed(row: dict[str, Any]) -> bool:
    """Put "" where a row has a question and no answer; says whether the row's answer is its own."""
    for asks, answers in _ANSWERS.items():
        if asks in row and answers not in row and not {"messages", "conversations"} & row.keys():
            row[answers] = [] if isinstance(row[asks], list) else ""
            return isinstance(row[asks], list)  # a list of messages may itself end in an answer
    return True


def _split(messages: Sequence[Message], where: str) -> tuple[tuple[Message, ...], str | None]:
    """The turns before the last answer, and that answer, where the conversation ends in one."""
    turns = tuple({k: v for k, v in turn.items() if k != "train"} for turn in messages)
    said = None
    if turns[-1]["role"] == "assistant":
        turns, said = turns[:-1], str(turns[-1]["content"])
    if not any(turn["role"] in ("user", "tool") for turn in turns):
        raise ValueError(f"{where}: nothing is asked: no user turn stands before the answer")
    if turns[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: two assistant turns end the conversation; the last needs a user"
        )
    return turns, said


def _id(value: Any, where: str) -> str:
    if value is None:
        return where.rpartition(":")[2]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: id must be a string or a whole number; got {value!r}")
    return str(value)


def _references(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{where}: references must be a list of strings; got {value!r:.80}")
    return tuple(items)
