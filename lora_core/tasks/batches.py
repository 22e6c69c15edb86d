"""Batches of several tasks, one task to a batch, in an order that a seed and an epoch determine.

A batch holds one task because heads, losses and often the shape of the labels differ; what meets in
an optimizer step is then decided by the order of batches. Three ways to mix:

    proportional    shares follow sizes to the power 1/T: T = 1 shows every row once an epoch, a
                    higher temperature moves towards equal shares
    weighted        shares of the batches, as given
    balanced        each task as often as the largest; the smaller ones are repeated

An epoch has a fixed number of batches of each task. Where these are more or fewer than the task
holds, its own epochs go on where the last one stopped: the k-th batch of a task in the whole run is
number k modulo its batches, in its own epoch k div its batches. So within a task every row is seen
before any is seen again, and every position of the run is known without replaying it.

The order is spread, not shuffled: the j-th of a task's n batches stands at (j + ½)/n of the epoch,
and ties are broken by a draw. With equal shares each run of k batches then holds all k tasks, which
gradient surgery and a fair step need; drawn at random, a step of 4 batches would hold all of 4
tasks one time in ten. What varies from epoch to epoch is which rows meet, and the order of ties.

Ref: Raffel et al. 2019, arXiv:1910.10683, section 3.5.2 (mixing by examples, temperature, equal).
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch

from lora_core.data.task_rows import TaskData
from lora_core.train.batches import Batch, BatchSource, make_batches
from lora_core.train.sources import StatefulSource, generator_of

Mixing = Literal["proportional", "weighted", "balanced"]
_MIXINGS = ("proportional", "weighted", "balanced")


class TaskBatches:
    """Batches of several tasks; each is a dict with "task".

    Args:
        tasks: task -> its data: a `TaskData`, a sequence of rows (SFT rows too), or a `BatchSource`
            that knows its batches per epoch.
        batch_size: rows in a batch; not used for sources.
        seed: of all orders; None, for evaluation: one task after another, each once, as it lies.
        mixing: see above.
        weights: share of the batches of each task, on any scale; for "weighted".
        temperature: T of "proportional", 1 or more.
        collate: task -> (rows -> batch), where it is not the usual one.

    Raises:
        ValueError: no task, an empty one, one that does not know its batches, or a mixing whose
            settings do not fit.
        TypeError: a batch that is not a dict (as it comes).
    """

    def __init__(  # data, then how to mix, by name
        self,
        tasks: Mapping[str, Any],
        batch_size: int = 4,
        seed: int | None = 0,
        *,
        mixing: Mixing = "proportional",
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        collate: Mapping[str, Callable[[Sequence[Any]], Batch]] | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("TaskBatches needs at least one task")
        _check_names("collate", collate, tasks)
        self.seed = seed
        own = collate or {}
        self.sources = {
            name: _source(name, data, batch_size, seed, own.get(name))
            for name, data in tasks.items()
        }
        self.sizes = {name: _size(name, source) for name, source in self.sources.items()}
        self.shares = shares(self.sizes, mixing, weights, temperature)
        if seed is None and self.shares != self.sizes:
            raise ValueError("without a seed every batch comes once: leave mixing and weights out")

    def per_epoch(self) -> int:
        """Batches in an epoch, of all tasks."""
        return sum(self.shares.values())

    def plan(self, epoch: int) -> list[str]:
        """The tasks of an epoch's batches, in order."""
        names = list(self.shares)
        if self.seed is None:
            return [name for name in names for _ in range(self.shares[name])]
        places = [
            ((2 * j + 1) / (2 * self.shares[name]), name)
            for name in names
            for j in range(self.shares[name])
        ]
        draws = torch.rand(len(places), generator=generator_of(self.seed, epoch)).tolist()
        order = sorted(range(len(places)), key=lambda at: (places[at][0], draws[at]))
        return [places[at][1] for at in order]

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        plan = self.plan(number)
        streams: dict[str, Iterator[Batch]] = {}
        for at in range(start, len(plan)):
            name = plan[at]
            if name not in streams:
                begun = number * self.shares[name] + plan[:at].count(name)
                streams[name] = _from(self.sources[name], self.sizes[name], begun)
            yield _named(name, next(streams[name]))

    def note(self) -> str:
        """How much of each task an epoch shows."""
        parts = [
            f"{name} {count} ({count / self.sizes[name]:.3g} of its {self.sizes[name]})"
            for name, count in self.shares.items()
        ]
        return f"batches an epoch: {', '.join(parts)}"

    def largest(self) -> tuple[Batch, str] | None:
        """The largest of the tasks' largest batches, by tokens; None where one does not know."""
        found = []
        for name, source in self.sources.items():
            if (known := source.largest()) is None:
                return None
            batch = _named(name, known[0])
            size = batch["input_ids"].numel() if "input_ids" in batch else 0
            found.append((size, batch, f"task {name}, {known[1]}"))
        _, batch, words = max(found, key=lambda one: one[0])
        return batch, words


