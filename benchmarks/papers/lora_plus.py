"""A rate 16 times as high for B as for A learns faster (LoRA+).

B starts at zero and A does not, so one rate for both is too low for B or too high for A in wide
layers, says the paper (section 4); it finds 1 to 2 % better scores and up to twice the speed.
Both are compared at their own best rate. Speed is read from the training losses, which are of the
same rows in the same order: the step at which the mean of the last `WINDOW` losses first reaches
the level that plain LoRA ends at. What never reaches it counts as having needed all steps.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.rates import LORA_RATES, Tuned, at_best, lora

RATIO = 16.0
RATES = (5e-4, 1e-3, 2e-3)  # of A
WINDOW = 8


def run(settings: Settings) -> Finding:
    """Loss and speed with and without a rate of B's own."""
    plain = at_best(settings, lora(settings), LORA_RATES)
    plus = at_best(settings, lora(settings, lora_plus=RATIO), RATES)
    return judge(plain, plus)


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each step's loss and those before it, `WINDOW` at most."""
    return [fmean(losses[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(losses))]


def steps_to(losses: Sequence[float], level: float) -> int:
    """The first step at which the smoothed loss is at a level; all steps if it never is."""
    reached = (i for i, loss in enumerate(smoothed(losses), 1) if loss <= level)
    return next(reached, len(losses))


def judge(plain: Tuned, plus: Tuned) -> Finding:
    """The table and the checks: a lower loss, and fewer steps to LoRA's last one.

    Args:
        plain: LoRA at its best rate.
        plus: LoRA+ at its own.
    """
    curves = [[one.facts["loss"] for one in tuned.scores] for tuned in (plain, plus)]
    levels = [smoothed(losses)[-1] for losses in curves[0]]
    steps = [
        [steps_to(losses, level) for losses, level in zip(runs, levels, strict=True)]
        for runs in curves
    ]
    rows = [
        {
            "method": name,
            "rate of A": tuned.rate,
            "rate of B": f"{tuned.lr * ratio:g}",
            "held-out loss": over_seeds(tuned.losses),
            "steps to LoRA's last training loss": over_seeds(needed),
        }
        for name, tuned, ratio, needed in (
            ("LoRA", plain, 1.0, steps[0]),
            ("LoRA+", plus, RATIO, steps[1]),
        )
    ]
    speed = [[math.log2(count) for count in needed] for needed in steps]
    checks = [
        Check("held-out loss, LoRA+ - LoRA", over_seeds(plus.losses, plain.losses), "below"),
        Check("log2 of steps, LoRA+ - LoRA", over_seeds(speed[1], speed[0]), "below"),
    ]
    return Finding(rows, checks)


CLAIM = Claim(
    name="lora_plus",
    paper="Hayou et al. 2024, arXiv:2402.12354",
    says="A rate 16 times as high for B learns faster and better",
    run=run,
    scale="layers of 256, where the paper's argument is about very wide ones; the base is small "
    "enough that plain LoRA's best rate is high",
)
