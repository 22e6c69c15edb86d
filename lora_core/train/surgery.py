r"""PCGrad: tasks whose gradients point against each other give up what they fight about.

Several tasks train one adapter. Where the gradients of two have a negative cosine, a step along
their sum undoes for each part of what it does for the other. PCGrad takes, from each task's
gradient, its component along every other task's gradient that it conflicts with:

    for each task i:  g'ᵢ = gᵢ
        for the other tasks j in random order:
            if g'ᵢ·gⱼ < 0:  g'ᵢ = g'ᵢ − (g'ᵢ·gⱼ / ‖gⱼ‖²) gⱼ        (gⱼ as it was, not projected)
    gradient = Σ g'ᵢ

Every g'ᵢ stays in the span of the originals, g'ᵢ = Σₘ Cᵢₘ gₘ, so the projections need the k × k
products gᵢ·gⱼ and nothing else: they are summed once, in float64, the loop above runs on numbers,
and one weighted sum of the originals is the gradient. The usual implementation projects flat
vectors, k (k − 1) times over all parameters. Without a conflict the gradient is the plain sum in
the order of the batches, bit for bit what a step without surgery has.

Only the shared parameters are touched: a head's gradient comes from its own task. A task's gradient
is that of its *weighted* loss, as it enters the sum. A step has to hold batches of at least two
tasks, so `accumulate` should be a multiple of the number of tasks.

Memory: k + 1 copies of the shared gradient while a step runs, of k tasks, where a step has one
otherwise: 4 bytes each, so 3 tasks and 10 M adapter parameters take 120 MB more. Time: a pass over
these copies a step, and no more backward passes than without.

The order is a function of (seed, step), so a resumed run draws what the uninterrupted one drew.

Ref: Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782, algorithm 1.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_core.adapters import adapted_modules

_CHUNK = 1 << 20  # numbers of each task that are in float64 at once


class StepSurgery(Protocol):
    """What a step asks of a surgery."""

    def take(self, batch: Any) -> None:
        """Take the gradients that the batch's backward pass has just left."""
        ...

    def finish(self) -> Mapping[str, float]:
        """Leave the step's gradients in place; figures for its record."""
        ...


class Surgery(Protocol):
    """What a run asks of a surgery: one object a step, made from the step's number."""

    def at(self, step: int) -> StepSurgery:
        """The surgery of a step, counted from 0."""
        ...


@dataclass(frozen=True)
class PCGrad:
    """Gradient surgery of shared parameters, task against task.

    Args:
        parameters: the shared ones, each trained.
        seed: of the order in which a task meets the others.

    Raises:
        ValueError: no parameter, or one that is not trained.
    """

    parameters: Sequence[nn.Parameter]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(dict.fromkeys(self.parameters)))
        frozen = sum(not p.requires_grad for p in self.parameters)
        if frozen or not self.parameters:
            raise ValueError(
                f"PCGrad needs trained parameters that tasks share; got {len(self.parameters)}, of "
                f"which {frozen} require no gradient: add an adapter first, or leave them out"
            )

    @classmethod
    def of_adapters(cls, model: nn.Module, seed: int = 0) -> "PCGrad":
        """Surgery of the trained adapters' parameters, heads and all else left alone.

        Args:
            model: with adapters.
            seed: of the order.

        Returns:
            The surgery.

        Raises:
            ValueError: no adapter of the model is trained.
        """
        hosts = [host for _, host in adapted_modules(model)]
        found = [p for host in hosts for p in host.adapters.parameters() if p.requires_grad]
        return cls(found, seed)

    def at(self, step: int) -> "Projection":
        """The surgery of a step, counted from 0."""
        return Projection(self.parameters, self.seed, step)


