r"""Answers, and the file that they are kept in while they come.

A file of answers is JSON Lines: `{"id", "answer", "messages", "references", "where", …}`. It is
written batch by batch, each row flushed, so that an interrupted run has lost one batch at most. A
second run reads it and asks only what is missing.

Answers of two settings in one file would be a figure of neither. So a file is bound to what made
it: beside `answers.jsonl` stands `answers.settings.json`, written before the first answer, and a
run with other settings is refused in a line that names them. (lm-eval-harness caches by a hash of
the request; a hash can say that something differs, not what.)
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_core.data.lines import read_rows
from lora_core.evaluate.questions import Prompt, Question
from lora_core.evaluate.row_log import RowLog, differing_settings, short
from lora_core.files import atomic_write


@dataclass(frozen=True)
class Answer:
    """What was answered to a question."""

    id: str
    """the question's"""
    messages: Prompt
    """the question's, without system text and examples that were put before it"""
    text: str
    """the answer, without the token that ended it; "" where nothing was generated"""
    references: tuple[str, ...]
    """good answers; none where there are none"""
    where: str
    """file:line of the question, or of the answer where no question is known"""
    prompt_tokens: int = 0
    """tokens of the whole prompt; 0: not known"""
    new_tokens: int = 0
    """tokens generated, the one that ended the answer included; 0: not known"""
    cut: bool = False
    """whether it ran into max_new_tokens"""

    def facts(self) -> dict[str, Any]:
        """The answer as its file holds it."""
        row = asdict(self)
        return {"id": row.pop("id"), "answer": row.pop("text"), **row}


class AnswerFile:
    """The answers of one setting, on disk as they come.

    Args:
        path: the JSON Lines file; its folder must exist.
        settings: what the answers depend on, JSON values by name.

    Attributes:
        kept: answers that were there already, by id.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the file is of other settings, or not of this library.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.beside = self.path.with_suffix(".settings.json")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {self.path}: no folder {self.path.parent}")
        settings = json.loads(json.dumps(settings))
        if self.path.is_file() and self.path.stat().st_size:
            self._check(settings)
        else:
            atomic_write(self.beside, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        self.log = RowLog(self.path)
        answers = (_parse(row, where) for where, row in self.log.kept)
        self.kept = {answer.id: answer for answer in answers}

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers to the end, each one whole."""
        for answer in answers:
            self.log.append(answer.facts())

    def _check(self, settings: Mapping[str, Any]) -> None:
        if not self.beside.is_file():
            raise ValueError(
                f"{self.path} holds answers, and no {self.beside.name} says what made them: write "
                "to another file"
            )
        try:
            before = json.loads(self.beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.beside} is not valid JSON: {error}") from None
        if not isinstance(before, dict):
            raise ValueError(f"{self.beside} must be a JSON object; got {short(before)}")
        if differing := differing_settings(before, settings):
            raise ValueError(
                f"{self.path} holds answers of other settings: {differing}; write to another "
                "place, or remove it"
            )


def read_answers(path: str | Path, questions: Sequence[Question] | None = None) -> list[Answer]:
    """Answers written before, by this library or by anything else.

    Args:
        path: JSON Lines with `answer` (or `text`), and where known `id`, `references`, `messages`
            or `prompt`, `prompt_tokens`, `new_tokens`.
        questions: what was asked. Answers are put to them by id; where no row has an id, in order.

    Returns:
        The answers; in the order of the questions, with their messages and references, where these
        are given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: file:line of a row that is no answer; or answers and questions do not fit.
    """
    found: dict[str, Answer] = {}
    named = 0
    for where, row in read_rows(path):
        answer = _parse(row, where)
        if answer.id in found:
            raise ValueError(f"{where}: id {answer.id!r} is answered twice; keep one of the rows")
        found[answer.id] = answer
        named += "id" in row
    if questions is None:
        return list(found.values())
    if named not in (0, len(found)):
        raise ValueError(
            f"{path}: {named} of {len(found)} answers have an id: give all one or none"
        )
    return _matched(str(path), found if named else list(found.values()), questions)


def _matched(
    path: str, found: dict[str, Answer] | list[Answer], questions: Sequence[Question]
) -> list[Answer]:
    """Answers with their questions, in the questions' order."""
    if isinstance(found, list):
        if len(found) != len(questions):
            raise ValueError(
                f"{path}: {len(found)} answers without ids, and {len(questions)} questions; give "
                "the answers the questions' ids"
            )
        found = {question.id: answer for question, answer in zip(questions, found, strict=True)}
    missing = [question for question in questions if question.id not in found]
    if missing:
        raise ValueError(
            f"{path}: no answer to {len(missing)} of {len(questions)} questions; the first is "
            f"id {missing[0].id!r} ({missing[0].where})"
        )
    unknown = found.keys() - {question.id for question in questions}
    if unknown:
        raise ValueError(f"{path}: answers to no question: {', '.join(sorted(unknown)[:5])}")
    return [_joined(found[question.id], question) for question in questions]


def _joined(answer: Answer, question: Question) -> Answer:
    return Answer(
        question.id,
        question.messages,
        answer.text,
        question.references,
        question.where,
        answer.prompt_tokens,
        answer.new_tokens,
        answer.cut,
    )


def _parse(row: Mapping[str, Any], where: str) -> Answer:
    said = row.get("answer", row.get("text"))
    if not isinstance(said, str):
        raise ValueError(f"{where}: an answer is a row with answer or text; keys are {sorted(row)}")
    references = row.get("references") or []
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
        raise ValueError(f"{where}: references must be a list of strings; got {references!r:.80}")
    asked = row.get("messages", row.get("prompt", ""))
    if not isinstance(asked, str) and not _is_messages(asked):
        raise ValueError(f"{where}: messages must be a list of turns or a text; got {asked!r:.80}")
    name = row.get("id", where.rpartition(":")[2])
    return Answer(
        str(name),
        asked if isinstance(asked, str) else tuple(asked),
        said,
        tuple(references),
        str(row.get("where", where)),
        int(row.get("prompt_tokens") or 0),
        int(row.get("new_tokens") or 0),
        bool(row.get("cut", False)),
    )


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) for turn in value)


def digest_of(items: Iterable[Any]) -> str:
    """How many they are and a hash of them, JSON values: the same for the same, short to read."""
    texts = [json.dumps(item, ensure_ascii=False, sort_keys=True) for item in items]
    return f"{len(texts)} ({hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:16]})"
