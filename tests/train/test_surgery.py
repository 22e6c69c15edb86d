"""PCGrad: against algorithm 1 on flat vectors in float64, by its properties, and in the loop."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core import LoRAConfig, add_adapter
from lora_core.train import PCGrad, TrainConfig, train
from lora_core.train.ranks import Ranks
from lora_core.train.step import LossResult
from lora_core.train.surgery import Projection, gram, projected


def algorithm_1(gradients: list[Tensor], orders: list[list[int]]) -> Tensor:
    """Yu et al. 2020, algorithm 1, line by line on whole vectors in float64."""
    originals = [g.double() for g in gradients]
    total = torch.zeros_like(originals[0])
    for i, g in enumerate(originals):
        mine = g.clone()
        for j in orders[i]:
            other = originals[j]
            if torch.dot(mine, other) < 0:
                mine = mine - torch.dot(mine, other) / other.norm() ** 2 * other
        total += mine
    return total


def operate(
    gradients: list[tuple[str, list[Tensor | None]]], seed: int = 0, step: int = 0
) -> tuple[list[Tensor | None], dict[str, float], list[list[int]]]:
    """Surgery of batches' gradients: what is left, its figures, and the order it drew."""
    shapes = [
        next(g[n].shape for _, g in gradients if g[n] is not None)
        for n in range(len(gradients[0][1]))
    ]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    one = PCGrad(parameters, seed).at(step)
    for task, parts in gradients:
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = None if part is None else part.clone()
        one.take({"task": task})
        assert all(p.grad is None for p in parameters)
    tasks = len({task for task, _ in gradients})
    orders = PCGrad(parameters, seed).at(step).orders(tasks)
    figures = dict(one.finish())
    return [p.grad for p in parameters], figures, orders


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_it_is_algorithm_1(tasks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # a common part makes some pairs agree, noise makes others conflict
    common = torch.randn(12, generator=generator) * 0.3
    flat = [common + torch.randn(12, generator=generator) for _ in range(tasks)]
    batches = [(str(i), [g[:8].view(2, 4), g[8:]]) for i, g in enumerate(flat)]
    found, figures, orders = operate(batches, seed=seed)
    wanted = algorithm_1(flat, orders)
    got = torch.cat([g.flatten() for g in found if g is not None]).double()
    size = sum(g.norm() for g in flat)
    assert (got - wanted).norm() <= 1e-6 * size
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    cosines = [torch.cosine_similarity(flat[i].double(), flat[j].double(), 0) for i, j in pairs]
    assert figures["cosine"] == pytest.approx(float(sum(cosines)) / len(pairs), abs=1e-9)
    assert figures["conflicts"] == sum(bool(c < 0) for c in cosines) / len(pairs)


def test_originals_are_the_partners_and_their_order_matters() -> None:
    """Three in a plane: the second projection may bring the first conflict back."""
    flat = [torch.tensor(v, dtype=torch.float32) for v in ([1, 0], [-1, 2], [-1, -1])]
    products = gram([{0: g} for g in flat], {0: flat[0]}).tolist()
    ways = [[[1, 2], [0, 2], [0, 1]], [[2, 1], [2, 0], [1, 0]]]
    totals = []
    for orders in ways:
        weights = projected(products, orders)
        total = sum(w * g.double() for w, g in zip(weights, flat, strict=True))
        assert isinstance(total, Tensor)
        torch.testing.assert_close(total, algorithm_1(flat, orders), rtol=0, atol=1e-12)
        totals.append(total)
    assert not torch.allclose(*totals)
    # a partner that was projected first would give another sum
    mine, seen = [g.double() for g in flat], []
    for i in range(3):
        for j in ways[0][i]:
            dot = torch.dot(mine[i], mine[j])
            mine[i] = mine[i] - min(dot, torch.tensor(0.0)) / mine[j].norm() ** 2 * mine[j]
        seen.append(mine[i])
    assert not torch.allclose(sum(seen[1:], seen[0]), totals[0], atol=1e-3)


@given(st.integers(0, 10**6))
def test_of_two_tasks_neither_works_against_the_other_afterwards(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(30, generator=generator) for _ in range(2))
    a = a if torch.dot(a, b) < 0 else -a
    (found, *_), figures, _ = operate([("a", [a]), ("b", [b])])
    assert found is not None
    assert figures["conflicts"] == 1
    scale = float(a.norm() * b.norm())
    assert torch.dot(found, a) >= -1e-5 * scale
    assert torch.dot(found, b) >= -1e-5 * scale
    # and what is left of one is across the other
    left = found.double() - (b - torch.dot(a, b) / a.norm() ** 2 * a).double()
    assert abs(float(torch.dot(left, b.double()))) <= 1e-5 * scale


def test_without_a_conflict_it_is_the_plain_sum_in_the_order_of_the_batches() -> None:
    torch.manual_seed(3)
    parts = [torch.rand(50) * 10**k for k in (0, 5, -3, 2)]  # no negative product, much rounding
    (found, *_), figures, _ = operate(list(zip("abab", ([p] for p in parts), strict=True)))
    plain = parts[0].clone()
    for part in parts[1:]:
        plain += part
    assert found is not None
    assert torch.equal(found, plain)
    by_task = (parts[0] + parts[2]) + (parts[1] + parts[3])
    assert not torch.equal(found, by_task)  # which another order of adding is not
    assert figures["conflicts"] == 0


def test_what_only_one_task_reaches_is_summed_as_well() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    only = torch.tensor([3.0])
    (first, second), figures, _ = operate([("a", [a, only]), ("b", [b, None])])
    assert first is not None
    assert second is not None
    assert figures["conflicts"] == 1
    # gᵦ loses its part along all of gₐ, (1, 0, 3): the third number changes too
    wanted = algorithm_1([torch.cat([a, only]), torch.tensor([-1.0, 1.0, 0.0])], [[1], [0]])
    torch.testing.assert_close(torch.cat([first, second]).double(), wanted)


def test_one_task_and_zero_gradients_have_no_figures() -> None:
    one = torch.ones(3)
    assert operate([("a", [one]), ("a", [one])])[1] == {}
    found, figures, _ = operate([("a", [one]), ("b", [torch.zeros(3)])])
    assert figures == {}
    assert torch.equal(found[0] if found[0] is not None else one * 0, one)


def test_what_is_not_finite_is_left_to_the_step() -> None:
    (found, *_), figures, _ = operate(
        [("a", [-torch.ones(2)]), ("b", [torch.tensor([1, math.inf])])]
    )
    assert found is not None
    assert not found.isfinite().all()
    assert figures == {}


def test_the_order_is_a_function_of_seed_and_step() -> None:
    p = [nn.Parameter(torch.zeros(1))]
    drawn = [Projection(p, seed, step).orders(6) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] != drawn[3] != drawn[0]
    for orders in drawn:
        assert [sorted([i, *order]) for i, order in enumerate(orders)] == [list(range(6))] * 6
    state = random.getstate(), torch.get_rng_state()
    Projection(p, 0, 0).orders(3)
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())


