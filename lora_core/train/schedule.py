"""Learning-rate schedules as closed forms of the step, so that there is no state to save.

A schedule is a function (step, total) -> factor on the peak learning rate. Steps count from 0. The
warm-up reaches 1 at its last step and begins above 0: a first step at rate 0 would be one step of
data thrown away.
"""

import math
from collections.abc import Callable

from lora_core.train.config import TrainConfig

Schedule = Callable[[int, int], float]


def warmup_steps(warmup: float, total: int) -> int:
    """The number of warm-up steps: a share of `total` below 1 (rounded), else the number itself."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def make_schedule(
    shape: str = "cosine", warmup: float = 0.03, min_lr_ratio: float = 0.0
) -> Schedule:
    r"""A linear warm-up, then a fall.

    With w warm-up steps of n, step s < w has factor (s + 1) / w. After it, p = (s - w) / (n - w)
    gives cosine: (1 + cos πp) / 2 · (1 - m) + m, linear: (1 - p)(1 - m) + m, constant: 1, where m
    is `min_lr_ratio`.

    Args:
        shape: "cosine", "linear" or "constant".
        warmup: below 1 a share of all steps, from 1 on a number of steps.
        min_lr_ratio: m, the floor as a share of the peak.

    Returns:
        The function (step, total) -> factor.

    Raises:
        ValueError: an unknown shape.

    Ref:
        Loshchilov & Hutter 2017 (SGDR), eq. 5, for the cosine.
    """
    falls: dict[str, Callable[[float], float]] = {
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
        "linear": lambda p: 1 - p,
        "constant": lambda p: 1.0,
    }
    if shape not in falls:
        raise ValueError(f"schedule must be one of {', '.join(falls)}; got {shape!r}")
    fall = falls[shape]

    def factor(step: int, total: int) -> float:
        ramp = warmup_steps(warmup, total)
        if step < ramp:
            return (step + 1) / ramp
        share = (step - ramp) / max(total - ramp, 1)
        return min_lr_ratio + (1 - min_lr_ratio) * fall(min(share, 1.0))

    return factor


def schedule_of(config: TrainConfig) -> Schedule:
    """The schedule a configuration describes."""
    return make_schedule(config.schedule, config.warmup, config.min_lr_ratio)
