"""A step's loss of several tasks: each task's mean over the whole step, times its weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.data import collate
from lora_core.data.task_rows import TaskData
from lora_core.device import dtype_policy
from lora_core.models.multi_head import MultiHead
from lora_core.tasks import HeadLoss, TaskBatches, TaskLoss, optimizer_with_rates, rate_factors
from lora_core.train import CausalLoss, PCGrad, TrainConfig, folder, train, train_step
from lora_core.train.step import LossResult

WEIGHTS = {"kind": 2.0, "parity": 0.5, "peak": 1.0}


def one_batch(task: TaskData, chosen: range) -> Any:
    return task.collate([task.rows[i] for i in chosen])


def step(model: nn.Module, batches: list[Any], loss: Any) -> tuple[dict[str, Any], list[Any]]:
    """A step's record, and the gradients before the update."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept: list[Any] = []

    class Keeping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            kept.extend(None if p.grad is None else p.grad.clone() for p in parameters.values())

    record = train_step(
        model,
        parameters,
        batches,
        Keeping(parameters.values(), lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        dtype_policy("float32", torch.device("cpu")),
        loss=loss,
        clip=None,
    )
    return record, kept


def test_a_step_is_the_weighted_sum_of_the_tasks_means_however_it_is_cut(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    cuts = {
        "whole": {"kind": [range(5)], "parity": [range(4)], "peak": [range(3)]},
        "cut": {
            "kind": [range(1), range(1, 5)],
            "parity": [range(3), range(3, 4)],
            "peak": [range(2), range(2, 3)],
        },
    }
    found = {}
    for name, cut in cuts.items():
        batches = [one_batch(tasks[t], rows) for t, parts in cut.items() for rows in parts]
        batches = batches[::2] + batches[1::2]  # not task by task
        found[name] = step(multi_head(), batches, TaskLoss.of_heads(multi_head(), WEIGHTS))
    model, wanted = multi_head(), torch.zeros(())
    for name, (rows,) in cuts["whole"].items():
        out = model(**one_batch(tasks[name], rows))  # the head's own mean
        assert out.loss is not None
        wanted = wanted + WEIGHTS[name] * out.loss
        for record, _ in found.values():
            assert record[f"loss/{name}"] == pytest.approx(out.loss.item(), rel=1e-5)
    wanted.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    for record, kept in found.values():
        assert record["loss"] == pytest.approx(wanted.item(), rel=1e-5)
        assert record["graded"] == 5 + sum(len(r["labels"]) for r in tasks["parity"].rows[:4]) + 3
        for one, other in zip(kept, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_evaluation_is_the_same_sum_and_says_each_task(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    model = multi_head()
    loss = TaskLoss.of_heads(model, WEIGHTS)
    config = TrainConfig(steps=1, accumulate=3, progress=False, keep_best=False)
    held_out = TaskBatches(tasks, 3, None)
    record = train(model, TaskBatches(tasks, 3), config, held_out, loss=loss).history[-1]
    with torch.no_grad():
        model.eval()
        means = {
            name: float(model(**one_batch(task, range(len(task)))).loss)
            for name, task in tasks.items()
        }
    for name, mean in means.items():
        assert record[f"eval_loss/{name}"] == pytest.approx(mean, rel=1e-5)
    wanted = sum(WEIGHTS[name] * mean for name, mean in means.items())
    assert record["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_heads_are_trained_with_one_batch_a_step(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    """Most heads get no gradient in a step, and that is no error; in the end they all moved."""
    model, before = multi_head(), multi_head()
    config = TrainConfig(epochs=4, accumulate=1, lr=0.05, progress=False)
    source = TaskBatches(tasks, 4, mixing="balanced")
    result = train(model, source, config, loss=TaskLoss.of_heads(model))
    for name, head in model.task_heads().items():
        assert not torch.equal(head.out.weight, before.head(name).out.weight)
        losses = [record[f"loss/{name}"] for record in result.history if f"loss/{name}" in record]
        assert len(losses) == result.steps // 3
        assert losses[-1] < losses[0]


def test_a_run_stopped_and_resumed_is_the_one_that_was_not(
    multi_head: Callable[..., MultiHead],
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folder, "plot_loss", lambda history, path: None)

    def run(out: str, stop: int = 0, **options: Any) -> tuple[MultiHead, Any]:
        model = multi_head()

        def on_step(record: Any) -> None:
            if record["step"] == stop:
                raise KeyboardInterrupt

        config = TrainConfig(out=tmp_path / out, steps=7, accumulate=2, progress=False, **options)
        source = TaskBatches(tasks, 3, temperature=2.0)
        loss = TaskLoss.of_heads(model, WEIGHTS)
        surgery = PCGrad.of_adapters(model)
        return model, train(model, source, config, on_step=on_step, loss=loss, surgery=surgery)

    whole, first = run("whole")
    run("cut", stop=4)
    again, second = run("cut", resume=True)
    assert second.resumed_from == 4
    assert [r["loss"] for r in first.history] == [r["loss"] for r in second.history]
    assert {r["epoch"] for r in first.history} == {1, 2}
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


class Generative(nn.Module):
    """Counts what it is asked, in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


class Sum:
    def count(self, batch: Any) -> float:
        return float(len(batch["input_ids"]))

    def __call__(self, model: Any, batch: Any, normalizer: float) -> LossResult:
        value = model.weight * batch["input_ids"].sum() / normalizer
        return LossResult(value, None, {"seen": (6.0, 3)})


def test_any_losses_and_their_figures() -> None:
    model = Generative()
    loss = TaskLoss({"a": Sum(), "b": Sum()})
    numbers = [("a", 1), ("b", 5), ("a", 3)]
    batches = [{"task": task, "input_ids": torch.tensor([[n], [n]])} for task, n in numbers]
    record, _ = step(model, batches, loss)
    assert record["loss"] == (1 + 1 + 3 + 3) / 4 + 5
    assert (record["loss/a"], record["loss/b"]) == (2, 5)
    assert (record["a/seen"], record["b/seen"]) == (2, 2)


def test_generative_tasks_share_a_decoder(small_decoder: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = small_decoder()
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}]
    batches = [{**collate(rows), "task": name} for name in ("a", "b")]
    record, _ = step(model, batches, TaskLoss(dict.fromkeys("ab", CausalLoss())))
    single, _ = step(model, [collate(rows)], CausalLoss())
    assert record["loss"] == pytest.approx(2 * single["loss"])
    assert record["loss/a"] == pytest.approx(single["loss"])


def test_a_step_in_which_nothing_of_a_task_is_graded(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    batch = one_batch(tasks["parity"], range(2))
    batch["labels"].fill_(-100)
    other = one_batch(tasks["kind"], range(2))
    record, kept = step(multi_head(), [batch, other], TaskLoss.of_heads(multi_head()))
    alone, _ = step(multi_head(), [other], TaskLoss.of_heads(multi_head()))
    assert record["loss"] == alone["loss"]
    assert "loss/parity" not in record
    assert all(g is None or g.isfinite().all() for g in kept)


def test_what_does_not_fit_is_refused(multi_head: Callable[..., MultiHead]) -> None:
    with pytest.raises(ValueError, match="TaskLoss needs the loss of at least one task"):
        TaskLoss({})
    with pytest.raises(ValueError, match="weights: no task 'c'; there are a"):
        TaskLoss({"a": HeadLoss()}, {"c": 1})
    with pytest.raises(ValueError, match="weight of task 'a' must be above 0 and finite; got 0"):
        TaskLoss({"a": HeadLoss()}, {"a": 0})
    with pytest.raises(ValueError, match="batch's task is None, and there are losses for a: take"):
        TaskLoss({"a": HeadLoss()}).count({"input_ids": 1})
    with pytest.raises(TypeError, match="of_heads takes a MultiHead; got Linear"):
        TaskLoss.of_heads(nn.Linear(1, 1))
    batch = {"task": "kind", "input_ids": torch.ones(1, 2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="a batch of task 'kind' has no labels to train on"):
        HeadLoss()(multi_head(), batch, 1)


def test_rates_by_part(multi_head: Callable[..., MultiHead]) -> None:
    model = multi_head()
    config = TrainConfig(lr=1e-3, weight_decay=0.1, lora_plus=4)
    made = optimizer_with_rates(model, config, {"kind": 10, "adapters": 0.5, "heads.peak": 2})
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = made(named)
    rates = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, p in named:
        decay = 0.1 if p.ndim > 1 else 0.0
        part = name.split(".")[1] if name.startswith("heads") else name.rsplit(".", 1)[-1]
        factor = {"kind": 10, "parity": 1, "peak": 2, "A": 0.5, "B": 2}[part]
        assert rates[p] == (pytest.approx(1e-3 * factor), decay), name
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_run_keeps_the_rates_ratio(
    multi_head: Callable[..., MultiHead], tasks: dict[str, TaskData]
) -> None:
    """AdamW's first step moves each weight by its rate."""
    model, before = multi_head(), multi_head()
    config = TrainConfig(steps=1, accumulate=3, lr=1e-3, warmup=0, clip=None, progress=False)
    source = TaskBatches(tasks, 4, mixing="balanced")
    rates = optimizer_with_rates(model, config, {"parity": 20})
    train(model, source, config, loss=TaskLoss.of_heads(model), optimizer=rates)
    for name, rate in (("kind", 1e-3), ("parity", 2e-2)):
        moved = model.head(name).out.weight - before.head(name).out.weight
        assert moved.abs().median().item() == pytest.approx(rate, rel=0.01)


def test_parts_that_are_not_there_are_named(multi_head: Callable[..., MultiHead]) -> None:
    model = multi_head()
    with pytest.raises(ValueError, match="rates: no head or module 'kin'; nearest names: 'kind'"):
        rate_factors(model, {"kin": 2})
    with pytest.raises(ValueError, match="the rate of 'kind' must be above 0 and finite; got -1"):
        rate_factors(model, {"kind": -1})
    with pytest.raises(ValueError, match="rates: 'adapters' holds no parameter"):
        rate_factors(multi_head(adapter=False), {"adapters": 2})
