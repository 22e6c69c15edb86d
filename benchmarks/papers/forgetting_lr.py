"""A higher learning rate forgets more.

Forgetting is what tuning on one thing costs on another: here bits per byte of general text, after
tuning less before. The paper finds it to grow with how far the weights move, and asks for the
lowest rate that learns (appendix B). The rates here are a factor of four apart, from
one that learns slowly to one beyond the best, for LoRA and for full fine-tuning.

The general text is the kind that the base was pretrained on, so the question is only what is lost.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.rates import at_rate, full, lora, picture
from benchmarks.papers.task import BASE, Score, Variant, score

RATES = {"LoRA": (1e-3, 4e-3, 1.6e-2), "full": (2.5e-4, 1e-3, 4e-3)}

Runs = Mapping[str, Mapping[float, Sequence[Score]]]


def run(settings: Settings) -> Finding:
    """Held-out loss and forgetting by rate, for both methods."""
    before = general(settings)
    finding = judge(sweeps(settings), before)
    from lora_core.report import sweep

    figure = sweep(
        {
            name: {lr: forgotten(scores, before) for lr, scores in runs.items()}
            for name, runs in sweeps(settings).items()
        },
        x="learning rate",
        y="forgetting (bits per byte)",
    )
    finding.figures["picture"] = picture(settings, "forgetting_lr", figure)
    return finding


def variants(settings: Settings) -> dict[str, Variant]:
    """The two methods; their rates are set by the sweep."""
    return {"LoRA": lora(settings), "full": full(settings)}


def sweeps(settings: Settings) -> Runs:
    """Method -> rate -> a score a seed, with bits per byte of general text."""
    return {
        name: {lr: at_rate(settings, variant, lr, general=True) for lr in RATES[name]}
        for name, variant in variants(settings).items()
    }


def general(settings: Settings) -> float:
    """The base's bits per byte of the general text, which no seed changes."""
    found = score(settings, BASE, settings.seeds[0], general=True).general
    assert found is not None  # it was asked for
    return found


def forgotten(scores: Sequence[Score], before: float) -> list[float]:
    """Bits per byte lost on the general text, one a seed."""
    return [one.general - before for one in scores if one.general is not None]


def judge(found: Runs, before: float) -> Finding:
    """The table and the checks: each rate forgets more than the one a quarter as high.

    Args:
        found: method -> rate -> a score a seed.
        before: the base's bits per byte.
    """
    rows, checks = [], []
    for name, runs in found.items():
        for lr, scores in runs.items():
            rows.append(
                {
                    "method": name,
                    "rate": f"{lr:g}",
                    "held-out loss": over_seeds([one.loss for one in scores]),
                    "forgotten, bits per byte": over_seeds(forgotten(scores, before)),
                }
            )
        for less, more in pairwise(sorted(runs)):
            checks.append(
                Check(
                    f"forgotten, {name}, rate {more:g} - {less:g}",
                    over_seeds(forgotten(runs[more], before), forgotten(runs[less], before)),
                    "above",
                )
            )
    return Finding(rows, checks, {"general_bits_before": before})


CLAIM = Claim(
    name="forgetting_lr",
    paper="Biderman et al. 2024, arXiv:2405.09673, section 4 and appendix B",
    says="The higher the learning rate, the more is forgotten",
    run=run,
    scale="forgetting is read on text, in bits per byte, instead of on HellaSwag, ARC and "
    "WinoGrande; a few dozen steps on a narrow task instead of epochs on code and mathematics",
)
