"""Mixing several tasks: shares, the order, what is seen, and exact positions."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import SFTDataset, load_tokenizer
from lora_core.tasks import TaskBatches, shares
from lora_core.train.batches import step_groups


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [n % 7, 1], "labels": [n % 7, 1], "source": name} for n in range(count)]


def made(sizes: dict[str, int], **options: Any) -> TaskBatches:
    return TaskBatches({n: rows(n, c) for n, c in sizes.items()}, batch_size=2, **options)


sizes_of = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 30), min_size=1, max_size=4
)
mixes = st.sampled_from(
    [
        {"mixing": "proportional"},
        {"mixing": "proportional", "temperature": 3.0},
        {"mixing": "balanced"},
    ]
)


@given(sizes_of, mixes, st.integers(0, 9))
def test_shares_are_kept_and_every_row_is_seen_before_any_is_seen_again(
    sizes: dict[str, int], mix: dict[str, Any], seed: int
) -> None:
    source = made(sizes, seed=seed, **mix)
    seen: dict[str, Counter[int]] = {name: Counter() for name in sizes}
    for epoch in range(3):
        batches = list(source.epoch(epoch))
        assert Counter(b["task"] for b in batches) == source.shares
        assert [b["task"] for b in batches] == source.plan(epoch)
        assert len(batches) == source.per_epoch()
        for batch in batches:
            assert set(batch["source"]) == {batch["task"]}
            seen[batch["task"]].update(batch["row"])
    for name, counts in seen.items():
        times = [counts[row] for row in range(sizes[name])]
        assert max(times) - min(times) <= 1


@given(sizes_of, mixes, st.integers(0, 9), st.data())
def test_any_position_of_the_run_is_found_again(
    sizes: dict[str, int], mix: dict[str, Any], seed: int, data: Any
) -> None:
    whole = made(sizes, seed=seed, **mix)
    per = whole.per_epoch()
    accumulate = data.draw(st.integers(1, 4))
    groups = -(-per // accumulate)
    at = data.draw(st.integers(0, 3 * groups - 1))
    straight = list(islice(step_groups(whole, accumulate), at, at + 5))
    again = made(sizes, seed=seed, **mix)
    resumed = list(islice(step_groups(again, accumulate, at // groups, at % groups), 5))

    def told(found: list[Any]) -> Any:
        return [(e, g, [(b["task"], b["row"]) for b in batches]) for e, g, batches in found]

    assert told(straight) == told(resumed)


def test_equal_shares_put_every_task_into_every_round() -> None:
    source = made({"a": 20, "b": 6, "c": 13}, mixing="balanced")
    assert source.shares == {"a": 10, "b": 10, "c": 10}
    orders = set()
    for epoch in range(2):
        plan = source.plan(epoch)
        rounds = [tuple(plan[at : at + 3]) for at in range(0, 30, 3)]
        assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
        orders.add(tuple(rounds))
    assert len(orders) == 2
    assert len({one for order in orders for one in order}) > 1  # ties are drawn


def test_a_rare_task_is_spread_over_the_epoch() -> None:
    plan = made({"a": 60, "b": 6}).plan(0)
    assert len(plan) == 33
    places = [at for at, name in enumerate(plan) if name == "b"]
    assert places == [5, 16, 27]  # in the middle of each third


def test_the_order_of_a_task_does_not_depend_on_the_others() -> None:
    def of_a(source: TaskBatches, task: str = "a") -> list[Any]:
        return [b["row"] for b in source.epoch(1) if b["task"] == task]

    assert of_a(made({"a": 9, "b": 5})) == of_a(made({"c": 30, "a": 9}))
    assert of_a(made({"a": 9, "b": 5})) != of_a(made({"a": 9, "b": 5}, seed=1))
    # nor is it another task's
    both = made({"a": 9, "b": 9})
    assert of_a(both) != of_a(both, "b")


@pytest.mark.parametrize(
    ("mix", "wanted"),
    [
        ({}, {"a": 90, "b": 10}),
        ({"temperature": 2.0}, {"a": 75, "b": 25}),
        ({"temperature": 1e9}, {"a": 50, "b": 50}),
        ({"mixing": "balanced"}, {"a": 90, "b": 90}),
        ({"mixing": "weighted", "weights": {"a": 1, "b": 3}}, {"a": 25, "b": 75}),
        ({"mixing": "weighted", "weights": {"a": 1e-9, "b": 3}}, {"a": 1, "b": 99}),
    ],
)
def test_shares(mix: dict[str, Any], wanted: dict[str, int]) -> None:
    assert shares({"a": 90, "b": 10}, **mix) == wanted


def test_rounding_keeps_the_sum() -> None:
    found = shares({"a": 7, "b": 7, "c": 6}, "weighted", {"a": 1, "b": 1, "c": 1})
    assert sorted(found.values()) == [6, 7, 7]
    assert made({"a": 4, "b": 40}).note() == (
        "batches an epoch: a 2 (1 of its 2), b 20 (1 of its 20)"
    )


def test_evaluation_takes_each_batch_once_as_it_lies() -> None:
    source = made({"b": 3, "a": 5}, seed=None)
    found = [(b["task"], b["row"]) for b in source.epoch(0)]
    assert found == [("b", [0, 1]), ("b", [2]), ("a", [0, 1]), ("a", [2, 3]), ("a", [4])]
    assert found == [(b["task"], b["row"]) for b in source.epoch(7)]


def test_the_largest_batch_is_the_longest_of_any_task() -> None:
    long = [{"input_ids": [1] * 9, "labels": [1] * 9}]
    batch, words = TaskBatches({"a": rows("a", 5), "b": long}, 2).largest() or ({}, "")
    assert batch["task"] == "b"
    assert words == "task b, row 0: 9 tokens x 1 rows"


def test_generative_tasks_are_files_of_their_own(tmp_path: Path, tokenizer_folder: Path) -> None:
    tok = load_tokenizer(tokenizer_folder)
    tasks = {}
    for name in ("sum", "translate"):
        line = {"messages": [{"role": "user", "content": name}]}
        line["messages"].append({"role": "assistant", "content": "x"})
        (tmp_path / name).write_text(json.dumps(line) + "\n")
        tasks[name] = SFTDataset.from_jsonl(tmp_path / name, tok)
    batch, other = TaskBatches(tasks, 4).epoch(0)
    assert {batch["task"], other["task"]} == {"sum", "translate"}
    assert set(batch) >= {"input_ids", "labels", "attention_mask"}


def test_own_collates() -> None:
    tasks = {"a": [1, 2, 3], "b": rows("b", 2)}
    source = TaskBatches(tasks, 2, collate={"a": lambda items: {"sum": sum(items)}})
    sums = sorted(b["sum"] for b in source.epoch(0) if b["task"] == "a")
    assert sum(sums) == 6
    assert source.largest() is None  # of a task with rows of one's own
    with pytest.raises(TypeError, match=r"batch of task 'a' must be a dict.* made a list"):
        list(TaskBatches(tasks, 2, collate={"a": list}).epoch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": "fair"}, "mixing must be one of proportional, weighted, balanced; got 'fair'"),
        ({"mixing": "weighted"}, 'weights belong to mixing "weighted", and none are given'),
        ({"weights": {"a": 1}}, "weights belong to .* and mixing is 'proportional'"),
        ({"mixing": "weighted", "weights": {"x": 1}}, "weights: no task 'x'; there are a, b"),
        ({"mixing": "weighted", "weights": {"a": 1}}, "weights: none for task 'b'; give one for"),
        (
            {"mixing": "weighted", "weights": {"a": 1, "b": 0}},
            "weight of task 'b' must be above 0 and finite; got 0",
        ),
        ({"temperature": 0.5}, "temperature must be 1 or more, .* got 0.5 with 'proportional'"),
        ({"temperature": 2, "mixing": "balanced"}, "temperature must be .* with 'balanced'"),
        ({"collate": {"x": list}}, "collate: no task 'x'; there are a, b"),
        ({"seed": None, "mixing": "balanced"}, "without a seed every batch comes once: leave"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made({"a": 4, "b": 2}, **options)


class Unknown:
    def epoch(self, number: int, start: int = 0) -> Any:
        return iter(())

    def per_epoch(self) -> None: ...

    def note(self) -> None: ...

    def largest(self) -> None: ...


def test_tasks_without_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="TaskBatches needs at least one task"):
        TaskBatches({})
    with pytest.raises(ValueError, match="task 'a': the data set is empty"):
        TaskBatches({"a": []})
    with pytest.raises(ValueError, match="task 'a' does not say how many batches it holds: give"):
        TaskBatches({"a": Unknown()})

    class Remembering(Unknown):
        def state(self) -> Any: ...

        def restore(self, tensors: Any, rest: Any) -> None: ...

    with pytest.raises(ValueError, match="task 'a': Remembering has a state, which TaskBatches w"):
        TaskBatches({"a": Remembering()})