class Projection:
    """PCGrad within one step: gradients by task, then their projected sum.

    Args:
        parameters: the shared ones.
        seed: of the run.
        step: the step's number.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], seed: int, step: int) -> None:
        self.parameters = parameters
        # the CPU generator keeps 32 bits of its seed
        self.generator = torch.Generator().manual_seed((seed + 1_000_003 * step) % 2**32)
        self.by_task: dict[str, dict[int, Tensor]] = {}
        self.total: dict[int, Tensor] = {}

    @torch.no_grad()
    def take(self, batch: Any) -> None:
        """Add a batch's gradients to its task's, and to the sum of all.

        Args:
            batch: a mapping with "task", the task's name.

        Raises:
            ValueError: the batch names no task.
        """
        if not isinstance(batch, Mapping) or "task" not in batch:
            held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"PCGrad tells tasks apart by batch['task'], but the batch holds {held}: take the "
                "batches from TaskBatches, or name the task in each"
            )
        mine = self.by_task.setdefault(batch["task"], {})
        for number, parameter in enumerate(self.parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            for sums, part in ((self.total, gradient.clone()), (mine, gradient)):
                if number in sums:
                    sums[number].add_(part)
                else:
                    sums[number] = part

    @torch.no_grad()
    def finish(self) -> Mapping[str, float]:
        """Put the projected sum into the parameters' `grad`.

        Returns:
            `conflicts`, the share of pairs of tasks whose gradients have a negative cosine, and
            `cosine`, its mean over the pairs; nothing where no two tasks have a gradient.
        """
        names = sorted(self.by_task)
        products = gram([self.by_task[name] for name in names], self.total)
        weights = [1.0] * len(names)
        if bool(products.isfinite().all()):  # else the step is refused, or skipped by the scaler
            weights = projected(products.tolist(), self.orders(len(names)))
        for number, plain in self.total.items():
            self.parameters[number].grad = plain
            if any(weight != 1 for weight in weights):
                plain.zero_()
                for name, weight in zip(names, weights, strict=True):
                    if number in self.by_task[name]:
                        plain.add_(self.by_task[name][number], alpha=weight)
        self.by_task, self.total = {}, {}
        return conflict_figures(products)

    def orders(self, tasks: int) -> list[list[int]]:
        """For each task the others, in the order in which it meets them."""
        drawn = [torch.randperm(tasks, generator=self.generator).tolist() for _ in range(tasks)]
        return [[j for j in order if j != i] for i, order in enumerate(drawn)]


def gram(parts: Sequence[Mapping[int, Tensor]], like: Mapping[int, Tensor]) -> Tensor:
    """The products of tasks' gradients.

    Args:
        parts: of each of k tasks, gradients by number; one that is missing is zero.
        like: a tensor of the shape of each number.

    Returns:
        (k, k) float64, on the CPU.
    """
    products = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for number, whole in like.items():
        for start in range(0, whole.numel(), _CHUNK):
            size = min(_CHUNK, whole.numel() - start)
            rows = torch.zeros(len(parts), size, dtype=torch.float64, device=whole.device)
            for row, part in zip(rows, parts, strict=True):
                if number in part:
                    row.copy_(part[number].reshape(-1)[start : start + size])
            products += (rows @ rows.T).cpu()
    return products


def projected(products: Sequence[Sequence[float]], orders: Iterable[Iterable[int]]) -> list[float]:
    """How much of each task's gradient the projected sum holds.

    Args:
        products: (k, k), products[i][j] = gᵢ·gⱼ.
        orders: for each task the others, in the order in which it meets them.

    Returns:
        (k,) weights: Σᵢ g'ᵢ = Σₘ weights[m] gₘ. All are 1 where nothing conflicts.

    Ref:
        Yu et al. 2020, arXiv:2001.06782, algorithm 1, in the coordinates of the originals.
    """
    tasks = range(len(products))
    weights = [1.0 for _ in tasks]
    for i, order in enumerate(orders):
        own = [float(m == i) for m in tasks]
        for j in order:
            dot = math.fsum(own[m] * products[m][j] for m in tasks)
            if dot < 0:  # then ‖gⱼ‖ is not 0
                own[j] -= dot / products[j][j]
        for m in tasks:
            weights[m] += own[m] - float(m == i)
    return weights


def conflict_figures(products: Tensor) -> dict[str, float]:
    """Share of conflicting pairs and mean cosine of a (k, k) Gram matrix; {} without a pair."""
    norms = products.diagonal().sqrt()
    there = [i for i in range(len(norms)) if 0 < float(norms[i]) < math.inf]
    pairs = [(i, j) for at, i in enumerate(there) for j in there[at + 1 :]]
    cosines = [float(products[i, j] / (norms[i] * norms[j])) for i, j in pairs]
    if not cosines or not all(map(math.isfinite, cosines)):
        return {}
    conflicts = sum(cosine < 0 for cosine in cosines) / len(cosines)
    return {"conflicts": conflicts, "cosine": math.fsum(cosines) / len(cosines)}
