r"""Examples for few-shot: which rows of the training data, and how many fit.

Examples take the room that the question and its answer leave of the model's context, so their
number is a matter of arithmetic, done before anything runs:

    room = context − longest question − longest answer

Rows are drawn at random by the seed from those that are no longer than room / k, so that k of them
fit whichever are drawn. Long rows are thus never examples; cutting them would show the model
answers that break off. By default k is half of what fits at the rows' median length, at least one
where any row fits: a context that is filled to the brim is where small models fall apart.
"""

import random
import statistics
from collections.abc import Sequence

from lora_core.data import Tokenizer
from lora_core.evaluate.answering import prompt_of
from lora_core.evaluate.questions import Prompt, Question

MOST = 16  # by default; more are given with --shots
_POOL = 500  # rows that are measured


def draw_shots(
    pool: Sequence[Question],
    asked: Sequence[Question],
    tok: Tokenizer,
    *,
    context: int | None,
    answer: int,
    count: int | None,
    seed: int,
) -> list[Prompt] | None:
    """Choose examples that fit before every question.

    Args:
        pool: rows with answers, to draw from.
        asked: the questions.
        tok: the model's tokenizer.
        context: the model's positions; None: no limit.
        answer: tokens of the longest answer.
        count: how many examples; None: half of what fits.
        seed: of the drawing.

    Returns:
        The examples, answered; None where `count` is None and not one fits.

    Raises:
        ValueError: `count` examples do not fit, or the pool has not as many answers.
    """
    order = [question for question in pool if question.references]
    random.Random(seed).shuffle(order)
    order = order[:_POOL]
    if not order:
        raise ValueError(
            "few-shot takes examples from the training data, whose rows have no answer"
        )
    plain = max(len(_ids(tok, question, ())) for question in asked)
    # what an example adds before a question: template, blank lines and all
    probe = asked[0]
    alone = len(_ids(tok, probe, ()))
    sizes = [len(_ids(tok, probe, (row.answered(),))) - alone for row in order]
    room = None if context is None else context - plain - answer
    if count is None:
        fits = MOST if room is None else int(room // statistics.median(sizes))
        count = min(MOST, max(1, fits // 2))
        if room is not None and min(sizes) > room:
            return None
    limit = float("inf") if room is None else room / count
    short = [row for row, size in zip(order, sizes, strict=True) if size <= limit]
    if len(short) < count:
        _refuse(count, sizes, room, plain, answer, context)
    return [row.answered() for row in short[:count]]


def _ids(tok: Tokenizer, question: Question, shots: Sequence[Prompt]) -> list[int]:
    found: list[int] = tok.encode_prompt(prompt_of(question, None, shots))
    return found


def _refuse(
    count: int,
    sizes: Sequence[int],
    room: int | None,
    plain: int,
    answer: int,
    context: int | None,
) -> None:
    """Say how many would fit.

    Raises:
        ValueError: always.
    """
    if room is None:
        raise ValueError(f"--shots {count}: the training data has {len(sizes)} rows with an answer")
    most, taken = 0, 0
    for size in sorted(sizes):
        if (taken := taken + size) > room:
            break
        most += 1
    median = statistics.median(sizes)
    raise ValueError(
        f"--shots {count} do not fit: the model has {context} positions, the longest question "
        f"takes {plain}, its answer {answer}, and an example {median:.0f} (median); "
        + (f"at most {most} fit, of the shortest" if most else "not one fits")
    )