def shares(
    sizes: Mapping[str, int],
    mixing: str = "proportional",
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
) -> dict[str, int]:
    """Batches of each task in an epoch.

    Args:
        sizes: batches that each task holds.
        mixing: "proportional", "weighted" or "balanced".
        weights: of "weighted", above 0, one for each task.
        temperature: of "proportional".

    Returns:
        Task -> batches, one at least. They sum to as many as all tasks hold ("balanced": to as many
        as the largest holds, times the number of tasks), rounded by largest remainders.

    Raises:
        ValueError: settings that do not fit the mixing, or each other.
    """
    if mixing not in _MIXINGS:
        raise ValueError(f"mixing must be one of {', '.join(_MIXINGS)}; got {mixing!r}")
    if (weights is None) == (mixing == "weighted"):
        given = "none are given" if weights is None else f"mixing is {mixing!r}"
        raise ValueError(f'weights belong to mixing "weighted", and {given}')
    if not 1 <= temperature < float("inf") or (temperature != 1 and mixing != "proportional"):
        raise ValueError(
            f'temperature must be 1 or more, and 1 unless mixing is "proportional"; got '
            f"{temperature} with {mixing!r}"
        )
    if mixing == "balanced":
        return dict.fromkeys(sizes, max(sizes.values()))
    wanted = {name: size ** (1 / temperature) for name, size in sizes.items()}
    if weights is not None:
        _check_names("weights", weights, sizes, every=True)
        wanted = {name: float(weights[name]) for name in sizes}
        for name, weight in wanted.items():
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"the weight of task {name!r} must be above 0 and finite; got {weight}: to "
                    "leave a task out, do not give it"
                )
    return _rounded(wanted, sum(sizes.values()))


def _rounded(wanted: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in these proportions that sum to `total` (at least 1 each, else as close)."""
    whole = sum(wanted.values())
    exact = {name: total * part / whole for name, part in wanted.items()}
    found = {name: max(1, int(part)) for name, part in exact.items()}
    behind = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in behind[: max(0, total - sum(found.values()))]:
        found[name] += 1
    return found


def _source(
    name: str,
    data: Any,
    batch_size: int,
    seed: int | None,
    collate: Callable[[Sequence[Any]], Batch] | None,
) -> BatchSource:
    """A task's own batches; their order depends on no other task."""
    own = None if seed is None else (seed + zlib.crc32(name.encode())) % 2**32
    if isinstance(data, TaskData):
        data, collate = data.rows, collate or data.collate
    if isinstance(data, StatefulSource):
        raise ValueError(
            f"task {name!r}: {type(data).__name__} has a state, which TaskBatches would not save: "
            "train on it alone, or give rows"
        )
    try:
        return make_batches(data, batch_size, own, collate)
    except (ValueError, TypeError) as error:
        raise type(error)(f"task {name!r}: {error}") from None


def _size(name: str, source: BatchSource) -> int:
    """Batches that a task holds; ValueError where it does not know, or holds none."""
    count = source.per_epoch()
    if not count:
        held = "holds no batch" if count == 0 else "does not say how many batches it holds"
        raise ValueError(f"task {name!r} {held}: give a sequence of rows, or a sized source")
    return count


def _from(source: BatchSource, size: int, position: int) -> Iterator[Batch]:
    """A task's batches without end, from the `position`-th of its whole run on."""
    epoch, start = divmod(position, size)
    while True:
        yield from islice(source.epoch(epoch, start), size - start)
        epoch, start = epoch + 1, 0


def _named(name: str, batch: Batch) -> dict[str, Any]:
    """The batch with its task's name."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch of task {name!r} must be a dict, to carry the task's name; its collate made "
            f"a {type(batch).__name__}"
        )
    return {**batch, "task": name}


def _check_names(
    what: str, given: Mapping[str, Any] | None, tasks: Mapping[str, Any], every: bool = False
) -> None:
    """Refuse names that are no task's, or with `every` tasks without one; ValueError."""
    for name in given or ():
        if name not in tasks:
            raise ValueError(f"{what}: no task {name!r}; there are {', '.join(tasks)}")
    for name in tasks:
        if every and name not in (given or ()):
            raise ValueError(f"{what}: none for task {name!r}; give one for each")
