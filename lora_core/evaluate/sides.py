"""Two systems' answers to the same questions, checked to belong together.

Judges and people compare answers row by row. A question is a plain prompt or a `Question` out of a
file, whose file:line then names it in messages and whose id names it in files.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lora_core.evaluate.questions import Prompt, Question
from lora_core.evaluate.shown import is_unicode

Asked = Question | Prompt | Sequence[Any]


def as_questions(questions: Sequence[Asked]) -> list[Question]:
    """Questions as they are, plain prompts under their number from 1.

    Raises:
        TypeError: one text in place of a list.
        ValueError: there are none, or two have one id.
    """
    if isinstance(questions, str):
        raise TypeError("questions must be a list; got one text: put it into a list")
    found: dict[str, Question] = {}
    for number, asked in enumerate(questions):
        new = asked if isinstance(asked, Question) else _numbered(asked, number)
        if new.id in found:
            raise ValueError(f"{new.where}: id {new.id!r} is that of {found[new.id].where} too")
        found[new.id] = new
    if not found:
        raise ValueError("there are no questions to compare answers to")
    return list(found.values())


def _numbered(prompt: Prompt | Sequence[Any], number: int) -> Question:
    messages = prompt if isinstance(prompt, str) else tuple(prompt)
    return Question(str(number + 1), messages, (), f"questions[{number}]")


def check_texts(texts: Sequence[str], name: str, questions: Sequence[Question]) -> None:
    """Refuse a list that is not one text a question.

    Raises:
        TypeError: something that is no text, or one text in place of a list.
        ValueError: another number of them, or a text that cannot be written.
    """
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a list of answers; got one text")
    if len(texts) != len(questions):
        raise ValueError(f"{len(questions)} questions and {len(texts)} answers of {name}")
    for question, text in zip(questions, texts, strict=True):
        if not isinstance(text, str):
            raise TypeError(
                f"{question.where}: the answer of {name} must be a text; got {type(text).__name__}"
            )
        if not is_unicode(text):
            raise ValueError(
                f"{question.where}: the answer of {name} holds half of a surrogate pair"
            )


def check_names(names: Sequence[str]) -> None:
    """Refuse names that do not tell two systems apart."""
    if len(names) != 2 or names[0] == names[1] or not all(names):
        raise ValueError(f"names must be two different ones; got {tuple(names)}")


def key_of(*parts: Any) -> str:
    """A name for what was asked, the same for the same parts: 16 hexadecimal digits."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def spoken(prompt: Prompt) -> str:
    """A prompt as text for a reader: roles before the turns, where there are several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in prompt)
