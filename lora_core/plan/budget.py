"""What fits a given memory: for each method the largest batch, one switch after another.

The switches stand in the order of what they cost. An optimizer of 8 bits costs next to no time and
rounds its state; checkpointing costs a third more time and changes nothing; an optimizer in the
host's memory waits for the bus once a step, offloaded activations once a layer.

Memory grows with the tokens of a forward pass along a straight line, but for a start where pieces
of a fixed size (a chunk of logits, a slice of a weight) weigh more. So the largest number is found
by a few plans: along the line through the last two, until one is just within the budget. It is
found for one long row; more and shorter rows need no more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.plan.memory import Plan, Settings, plan_of
from lora_core.train.config import TrainConfig

__all__ = ["SWITCHES", "Fit", "largest", "what_fits"]

STEP = 64
"""Tokens are counted in this many."""
MOST = 1 << 22
"""Tokens beyond which nobody asks."""
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
    settings: Settings, budget: int, methods: Sequence[str], switches: Sequence[dict[str, Any]]
) -> list[Fit]:
    """The largest batch for every method and every set of switches.

    Args:
        settings: everything else; its method, tokens and the fields that are switched are not read.
        budget: bytes, of which what lies outside the allocator is taken off.
        methods: to look at.
        switches: sets of `TrainConfig` fields, the cheapest first.

    Returns:
        One entry for each pair, methods in their order.
    """
    found = []
    for method in methods:
        bodies: dict[tuple[Any, ...], Plan] = {}
        for chosen in switches:
            train = dataclasses.replace(settings.train, **{**_OFF, **chosen}, batch_size=1)
            peak = _peak(dataclasses.replace(settings, method=method, train=train), bodies)
            found.append(Fit(method, chosen, largest(peak, budget), peak(STEP)))
    return found


_OFF = {"optimizer": "adamw", "activation_checkpointing": False, "offload_activations": False}


def _peak(settings: Settings, bodies: dict[tuple[Any, ...], Plan]) -> Callable[[int], int]:
    """Bytes by tokens; what does not depend on the optimizer is kept in `bodies`."""
    train = settings.train
    own = plan_of(dataclasses.replace(settings, tokens=STEP))

    def peak(tokens: int) -> int:
        key = (train.activation_checkpointing, tokens)
        if key not in bodies:
            plain: TrainConfig = dataclasses.replace(train, optimizer="adamw")
            bodies[key] = plan_of(dataclasses.replace(settings, train=plain, tokens=tokens))
        body = bodies[key]
        state = own.parts["optimizer"] - own.host - body.parts["optimizer"]
        phases = {phase: size + state for phase, size in body.phases.items()}
        phases["update"] = own.phases["update"]
        return max(phases.values()) + own.outside

    return peak


def largest(size: Callable[[int], int], budget: int) -> int:
    """The most tokens within a budget.

    Args:
        size: bytes by tokens, rising.
        budget: bytes.

    Returns:
        A multiple of `STEP`; 0 if not even one step fits. Within one percent of the true one.
    """
    low, high = 0, MOST
    a, b = STEP, 32 * STEP
    if size(a) > budget:
        return 0
    low = a
    for _ in range(8):
        if size(b) <= budget:
            low = max(low, b)
        else:
            high = min(high, b)
        if high - low <= max(STEP, low // 100) or low >= MOST:
            break
        slope = max(size(b) - size(a), 1) / max(b - a, 1)
        guess = int(b + (budget - size(b)) / slope) // STEP * STEP
        a, b = b, min(max(guess, low + STEP), high - STEP)
        if a == b:
            b = low + max((high - low) // 2 // STEP, 1) * STEP
    return low
