"""The same tasks trained jointly, one after another, and apart: what each way costs and keeps.

    comparison = compare_tasks(make, tasks, LoRAConfig(r=8), TrainConfig(steps=100, accumulate=3))
    print(comparison)

`plan.py` has the ways, `forgetting.py` the figures. With `out`, each way's result is a line of
`comparison.jsonl` as soon as it ends; a second call with the same settings goes on with those that
are missing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapters.config import AdapterConfig
from lora_core.data.task_rows import TaskData
from lora_core.evaluate.estimate import Estimate, paired_difference
from lora_core.files import atomic_write
from lora_core.tasks.forgetting import average_score, backward_transfer, forgetting, score
from lora_core.tasks.plan import PLANS, Bench, Outcome, Task
from lora_core.train.config import TrainConfig

FILE = "comparison.jsonl"


@dataclass(frozen=True)
class Comparison:
    """What the plans came to."""

    tasks: tuple[str, ...]
    """in the order of sequential training"""
    outcomes: dict[str, Outcome]
    """by plan"""

    def scores(self, plan: str) -> dict[str, Estimate]:
        """Each task's score in the end."""
        return {task: score(self.outcomes[plan].stages[-1][task]) for task in self.tasks}

    def average(self, plan: str) -> Estimate:
        """The mean of the tasks' scores in the end."""
        last = self.outcomes[plan].stages[-1]
        return average_score({task: last[task] for task in self.tasks})

    def matrix(self, plan: str) -> list[list[Estimate]]:
        """R[i][j]: the score on task j after training on task i; of joint plans one row."""
        return [[score(stage[task]) for task in self.tasks] for stage in self.outcomes[plan].stages]

    def forgetting(self, plan: str) -> Estimate:
        """Average forgetting; ValueError of a joint plan, which has one stage."""
        return forgetting(self._ordered(plan))

    def backward_transfer(self, plan: str) -> Estimate:
        """Backward transfer; ValueError of a joint plan, which has one stage."""
        return backward_transfer(self._ordered(plan))

    def _ordered(self, plan: str) -> list[dict[str, list[float]]]:
        return [{t: stage[t] for t in self.tasks} for stage in self.outcomes[plan].stages]

    def difference(self, plan: str, other: str, task: str) -> Estimate:
        """How much better a task is in the end by one plan than by another, row by row."""
        after, before = (self.outcomes[name].stages[-1][task] for name in (plan, other))
        return paired_difference(after, before)

    def __str__(self) -> str:
        lines = []
        for plan, outcome in self.outcomes.items():
            lines.append(f"{plan}, {outcome.steps} steps: {self.average(plan)}")
            lines += [f"    {task}: {value}" for task, value in self.scores(plan).items()]
            if len(outcome.stages) > 1:
                lines.append(f"    forgetting: {self.forgetting(plan)}")
                lines.append(f"    backward transfer: {self.backward_transfer(plan)}")
            lines += [f"    {name}: {value:.3f}" for name, value in outcome.figures.items()]
        return "\n".join(lines)


def compare_tasks(
    make: Callable[[], nn.Module],
    tasks: Sequence[Task],
    adapter: AdapterConfig,
    config: TrainConfig,
    *,
    plans: Sequence[str] = PLANS,
    out: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Train tasks by several plans with equal numbers of steps, and score each on held-out rows.

    Args:
        make: the base, with heads where tasks have some (`MultiHead`); the same weights each time.
        tasks: two or more, in the order of sequential training.
        adapter: what is attached to `model.backbone` where there is one, else to the model.
        config: `steps` is what one task gets to itself; the joint plans take steps × tasks. `out`,
            evaluation and checkpoints are not used.
        plans: some of `PLANS`.
        out: folder for the results; None: they are returned alone.
        facts: JSON-ready facts, of the base and of held-out rows say: results with others are not
            gone on with. Rows to train on are known by their content where they are a list.
        say: is given a line after each plan.

    Returns:
        The comparison.

    Raises:
        ValueError: fewer than two tasks, a plan that is unknown, no `steps`, or steps of too few
            batches to hold several tasks.
    """
    _check(tasks, config, plans)
    settings = json.loads(
        json.dumps(
            {
                "tasks": {task.name: _digest(task.data) for task in tasks},
                "adapter": repr(adapter),
                "config": config.to_dict() | {"out": None, "progress": None},
                "facts": dict(facts or {}),
            }
        )
    )
    file = None if out is None else Path(out) / FILE
    known = {} if file is None else read_outcomes(file, settings)
    bench = Bench(make=make, tasks=tasks, adapter=adapter, config=config)
    outcomes: dict[str, Outcome] = {}
    for plan in plans:
        outcomes[plan] = known.get(plan) or bench.run(plan)
        if file is not None and plan not in known:
            _append(file, {"settings": settings, "outcome": asdict(outcomes[plan])})
        names = tuple(task.name for task in tasks)
        average = Comparison(names, {plan: outcomes[plan]}).average(plan)
        say(f"{plan}: {average}{' (known)' if plan in known else ''}")
    return Comparison(tuple(task.name for task in tasks), outcomes)


def _digest(data: Any) -> str | None:
    """What tells a task's rows from others; None of what is no list of rows."""
    rows = data.rows if isinstance(data, TaskData) else data
    return hashlib.sha256(repr(rows).encode()).hexdigest() if isinstance(rows, list) else None


def read_outcomes(file: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Outcome]:
    """The outcomes of a results file, the last of each plan.

    Args:
        file: `comparison.jsonl`; it need not exist.
        settings: those of the run; None: any.

    Returns:
        Plan -> outcome. A last line that was cut off by a crash is passed over.

    Raises:
        ValueError: a line before the last that is no outcome, with its number.
    """
    found: dict[str, Outcome] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            outcome = Outcome(**row["outcome"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(
                f"{file}:{number} is no result of compare_tasks: remove the line, or take another "
                "folder"
            ) from None
        if settings is None or row["settings"] == settings:
            found[outcome.plan] = outcome
    return found


def _append(file: Path, row: Mapping[str, Any]) -> None:
    """A line at the end of a file; what a crash cut off before it is dropped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    held = file.read_bytes() if file.exists() else b""
    if not held.endswith(b"\n"):
        atomic_write(file, held[: held.rfind(b"\n") + 1])
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _check(tasks: Sequence[Task], config: TrainConfig, plans: Sequence[str]) -> None:
    """Refuse what cannot be compared."""
    names = [task.name for task in tasks]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"compare_tasks takes two tasks or more, named apart; got {names}")
    for plan in plans:
        if plan not in PLANS:
            raise ValueError(f"no plan {plan!r}; there are {', '.join(PLANS)}")
    if config.steps is None:
        raise ValueError(
            "compare_tasks counts steps: set TrainConfig(steps=…), the steps that one task gets"
        )
    if "joint-pcgrad" in plans and config.accumulate < 2:
        raise ValueError(
            "PCGrad compares tasks within a step, and a step of one batch holds one: set "
            f"accumulate to {len(names)}, a batch of each task"
        )
