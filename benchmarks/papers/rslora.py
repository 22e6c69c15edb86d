"""LoRA's learning collapses as the rank grows; rsLoRA's does not.

With the scaling alpha / r the update's gradient shrinks as r grows, so that higher ranks learn no
better, says the paper; with alpha / sqrt(r) it keeps its size, and higher ranks use their room
(sections 3 and 4). As there, one rate is used for all ranks, low enough for each of
them, and what is shown is the loss and the mean norm of the gradient over the run. The two scalings
are made equal at the lowest rank, which both thus share.

The objection that this leaves open: under Adam a larger scaling acts, at first, like a larger rate.
So the middle rank is also shown with each scaling at its own best rate, outside the verdict.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.rates import LORA_RATES, Tuned, at_best, at_rate, lora
from benchmarks.papers.task import LORA, Score
from lora_core.adapters import LoRAConfig

RANKS = (8, 64, 128)  # 128: all that the narrowest matrices, keys' and values', have
RATE = 1e-3
BEST = {False: LORA_RATES, True: (2e-3, 4e-3, 8e-3)}  # a larger scaling wants a lower rate
STEADY = 1.0  # doublings: what counts as a gradient that keeps its size

Runs = Mapping[int, Sequence[Score]]


def adapter(r: int, rs: bool) -> LoRAConfig:
    """LoRA of rank r; both scalings are alpha / 8 at rank 8."""
    lowest = RANKS[0]
    alpha = LORA.alpha / math.sqrt(lowest) if rs and r != lowest else LORA.alpha
    return LoRAConfig(r=r, alpha=alpha, use_rslora=rs and r != lowest)


def run(settings: Settings) -> Finding:
    """Loss and gradient by rank, for both scalings at one rate."""
    with warnings.catch_warnings():
        # other programs misread a saved rsLoRA adapter; only this one reads these
        warnings.filterwarnings("ignore", message="use_rslora")
        found = {
            rs: {r: at_rate(settings, lora(settings, adapter=adapter(r, rs)), RATE) for r in RANKS}
            for rs in (False, True)
        }
        middle = RANKS[1]
        best = {
            rs: at_best(settings, lora(settings, adapter=adapter(middle, rs)), rates)
            for rs, rates in BEST.items()
        }
    return judge(found[False], found[True], best[False], best[True])


def doublings(scores: Sequence[Score]) -> list[float]:
    """log2 of the mean norm of the gradient over a run, one a seed."""
    norms = [[norm for norm in one.facts["grad_norm"] if norm is not None] for one in scores]
    return [math.log2(fmean(run)) for run in norms]


def losses(scores: Sequence[Score]) -> list[float]:
    """Held-out loss of each seed."""
    return [one.loss for one in scores]


def judge(plain: Runs, stable: Runs, plain_best: Tuned, stable_best: Tuned) -> Finding:
    """The table and the checks: gradients by rank, then losses by rank.

    Args:
        plain: rank -> a score a seed, with alpha / r.
        stable: the same with alpha / sqrt(r).
        plain_best: the middle rank with alpha / r at its own best rate; for the table.
        stable_best: the same with alpha / sqrt(r).
    """
    low, high = min(plain), max(plain)
    scalings = (("alpha / r", plain, plain_best), ("alpha / sqrt(r)", stable, stable_best))
    rows = [
        {
            "scaling": name,
            "r": r,
            "rate": rate,
            "held-out loss": over_seeds(losses(scores)),
            "gradient's norm, doublings from the lowest rank": over_seeds(
                doublings(scores), doublings(runs[low])
            ),
        }
        for name, runs, best in scalings
        for r, rate, scores in (
            *((r, f"{RATE:g}", scores) for r, scores in runs.items()),
            (sorted(runs)[len(runs) // 2], f"its best, {best.rate}", best.scores),
        )
    ]
    checks = [
        Check(
            f"log2 of the gradient, LoRA, r {high} - r {low}",
            over_seeds(doublings(plain[high]), doublings(plain[low])),
            "below",
        ),
        Check(
            f"log2 of the gradient, rsLoRA, r {high} - r {low}",
            over_seeds(doublings(stable[high]), doublings(stable[low])),
            "within",
            STEADY,
        ),
        Check(
            f"loss, rsLoRA, r {high} - r {low}",
            over_seeds(losses(stable[high]), losses(stable[low])),
            "below",
        ),
        Check(
            f"loss, r {high}, rsLoRA - LoRA",
            over_seeds(losses(stable[high]), losses(plain[high])),
            "below",
        ),
    ]
    return Finding(rows, checks, {"rate": RATE})


CLAIM = Claim(
    name="rslora",
    paper="Kalajdzievski 2023, arXiv:2312.03732, sections 3 and 4",
    says="With alpha / r higher ranks learn no better, with alpha / sqrt(r) they do",
    run=run,
    scale="ranks up to 128 in layers of 256 instead of up to 2048 in layers of 4096; a few dozen "
    "steps",
)
