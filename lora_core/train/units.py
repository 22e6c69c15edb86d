"""What a loss counts, in which units, and whether its gradient reaches what is trained.

A step's loss is a sum over its batches divided by what they count together. Most losses count one
thing, graded tokens. A loss over several tasks counts labels here and tokens there, and these do
not add up: a mean over both would say nothing, and a task of 900 tokens would drown one of 4
labels. Such a loss names each batch's *unit* (`loss.unit(batch)`), and a batch is divided by the
count of its own unit in the whole step. So the normalizer of a batch stays one number, and a step
cut into more batches, or computed by more processes, has the same loss.

It also says which units there are (`loss.units`). Until each has been seen, a trained parameter
without a gradient may belong to one that has not come yet: a head, say. `Reach` waits for them, and
then refuses what no unit reaches.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

Batch = Any


def unit_of(loss: object, batch: Batch) -> str:
    """The unit in which a loss counts a batch; "" for a loss that counts one thing."""
    unit = getattr(loss, "unit", None)
    return "" if unit is None else unit(batch)


def count_by_unit(
    loss: object, count: Callable[[Batch], float], batches: Iterable[Batch]
) -> dict[str, float]:
    """What some batches count, summed by unit.

    Args:
        loss: has `unit(batch)` where it counts several.
        count: the loss's count of a batch.
        batches: of one step, all processes'.

    Returns:
        Unit -> count; {"": count} for a loss of one unit.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        unit = unit_of(loss, batch)
        totals[unit] = totals.get(unit, 0) + count(batch)
    return totals


class Reach:
    """Which trained parameters a gradient has reached, until every unit has been seen.

    Args:
        loss: names its `units` where it has several.
    """

    def __init__(self, loss: object) -> None:
        self.loss = loss
        self.waiting: set[str] = set(getattr(loss, "units", ()))
        self.reached: set[str] = set()
        self.done = False

    def see(self, batches: Iterable[Batch], parameters: Mapping[str, nn.Parameter]) -> None:
        """Take note of a step after its backward passes.

        Args:
            batches: of the step.
            parameters: the trained ones, by name, with their gradients. A zero gradient is fine (B
                of a new LoRA makes A's zero), None means that the forward pass went around it.

        Raises:
            ValueError: every unit has been seen, and some parameter never had a gradient.
        """
        if self.done:
            return
        self.reached |= {name for name, p in parameters.items() if p.grad is not None}
        self.waiting -= {unit_of(self.loss, batch) for batch in batches}
        if self.waiting:
            return
        self.done = True
        missing = [name for name in parameters if name not in self.reached]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(parameters)} trained parameters got no gradient: "
                f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; the loss does not "
                "depend on them: freeze them, or look for a detach() or a module that is not called"
            )
