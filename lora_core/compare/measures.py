"""What is measured of a model beside its speed: answers, held-out loss, general text.

All three see the variant as a user would: with its examples or system text before each question,
and with its adapter unmerged and active.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.compare.task import Task
from lora_core.data import SFTDataset, Tokenizer
from lora_core.evaluate import perplexity
from lora_core.evaluate.answering import answer_questions, prompt_of
from lora_core.evaluate.estimate import mean
from lora_core.evaluate.metrics import measure
from lora_core.evaluate.perplexity import Perplexity
from lora_core.evaluate.questions import Prompt, Question
from lora_core.evaluate.retention import forgetting, general_loss

_WHOLE = 1 << 20  # tokens: held-out rows are never cut


def answered(
    model: nn.Module,
    tok: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    folder: Path,
    *,
    system: str | None,
    shots: Sequence[Prompt],
    mark: str,
) -> dict[str, Any]:
    """Let a model answer, and measure the answers.

    Args:
        model: as it is to be judged.
        tok: its tokenizer.
        task: says how long answers may be and which metrics count.
        questions: held-out rows with references.
        folder: gets answers.jsonl, batch by batch.
        system: system text, or None.
        shots: examples.
        mark: what the answers are bound to.

    Returns:
        {"quality": {name: estimate}, "prompt_tokens": estimate} as JSON holds them.
    """
    answers = answer_questions(
        model,
        tok,
        questions,
        system=system,
        shots=shots,
        max_new_tokens=task.max_new_tokens,
        batch_size=32,
        out=folder / "answers.jsonl",
        bound={"variant": mark},
    )
    found = measure(answers, task.metrics)
    tokens = mean([answer.prompt_tokens for answer in answers], unit="requests")
    return {
        "quality": {name: estimate.facts() for name, estimate in found.items()},
        "prompt_tokens": tokens.facts(),
    }


def held_out_loss(
    model: nn.Module,
    tok: Tokenizer,
    questions: Sequence[Question],
    *,
    system: str | None,
    shots: Sequence[Prompt],
) -> dict[str, Any]:
    """Loss, perplexity and accuracy on the tokens of the references.

    Args:
        model: as it is to be judged.
        tok: its tokenizer.
        questions: held-out rows; the first reference of each is graded.
        system: system text, or None.
        shots: examples; they are read, not graded.

    Returns:
        {"loss", "perplexity", "accuracy"}: estimates as JSON holds them.
    """
    records = [_record(question, prompt_of(question, system, shots)) for question in questions]
    # every row, as it was asked: an example that spells a control token would drop all of them
    rows = SFTDataset(records, tok, max_length=_WHOLE, train_on="last", control_text="keep")
    found = perplexity(model, rows).estimates()
    return {name: found[name].facts() for name in ("loss", "perplexity", "accuracy")}


def _record(question: Question, prompt: Prompt) -> dict[str, Any]:
    answer = question.references[0]
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": answer}
    row: dict[str, Any] = {"messages": [*prompt, {"role": "assistant", "content": answer}]}
    return row if question.tools is None else row | {"tools": list(question.tools)}


def general(model: nn.Module, tok: Tokenizer, task: Task) -> Perplexity:
    """What a model makes of general text, which no variant is trained on."""
    return general_loss(model, tok, task.read_general())


def perplexity_facts(found: Perplexity) -> dict[str, Any]:
    """A measure of the base as JSON, for other processes to compare with."""
    return asdict(found)


def forgotten(before: Mapping[str, Any], after: Perplexity) -> dict[str, Any]:
    """Bits per byte of general text, after less before, as JSON holds it.

    Args:
        before: `perplexity_facts` of the base.
        after: of the variant, on the same text.

    Returns:
        The estimate's facts.
    """
    # JSON has lists where the measure has tuples
    base: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in before.items()}
    return forgetting(Perplexity(**base), after).facts()
