"""Ways to train several tasks on one base, step for step alike.

    joint           one adapter, batches of all tasks, balanced
    joint-pcgrad    the same, with gradient surgery
    sequential      one adapter, one task after another
    adapters        an adapter for each task, each on the same base

Each task has `steps` optimizer steps to itself, and the joint plans take as many as all together:
with equal shares every task is shown the same batches of its own rows in each plan, in the same
order. What differs is only what is trained together.

An adapter of one's own cannot forget: nothing that a later task trains is part of what an earlier
one computes. That is verified, bit for bit, in the weights and in the scores.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import adapted_modules, add_adapter, set_adapters
from lora_core.adapters.config import AdapterConfig
from lora_core.tasks.batches import TaskBatches
from lora_core.tasks.loss import HeadLoss, TaskLoss
from lora_core.train.batches import Batch
from lora_core.train.config import TrainConfig
from lora_core.train.loop import train
from lora_core.train.step import Loss
from lora_core.train.surgery import PCGrad

PLANS = ("joint", "joint-pcgrad", "sequential", "adapters")
RowScores = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task to train on and to be scored on."""

    name: str
    """the task's, and its head's where it has one"""
    data: Any
    """what `TaskBatches` takes of a task: a `TaskData`, rows, or a source"""
    score: Callable[[nn.Module], Sequence[float]]
    """the model -> held-out rows' scores, higher is better, the same rows each time; it is called
    with the model in evaluation mode and without gradients"""
    loss: Loss = field(default_factory=HeadLoss)
    """of its batches"""
    collate: Callable[[Sequence[Any]], Batch] | None = None
    """rows -> batch, where it is not the data's own"""


@dataclass(frozen=True)
class Outcome:
    """What a plan came to."""

    plan: str
    """its name"""
    steps: int
    """optimizer steps in all"""
    seconds: float
    """of training, on the wall"""
    before: RowScores
    """rows' scores before any step"""
    stages: list[RowScores]
    """rows' scores of all tasks after each stage; of a joint plan there is one"""
    figures: dict[str, float]
    """means over the steps of what surgery reported"""


@dataclass(kw_only=True)
class Bench:
    """What all plans share."""

    make: Callable[[], nn.Module]
    """the base, with its heads: the same weights at every call"""
    tasks: Sequence[Task]
    """in the order of sequential training"""
    adapter: AdapterConfig
    """attached to `model.backbone` where there is one, else to the model"""
    config: TrainConfig
    """`steps` are those of one task"""

    def run(self, plan: str) -> Outcome:
        """Train and score by one plan."""
        self.model = self.make()
        self.backbone: nn.Module = getattr(self.model, "backbone", self.model)
        self.seconds, self.records = 0.0, list[dict[str, Any]]()
        before = self.scores(self.tasks)
        stages = {"sequential": self.sequential, "adapters": self.adapters}.get(plan)
        found = stages() if stages else [self.joint(surgery=plan == "joint-pcgrad")]
        if plan == "adapters":  # a task without an adapter yet is what it was
            found = [before | stage for stage in found]
        return Outcome(plan, len(self.records), self.seconds, before, found, _means(self.records))

    def joint(self, surgery: bool) -> RowScores:
        """One adapter for all tasks at once."""
        self.attach("default")
        self.train(
            self.tasks, PCGrad.of_adapters(self.model, self.config.seed) if surgery else None
        )
        return self.scores(self.tasks)

    def sequential(self) -> list[RowScores]:
        """One adapter, task after task; all tasks' scores after each."""
        self.attach("default")
        found = []
        for task in self.tasks:
            self.train([task])
            found.append(self.scores(self.tasks))
        return found

    def adapters(self) -> list[RowScores]:
        """An adapter for each task; scores after each stage of the tasks that have one.

        Raises:
            ValueError: training one adapter changed another's weights, or a score.
        """
        found: list[RowScores] = []
        kept: dict[str, dict[str, Tensor]] = {}
        for number, task in enumerate(self.tasks):
            self.attach(task.name)
            self.train([task])
            kept[task.name] = self.weights(task.name)
            scores: RowScores = {}
            for done in self.tasks[: number + 1]:
                set_adapters(self.backbone, done.name)
                scores |= self.scores([done])
                self.verify(done.name, kept[done.name], scores, found)
            found.append(scores)
        return found

    def verify(
        self, name: str, kept: dict[str, Tensor], scores: RowScores, found: list[RowScores]
    ) -> None:
        """Refuse weights or scores of an earlier task that are not bit for bit what they were."""
        now = self.weights(name)
        changed = [key for key, value in kept.items() if not torch.equal(value, now[key])]
        was = next((stage[name] for stage in found if name in stage), scores[name])
        if changed or was != scores[name]:
            what = f"weights ({changed[0]}, …)" if changed else "scores"
            raise ValueError(
                f"training another adapter changed the {what} of {name!r}: tasks share something "
                "that is trained, or the score is not a function of the model alone"
            )

    def weights(self, name: str) -> dict[str, Tensor]:
        """Copies of a task's own weights: its adapter and its head."""
        own: dict[str, nn.Module] = {
            site: host.adapters[name]
            for site, host in adapted_modules(self.backbone)
            if name in host.adapters
        }
        if (head := self.heads().get(name)) is not None:
            own["head"] = head
        return {
            f"{site}.{key}": value.detach().clone()
            for site, module in own.items()
            for key, value in module.state_dict().items()
        }

    def attach(self, name: str) -> None:
        """A new adapter, alone active and trained; every plan's starts are the same numbers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            add_adapter(self.backbone, self.adapter, name)
        for parameter in getattr(self.model, "unused", list)():
            parameter.requires_grad_(False)

    def heads(self) -> dict[str, nn.Module]:
        """Task -> its head, where the model has some."""
        found = getattr(self.model, "heads", None)
        return dict(found.items()) if isinstance(found, nn.ModuleDict) else {}

    def train(self, tasks: Sequence[Task], surgery: PCGrad | None = None) -> None:
        """Train on some tasks, each as many steps as one has to itself."""
        names = [task.name for task in tasks]
        for name, head in self.heads().items():
            head.requires_grad_(name in names)
        config = self.config
        source = TaskBatches(
            {task.name: task.data for task in tasks},
            config.batch_size,
            config.seed,
            mixing="balanced",
            collate={task.name: task.collate for task in tasks if task.collate is not None},
        )
        assert config.steps is not None  # compare_tasks has seen to it
        start = time.perf_counter()
        result = train(
            self.model,
            source,
            dataclasses.replace(config, out=None, steps=config.steps * len(tasks)),
            loss=TaskLoss({task.name: task.loss for task in tasks}),
            surgery=surgery,
        )
        self.seconds += time.perf_counter() - start
        self.records += result.history
        if result.interrupted:
            raise KeyboardInterrupt

    @torch.no_grad()
    def scores(self, tasks: Iterable[Task]) -> RowScores:
        """Held-out rows' scores of some tasks."""
        self.model.eval()
        return {task.name: [float(x) for x in task.score(self.model)] for task in tasks}


def _means(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of what surgery reported, over the steps that have it."""
    found = {}
    for name in ("conflicts", "cosine"):
        values = [record[name] for record in records if name in record]
        if values:
            found[name] = sum(values) / len(values)
    return found
