"""One number for each held-out example."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from lora_core.data.task_records import QuestionExample, TextExample, WordsExample
from lora_core.data.task_rows import TaskData
from lora_core.models.multi_head import MultiHead
from lora_core.tasks import head_scores
from lora_core.tasks.head_scores import one_score


def test_by_kind() -> None:
    text = TextExample("x:1", "t", label="a")
    assert one_score({"label": "a"}, text) == 1
    assert one_score({"label": "b"}, text) == 0
    words = WordsExample("x:1", ("p", "q", "r", "s"), ("A", "B", "A", "A"))
    assert one_score({"tags": ["A", "B", None, "B"]}, words) == 0.5
    question = QuestionExample("x:1", "q", "one two three", (("two three", 4),))
    assert one_score({"answer": "two"}, question) == pytest.approx(2 / 3)
    nothing = QuestionExample("x:1", "q", "one two three", ())
    assert one_score({"answer": ""}, nothing) == 1
    several = TextExample("x:1", "t", label=("a", "b"))  # type: ignore[arg-type]
    assert one_score({"label": ["a"]}, several) == 0


def test_a_task_scores_each_example(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    task = tasks["kind"]
    task.examples = [TextExample(f"x:{n}", "t", label="low") for n in range(len(task.rows))]
    for number, row in enumerate(task.rows):
        row["example"] = number
    found = head_scores(task)(multi_head())
    assert len(found) == 12
    assert set(found) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="task 'kind' predicts numbers: give a score of your own"):
        head_scores(replace(task, problem="regression"))
    with pytest.raises(ValueError, match="task 'kind' has no held-out examples: give a score"):
        head_scores(replace(task, examples=[]))