class Two(nn.Module):
    """A shared layer with an adapter, and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})

    def forward(self, task: str, x: Tensor) -> Tensor:
        return self.heads[task](torch.nn.functional.dropout(self.shared(x), 0.2, self.training))


class Squares:
    """Squared error of the batch's task; tasks that want opposite things of the shared layer."""

    units = ("a", "b")

    def unit(self, batch: Any) -> str:
        return batch["task"]

    def count(self, batch: Any) -> float:
        return float(len(batch["x"]))

    def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> LossResult:
        errors = (model(batch["task"], batch["x"]).squeeze(-1) - batch["y"]) ** 2
        return LossResult(errors.sum() / normalizer)


class Alternating:
    """Batches of the two tasks in turn, the same in each epoch."""

    def __init__(self, count: int = 12) -> None:
        generator = torch.Generator().manual_seed(5)
        self.batches = []
        for number in range(count):
            x = torch.randn(3, 4, generator=generator)
            y = x.sum(dim=1) * (1 if number % 2 else -1)
            self.batches.append({"task": "ab"[number % 2], "x": x, "y": y})

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        return iter(self.batches[start:])

    def per_epoch(self) -> int:
        return len(self.batches)

    def note(self) -> None: ...

    def largest(self) -> None: ...


@pytest.fixture
def two() -> Callable[[], Two]:
    def make() -> Two:
        torch.manual_seed(0)
        model = Two()
        with torch.no_grad():  # one head's weights serve both, so that opposite aims conflict
            model.heads["b"].load_state_dict(model.heads["a"].state_dict())
        add_adapter(model, LoRAConfig(r=2, targets=["shared"]))
        model.heads.requires_grad_(True)
        return model

    return make


