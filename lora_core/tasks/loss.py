r"""The loss of several tasks: a weighted sum of their means.

    loss of a step = Σₜ wₜ · (Σ over t's graded units in the step) / (their number in the step)

One task grades texts, another tokens. Divided by one common count, the task with more units would
take the step for itself, and a weight would have to be read against its rows' lengths. So each
task's mean is over its own units, counted over the whole step (train/units.py), and the weight says
how much that mean counts: however many batches the task has in the step, and however the step is
cut into batches or over processes. Mixing decides how many rows a task's mean is taken over, and
weights what it counts. In a step that holds one task alone, AdamW takes most of a weight's effect
back, since it divides by the gradient's own size: give steps that hold several.

Weights are used as given: the sum of three means is three times as large as a mean of all, which
matters to gradient clipping.

Ref: Caruana 1997, "Multitask Learning", section 2.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_core.data.task_rows import graded
from lora_core.models.multi_head import MultiHead
from lora_core.train.batches import Batch
from lora_core.train.step import Loss, LossResult, counter, loss_result


class HeadLoss:
    """The loss of a `MultiHead`: that of the batch's own head."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], normalizer: float) -> LossResult:
        """Run the task's head on every tensor of the batch."""
        inputs = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        # a step in which nothing is graded has a sum of 0 as well
        out = model(batch["task"], **inputs, normalizer=normalizer or 1.0)
        if out.loss is None:
            raise ValueError(f"a batch of task {batch['task']!r} has no labels to train on")
        return LossResult(out.loss)

    def count(self, batch: Batch) -> float:
        """Texts, tokens or questions that are graded."""
        return graded(batch)


class TaskLoss:
    """A loss for each task; see above.

    Every step's record gets each task's mean as `loss/<task>`, without its weight. Figures that a
    task's loss reports itself are named `<task>/<figure>`.

    Args:
        losses: task -> its loss.
        weights: task -> weight, 1 where none is given.

    Raises:
        ValueError: no task, a weight of no task, or one that is not above 0 and finite.
    """

    def __init__(
        self, losses: Mapping[str, Loss], weights: Mapping[str, float] | None = None
    ) -> None:
        if not losses:
            raise ValueError("TaskLoss needs the loss of at least one task")
        self.losses = dict(losses)
        self.weights = dict.fromkeys(losses, 1.0)
        for name, weight in (weights or {}).items():
            if name not in self.losses:
                raise ValueError(f"weights: no task {name!r}; there are {', '.join(losses)}")
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"the weight of task {name!r} must be above 0 and finite; got {weight}: to "
                    "leave a task out, do not train on its batches"
                )
            self.weights[name] = float(weight)

    @classmethod
    def of_heads(cls, model: nn.Module, weights: Mapping[str, float] | None = None) -> "TaskLoss":
        """The loss of every head of a `MultiHead`.

        Args:
            model: a `MultiHead`.
            weights: task -> weight.
        """
        if not isinstance(model, MultiHead):
            raise TypeError(f"of_heads takes a MultiHead; got {type(model).__name__}")
        return cls({name: HeadLoss() for name in model.task_heads()}, weights)

    @property
    def units(self) -> Iterable[str]:
        """The tasks: each counts what is its own."""
        return self.losses

    def unit(self, batch: Batch) -> str:
        """A batch's task; ValueError where it names none that is known."""
        name = batch.get("task") if isinstance(batch, Mapping) else None
        if name not in self.losses:
            raise ValueError(
                f"the batch's task is {name!r}, and there are losses for {', '.join(self.losses)}: "
                "take the batches from TaskBatches"
            )
        return str(name)

    def count(self, batch: Batch) -> float:
        """What the task's own loss counts."""
        return counter(self.losses[self.unit(batch)])(batch)

    def __call__(self, model: nn.Module, batch: Batch, normalizer: float) -> LossResult:
        """The task's loss times its weight."""
        name = self.unit(batch)
        value, rows, figures = loss_result(self.losses[name](model, batch, normalizer))
        named = {f"{name}/{figure}": pair for figure, pair in figures.items()}
        # of every task, as a figure's name has to come with every batch
        means: dict[str, tuple[float | Tensor, float]]
        means = {f"loss/{task}": (0.0, 0.0) for task in self.losses}
        means[f"loss/{name}"] = (value.detach() * normalizer, self.count(batch))
        return LossResult(value * self.weights[name], rows, {**means, **named})
