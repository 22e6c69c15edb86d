"""Labelled examples in JSON Lines, for heads: three shapes, told by their keys.

    {"text": "…", "label": "sports"}
        a text and its label; `text_pair` is a second text; a list holds several labels at once, a
        number with a point is a value to predict
    {"tokens": ["Ada", "slept"], "tags": ["B-PER", "O"]}
        words and a tag for each
    {"question": "…", "context": "…", "answers": {"text": ["…"], "answer_start": [17]}}
        as SQuAD has it; or answers as a list of {"text", "start"}; without an answer: []

A file holds one shape. Every error says file:line. Answers are looked up at the place that they
name, in characters: an answer that does not stand there would train the head on a wrong span, as
happens in data that was re-encoded or trimmed after it was annotated.

Ref: Rajpurkar et al. 2018, arXiv:1806.03822 (questions without an answer); Tjong Kim Sang & De
Meulder 2003, "Introduction to the CoNLL-2003 shared task" (BIO tags).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.data.lines import read_rows
from lora_core.data.messages import typed
from lora_core.data.records import rename_columns

Label = str | float | tuple[str, ...]
SHAPES = {
    "sequence": (("text",), "label"),
    "token": (("tokens",), "tags"),
    "span": (("question", "context"), "answers"),
}


@dataclass(frozen=True)
class TextExample:
    """A text, or two, and what is to be said of it."""

    where: str
    text: str
    text_pair: str | None = None
    label: Label | None = None
    """a label, a number, several labels, or None: not told"""


@dataclass(frozen=True)
class WordsExample:
    """Words and a tag for each."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    """None: not told"""


@dataclass(frozen=True)
class QuestionExample:
    """A question about a text."""

    where: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None = None
    """(text, its first character in the context); () without an answer, None: not told"""


Example = TextExample | WordsExample | QuestionExample


def read_examples(
    path: str | Path, columns: Mapping[str, str] | None = None, labelled: bool = True
) -> tuple[str, list[Example]]:
    """The examples of a file, and which kind of task they are for.

    Args:
        path: the file, UTF-8, one JSON object a line.
        columns: this library's name to the file's name, {"label": "category"}.
        labelled: whether labels have to be there; otherwise they are not looked at.

    Returns:
        ("sequence", "token" or "span", the examples).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another shape, a wrong type, an answer that is not at its place, or lines of
            different shapes; each with its file:line.
    """
    kind, examples = "", []
    for where, raw in read_rows(path):
        row = rename_columns(raw, columns or {}, where)
        found = shape_of(row, where, labelled)
        if kind and found != kind:
            raise ValueError(
                f"{where}: a row for a {found} head in a file of rows for a {kind} head: one file "
                "holds one task"
            )
        kind = found
        if not labelled:
            row.pop(SHAPES[kind][1], None)
        examples.append(_PARSERS[kind](row, where))
    return kind, examples


def shape_of(row: Mapping[str, Any], where: str, labelled: bool = True) -> str:
    """Which kind of task a row is for: "sequence", "token" or "span".

    Raises:
        ValueError: for none, or its label is missing.
    """
    for kind, (keys, label) in SHAPES.items():
        if set(keys) <= row.keys():
            if labelled and row.get(label) is None:
                raise ValueError(
                    f"{where}: {'/'.join(keys)} without {label}; keys are {sorted(row)}"
                )
            return kind
    known = ", ".join("/".join((*keys, label)) for keys, label in SHAPES.values())
    raise ValueError(
        f"{where}: keys {sorted(row)} are for no head ({known}); if they only bear other names, "
        "map them: --columns text=sentence,label=category"
    )


def _parse_text(row: Mapping[str, Any], where: str) -> TextExample:
    text = typed(row, "text", str, where)
    pair = None if row.get("text_pair") is None else typed(row, "text_pair", str, where)
    label = None if row.get("label") is None else _label(row["label"], where)
    return TextExample(where, text, pair, label)


def _label(value: Any, where: str) -> Label:
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{where}: label is {value}: a value to predict must be finite")
        return value
    if isinstance(value, list):
        names = tuple(_name(one, f"label[{i}]", where) for i, one in enumerate(value))
        if len(set(names)) != len(names):
            raise ValueError(f"{where}: label names one twice: {value}")
        return names
    return _name(value, "label", where)


def _name(value: Any, key: str, where: str) -> str:
    """A label as text; integers are taken as names."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"{where}: {key} must be text or an integer; got {type(value).__name__} ({value!r})"
        )
    if value == "":
        raise ValueError(f"{where}: {key} is empty")
    return str(value)


def _parse_words(row: Mapping[str, Any], where: str) -> WordsExample:
    words = typed(row, "tokens", list, where)
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"{where}: tokens[{index}] must be a word; got {word!r}")
    if not words:
        raise ValueError(f"{where}: tokens is empty")
    if row.get("tags") is None:
        return WordsExample(where, tuple(words))
    tags = typed(row, "tags", list, where)
    if len(tags) != len(words):
        raise ValueError(f"{where}: {len(words)} tokens but {len(tags)} tags")
    named = tuple(_name(tag, f"tags[{i}]", where) for i, tag in enumerate(tags))
    return WordsExample(where, tuple(words), named)


def _parse_question(row: Mapping[str, Any], where: str) -> QuestionExample:
    question = typed(row, "question", str, where)
    context = typed(row, "context", str, where)
    if not question.strip() or not context.strip():
        empty = "context" if question.strip() else "question"
        raise ValueError(f"{where}: {empty} is empty")
    if row.get("answers") is None:
        return QuestionExample(where, question, context)
    pairs = tuple(_pairs(row["answers"], where))
    for index, (text, start) in enumerate(pairs):
        _check_place(context, text, start, f"{where}: answers[{index}]")
    return QuestionExample(where, question, context, pairs)


def _pairs(answers: Any, where: str) -> Iterable[tuple[Any, Any]]:
    """(text, start) of either way of writing answers."""
    if isinstance(answers, dict):
        texts, starts = (answers.get(key) for key in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise ValueError(f'{where}: answers must hold lists "text" and "answer_start"')
        if len(texts) != len(starts):
            raise ValueError(f"{where}: answers has {len(texts)} texts but {len(starts)} starts")
        return zip(texts, starts, strict=True)
    if not isinstance(answers, list):
        raise ValueError(f"{where}: answers must be an object or a list; got {answers!r:.60}")
    pairs = []
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict) or "text" not in answer:
            raise ValueError(f"{where}: answers[{index}] must be an object with text and start")
        pairs.append((answer["text"], answer.get("start", answer.get("answer_start"))))
    return pairs


def _check_place(context: str, text: Any, start: Any, place: str) -> None:
    """Refuse an answer that does not stand where it says; the message says where it does."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} must be text; got {text!r} (no answer is an empty list)")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"{place}: its start must be a character's number; got {start!r}")
    there = context[start : start + len(text)]
    if there == text:
        return
    places = [i for i in range(len(context)) if context.startswith(text, i)]
    near = min(places, key=lambda i: abs(i - start), default=None)
    hint = "it stands nowhere in the context" if near is None else f"it stands at {near}"
    raise ValueError(f"{place} {text!r:.60} is not at character {start} ({there!r:.60}): {hint}")


_PARSERS: dict[str, Callable[[Mapping[str, Any], str], Example]] = {
    "sequence": _parse_text,
    "token": _parse_words,
    "span": _parse_question,
}