def config(**options: Any) -> TrainConfig:
    return TrainConfig(
        **{"lr": 0.02, "epochs": 3, "accumulate": 2, "progress": False, "warmup": 0} | options
    )


def test_the_step_is_the_plain_one_up_to_the_first_conflict_and_heads_are_left_alone(
    two: Callable[[], Two],
) -> None:
    plain, cut = two(), two()
    settings = config(epochs=1, steps=1)
    train(plain, Alternating(), settings, loss=Squares())
    found = train(cut, Alternating(), settings, loss=Squares(), surgery=PCGrad.of_adapters(cut))
    assert found.history[0]["conflicts"] == 1.0
    assert -1 <= found.history[0]["cosine"] < 0
    for (name, one), (_, other) in zip(
        plain.named_parameters(), cut.named_parameters(), strict=True
    ):
        if "heads" in name:
            # clipping sees the whole gradient, so AdamW's first step is the same to rounding
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_run_stopped_and_resumed_draws_what_the_other_drew(
    two: Callable[[], Two], tmp_path: Any, no_plot: None, without_times: Callable[..., Any]
) -> None:
    def run(out: str, **options: Any) -> tuple[Two, Any]:
        model = two()
        stop = options.pop("stop", None)

        def on_step(record: Any) -> None:
            if record["step"] == stop:
                raise KeyboardInterrupt

        settings = config(out=tmp_path / out, seed=3, **options)
        surgery = PCGrad.of_adapters(model, seed=3)
        return model, train(
            model, Alternating(), settings, loss=Squares(), on_step=on_step, surgery=surgery
        )

    whole, first = run("whole")
    run("cut", stop=7)
    resumed, second = run("cut", resume=True)
    assert second.resumed_from == 7
    assert without_times(first.history) == without_times(second.history)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(record["conflicts"] for record in first.history)


def test_an_adapter_that_is_not_trained_is_left_out(two: Callable[[], Two]) -> None:
    model = two()
    first = PCGrad.of_adapters(model).parameters
    add_adapter(model, LoRAConfig(r=3, targets=["shared"]), "new")
    second = PCGrad.of_adapters(model).parameters
    assert len(first) == len(second) == 2
    assert not set(first) & set(second)


def test_what_does_not_go_is_refused(two: Callable[[], Two]) -> None:
    model = two()
    with pytest.raises(ValueError, match="got 0, of which 0 require no gradient: add an adapter"):
        PCGrad.of_adapters(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 2, of which 1 require no gradient"):
        PCGrad([model.shared.base.weight, model.heads["a"].weight])
    for batch, held in (({"x": 1}, r"\['x'\]"), ([1], "list")):
        with pytest.raises(ValueError, match=f"tells tasks apart by batch.* holds {held}: take"):
            PCGrad.of_adapters(model).at(0).take(batch)


def test_several_processes_are_refused(two: Callable[[], Two]) -> None:
    from lora_core.device import dtype_policy
    from lora_core.train import train_step

    model = two()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    with pytest.raises(ValueError, match="works on one process, and there are 2: start without"):
        train_step(
            model,
            parameters,
            [],
            optimizer,
            torch.amp.GradScaler("cpu", enabled=False),
            dtype_policy("float32", torch.device("cpu")),
            loss=Squares(),
            ranks=Ranks(0, 2),
            surgery=PCGrad.of_adapters(model).at(0),
        )


def test_a_parameter_that_no_unit_reaches_is_refused_once_all_were_seen(
    two: Callable[[], Two],
) -> None:
    model = two()
    # one batch a step: the first knows nothing of b's head, and is no reason to refuse
    train(model, Alternating(), config(accumulate=1, steps=3), loss=Squares())
    model = two()
    model.heads["c"] = nn.Linear(6, 1)
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"2 of 8 trained .* got no gradient: heads\.c\.weight"):
        train(
            model,
            Alternating(),
            config(accumulate=1, steps=3),
            loss=Squares(),
            on_step=lambda record: seen.append(record["step"]),
        )
    assert seen == [1]
