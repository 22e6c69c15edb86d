r"""How long a request takes: seconds to the first token and seconds a further token, batch of one.

One number from one run says little on a machine that does other things: the second of two equal
runs may well take a third longer. So the states that are compared, the base (adapters off), the
adapter unmerged, and merged, take turns in one process, a round after the other, and the figure is
the median over rounds. Slow seconds then fall on all states alike, and ratios between states of one
variant are better known than seconds of two variants that ran minutes apart.

Nothing ends a request early, so every request makes the same number of tokens. The first round
warms caches and is thrown away.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core.adapters import (
    adapted_modules,
    disable_adapters,
    merge_adapters,
    unmerge_adapters,
)
from lora_core.device import synchronize
from lora_core.models import generate_ids

State = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Latency:
    """Medians over the rounds, in seconds."""

    first_token: float
    """from the request to its first token: the whole prompt is read"""
    per_token: float
    """of each further one"""
    fastest: float
    """seconds a further token in the fastest round"""
    slowest: float
    """and in the slowest"""
    rounds: int
    """how many there were"""


def why_unmergeable(model: nn.Module) -> str | None:
    """Why the active adapters cannot be folded into weights.

    Args:
        model: any.

    Returns:
        The reason of the first that cannot; None where all can, or where there is none.
    """
    for _, host in adapted_modules(model):
        for name in host.active:
            if (reason := host.adapter(name).unmergeable) is not None:
                return reason
    return None


def measure_latency(
    model: nn.Module, prompt: Sequence[int], *, tokens: int = 32, rounds: int = 7
) -> dict[str, Latency]:
    """Time one request in every state that the model can be in.

    Args:
        model: with an adapter, unmerged, or without.
        prompt: token ids.
        tokens: new tokens of a request, 2 or more.
        rounds: requests in each state whose median is taken.

    Returns:
        "base" (adapters off), "unmerged" and, where the kind can be merged, "merged"; for a model
        without adapters "base" alone. The model is as it was.

    Raises:
        ValueError: fewer than two tokens, or no round.
    """
    if tokens < 2 or rounds < 1:
        raise ValueError(f"latency needs 2 tokens and 1 round or more; got {tokens} and {rounds}")
    states = _states(model)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in states}
    for number in range(rounds + 1):
        for name, state in states.items():
            with state():
                times = _request(model, prompt, tokens)
            if number:  # the first round warms up
                found[name].append(times)
    return {name: _medians(times) for name, times in found.items()}


def _states(model: nn.Module) -> dict[str, State]:
    if next(adapted_modules(model), None) is None:
        return {"base": nullcontext}

    @contextmanager
    def merged() -> Any:
        merge_adapters(model)
        try:
            yield
        finally:
            unmerge_adapters(model)

    states: dict[str, State] = {"base": lambda: disable_adapters(model), "unmerged": nullcontext}
    return states if why_unmergeable(model) else {**states, "merged": merged}


def _request(model: nn.Module, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and seconds a further one."""
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)])  # (1, T)
    ticks: list[float] = []
    synchronize(device)
    start = time.perf_counter()
    # being told of each token waits for the device, which is what a user at the other end does
    generate_ids(
        model, ids, max_new_tokens=tokens, on_tokens=lambda _: ticks.append(time.perf_counter())
    )
    return ticks[0] - start, (ticks[-1] - ticks[0]) / (tokens - 1)


def _medians(times: Sequence[tuple[float, float]]) -> Latency:
    first, further = zip(*times, strict=True)
    return Latency(
        statistics.median(first),
        statistics.median(further),
        min(further),
        max(further),
        len(times),
    )
