"""What fits a given memory: for each method the largest batch, one switch after another.

The switches stand in the order of what they cost. An optimizer of 8 bits costs next to no time and
rounds its state; checkpointing costs a third more time and changes nothing; an optimizer in the
host's memory waits for the bus once a step, offloaded activations once a layer.

Memory grows with the tokens of a forward pass along a straight line, but for a start where pieces
of a fixed size (a chunk of logits, a slice of a weight) weigh more. So plans are made for a few
numbers of tokens, each four times the one before, and the line between two of them says how many
fit. They are made for one long row; more and shorter rows need no more.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lora_core.plan.memory import Plan, Settings, plan_of

__all__ = ["GRID", "SWITCHES", "Fit", "largest", "what_fits"]

STEP = 64
"""Tokens are counted in this many."""
GRID = (STEP, *(4**power for power in range(5, 11)))
"""Numbers of tokens that plans are made for: 64, 1024, 4096 … 1,048,576."""
SWITCHES: tuple[dict[str, Any], ...] = (
    {},
    {"optimizer": "adamw8bit"},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "optimizer": "adamw8bit"},
    {"activation_checkpointing": True, "optimizer": "adamw-paged"},
)


@dataclass(frozen=True)
class Fit:
    """One way to run within a budget."""

    method: str
    """"full", "lora" or "qlora" """
    switches: dict[str, Any]
    """fields of TrainConfig that are switched on"""
    tokens: int
    """most tokens of a forward pass, 0 if none fit"""
    least: int
    """bytes at the smallest batch that is looked at"""

    @property
    def words(self) -> str:
        """The switches for the user."""
        on = [str(v) if k == "optimizer" else k.replace("_", " ") for k, v in self.switches.items()]
        return " + ".join(on) or "no switch"


def what_fits(
    settings: Sequence[Settings], budget: int, switches: Sequence[dict[str, Any]] = SWITCHES
) -> list[Fit]:
    """The largest batch for every method and every set of switches.

    Args:
        settings: of each method that is looked at; their tokens, rows of a batch and the fields
            that are switched are not read.
        budget: bytes; what lies outside the allocator has to fit too.
        switches: sets of `TrainConfig` fields, the cheapest first.

    Returns:
        One entry for each pair, methods in their order.
    """
    return [fit for s in settings for fit in _fits_of(s, budget, switches)]


_OFF: dict[str, Any] = {
    "optimizer": "adamw",
    "activation_checkpointing": False,
    "offload_activations": False,
}


def _fits_of(settings: Settings, budget: int, switches: Sequence[dict[str, Any]]) -> Iterator[Fit]:
    made: dict[tuple[str, bool, int], Plan] = {}

    def plan_at(optimizer: str, checkpointing: bool, tokens: int) -> Plan:
        key = (optimizer, checkpointing, tokens)
        if key not in made:
            on: dict[str, Any] = {"optimizer": optimizer, "activation_checkpointing": checkpointing}
            train = dataclasses.replace(settings.train, **{**_OFF, **on}, batch_size=1)
            made[key] = plan_of(dataclasses.replace(settings, train=train, tokens=tokens))
        return made[key]

    for chosen in switches:
        optimizer, checkpointing = (chosen.get(name, _OFF[name]) for name in list(_OFF)[:2])
        own, plain = (plan_at(kind, False, STEP) for kind in (optimizer, "adamw"))

        def size(
            tokens: int, on: bool = checkpointing, own: Plan = own, plain: Plan = plain
        ) -> int:
            """The body's peak, which knows of the optimizer by its state alone."""
            body = plan_at("adamw", on, tokens).phases
            state = own.phases["forward"] - plain.phases["forward"]
            peaks = [peak + state for phase, peak in body.items() if phase != "update"]
            return max(*peaks, own.phases["update"]) + own.outside

        yield Fit(settings.method, chosen, largest(size, budget), size(STEP))


def largest(size: Callable[[int], int], budget: int) -> int:
    """The most tokens within a budget, along the lines between the points of `GRID`.

    Args:
        size: bytes by tokens, rising.
        budget: bytes.

    Returns:
        A multiple of `STEP`; 0 if not even one step fits.
    """
    if size(GRID[0]) > budget:
        return 0
    for low, high in pairwise(GRID):
        if size(high) > budget:
            share = (budget - size(low)) / (size(high) - size(low))
            return int(low + share * (high - low)) // STEP * STEP
    return GRID[-1]
