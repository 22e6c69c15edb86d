"""Held-out rows' scores of a head: one number in [0, 1] for each example, for compare_tasks."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from lora_core.data.task_rows import TaskData
from lora_core.evaluate.heads import predict
from lora_core.evaluate.squad import f1
from lora_core.models.multi_head import MultiHead


def head_scores(task: TaskData, batch_size: int = 16) -> Callable[[nn.Module], list[float]]:
    """The `score` of a `Task` with a head.

    Args:
        task: held-out examples with labels; its name is the head's.
        batch_size: rows in a batch.

    Returns:
        The model -> by example: 1 for the right label of a text, else 0; the share of words whose
        tag is right; the F1 of an answer's words over those of the best reference.

    Raises:
        ValueError: no examples, or labels that are numbers, which no share tells right from wrong.
    """
    if not task.examples or task.problem == "regression":
        held = "predicts numbers" if task.examples else "has no held-out examples"
        raise ValueError(f"task {task.name!r} {held}: give a score of your own")

    def score(model: nn.Module) -> list[float]:
        said = predict(cast(MultiHead, model), task, batch_size)
        return [one_score(p, e) for p, e in zip(said, task.examples, strict=True)]

    return score


def one_score(said: dict[str, Any], example: Any) -> float:
    """One example's score, by what it holds."""
    if "tags" in said:
        hits = [a == b for a, b in zip(said["tags"], example.tags, strict=True)]
        return sum(hits) / len(hits)
    if "answer" in said:
        references = [text for text, _ in example.answers or ()]
        return float(f1(said["answer"], references or [""]))
    label, true = said["label"], example.label
    if isinstance(label, list):
        return float(set(label) == {str(one) for one in true})
    return float(label == str(true))
