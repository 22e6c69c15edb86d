"""Joint, sequential and per-task adapters on three small tasks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig
from lora_core.data.task_rows import TaskData
from lora_core.models.multi_head import MultiHead
from lora_core.tasks import Task, TaskBatches, compare_tasks
from lora_core.tasks.plan import PLANS, Bench
from lora_core.train import TrainConfig

LORA = LoRAConfig(r=2, targets=["q_proj", "v_proj"])


def hits(task: TaskData) -> Callable[[nn.Module], list[float]]:
    """Probability of the right label, by row: it moves with every step."""

    def score(model: nn.Module) -> list[float]:
        assert not model.training
        found = []
        for row in task.rows:
            out = model(**task.collate([row]))
            found.append(float(torch.exp(-out.loss)))
        return found

    return score


@pytest.fixture
def all_tasks(tasks: dict[str, TaskData]) -> list[Task]:
    return [Task(name=name, data=data, score=hits(data)) for name, data in tasks.items()]


def config(**options: Any) -> TrainConfig:
    usual = {"steps": 3, "batch_size": 2, "accumulate": 3, "lr": 0.02, "progress": False}
    return TrainConfig(**usual | options)


def test_all_plans(
    multi_head: Callable[..., MultiHead], all_tasks: list[Task], tmp_path: Path
) -> None:
    made: list[MultiHead] = []
    said: list[str] = []

    def make() -> MultiHead:
        made.append(multi_head(adapter=False))
        torch.manual_seed(len(made))  # plans must not hang on what was drawn before them
        return made[-1]

    found = compare_tasks(make, all_tasks, LORA, config(), out=tmp_path, say=said.append)
    assert [outcome.steps for outcome in found.outcomes.values()] == [9] * 4
    assert list(found.outcomes) == [line.split(":")[0] for line in said] == list(PLANS)
    first = found.outcomes["joint"].before
    for plan, outcome in found.outcomes.items():
        assert outcome.before == first  # the same base, the same heads
        assert len(outcome.stages) == (1 if plan.startswith("joint") else 3)
        assert all(list(stage) == list(first) for stage in outcome.stages)
        # every task has learned something by its own last stage
        for number, name in enumerate(first):
            stage = outcome.stages[min(number, len(outcome.stages) - 1)]
            assert sum(stage[name]) > sum(first[name])
    surgery = found.outcomes["joint-pcgrad"].figures
    assert 0 <= surgery["conflicts"] <= 1
    assert surgery["conflicts"] > 0
    assert found.outcomes["joint"].figures == {}
    # sequential shares one adapter, and scores move; one's own adapter keeps them bit for bit
    kept = found.outcomes["adapters"].stages
    assert kept[0]["kind"] == kept[1]["kind"] == kept[2]["kind"]
    assert kept[0]["peak"] == first["peak"] != kept[2]["peak"]
    moved = found.outcomes["sequential"].stages
    assert moved[0]["kind"] != moved[2]["kind"]
    assert found.forgetting("adapters").value == found.backward_transfer("adapters").value == 0
    assert found.backward_transfer("sequential").value != 0
    # the first stage is the same: one adapter, one task, the same batches
    assert moved[0]["kind"] == kept[0]["kind"]
    assert found.matrix("sequential")[2][0].value == found.scores("sequential")["kind"].value
    assert found.difference("adapters", "sequential", "peak").count == 4
    assert "forgetting: 0 [0, 0]" in str(found)
    _goes_on(make, made, all_tasks, tmp_path, found)


def _goes_on(make: Any, made: list[Any], all_tasks: Any, out: Path, found: Any) -> None:
    """A second call takes what is known, also after a crash in the middle of a line."""
    file = out / "comparison.jsonl"
    lines = file.read_text().splitlines()
    assert [json.loads(line)["outcome"]["plan"] for line in lines] == list(PLANS)
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])
    before = len(made)
    said: list[str] = []
    again = compare_tasks(make, all_tasks, LORA, config(), out=out, say=said.append)
    assert len(made) == before + 1
    assert [line.endswith("(known)") for line in said] == [True, True, True, False]
    for plan in PLANS:
        assert again.outcomes[plan].stages == found.outcomes[plan].stages
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 4
    # other settings are another comparison
    compare_tasks(make, all_tasks, LORA, config(lr=0.01), plans=["joint"], out=out)
    assert len(made) == before + 2
    fewer = all_tasks[0].data
    other = [replace(all_tasks[0], data=replace(fewer, rows=fewer.rows[:4])), *all_tasks[1:]]
    compare_tasks(make, other, LORA, config(), plans=["joint"], out=out)
    assert len(made) == before + 3
    file.write_text("what\n" + file.read_text())
    with pytest.raises(ValueError, match=r"comparison\.jsonl:1 is no result of compare_tasks: rem"):
        compare_tasks(make, all_tasks, LORA, config(), out=out)


def test_each_plan_is_shown_the_same_batches(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    """Nine joint steps of three batches, and three steps of a task alone."""
    together = TaskBatches(tasks, 2, 0, mixing="balanced")
    per = together.per_epoch()
    joint = [b for e in range(5) for b in together.epoch(e)][:27]
    for name, task in tasks.items():
        alone = TaskBatches({name: task}, 2, 0, mixing="balanced")
        own = [b["row"] for e in range(27) for b in alone.epoch(e)][:9]
        assert [b["row"] for b in joint if b["task"] == name] == own
    assert per == 18


def test_an_adapter_that_changed_is_named(
    multi_head: Callable[..., MultiHead], all_tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"tasks": all_tasks, "adapter": LORA, "config": config(steps=1)}
    bench = Bench(make=lambda: multi_head(adapter=False), **settings)
    plain = Bench.train

    def leaking(self: Bench, tasks: Any, surgery: Any = None) -> None:
        plain(self, tasks, surgery)
        if tasks[0].name == "peak":
            with torch.no_grad():
                self.model.heads["kind"].out.bias[0] += 1e-7  # type: ignore[index,union-attr]

    monkeypatch.setattr(Bench, "train", leaking)
    with pytest.raises(ValueError, match=r"changed the weights \(head\.out\.bias, …\) of 'kind'"):
        bench.run("adapters")
    monkeypatch.setattr(Bench, "train", plain)
    drifting = iter(range(100))
    odd = Task(name="kind", data=all_tasks[0].data, score=lambda model: [float(next(drifting))])
    bench.tasks = [odd, *all_tasks[1:]]
    with pytest.raises(ValueError, match="changed the scores of 'kind': tasks share something"):
        bench.run("adapters")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (slice(1), {}, r"takes two tasks or more, named apart; got \['kind'\]"),
        (slice(3), {"plans": ["both"]}, "no plan 'both'; there are joint, joint-pcgrad, seq"),
        (slice(3), {"steps": None}, r"compare_tasks counts steps: set TrainConfig\(steps=…\)"),
        (slice(3), {"accumulate": 1}, "a step of one batch holds one: set accumulate to 3, a"),
    ],
)
def test_what_cannot_be_compared(
    all_tasks: list[Task], change: slice, options: dict[str, Any], message: str
) -> None:
    plans = {"plans": options.pop("plans")} if "plans" in options else {}
    with pytest.raises(ValueError, match=message):
        compare_tasks(nn.Module, all_tasks[change], LORA, config(**options), **plans)
