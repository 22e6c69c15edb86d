"""LoRA learns less and forgets less than full fine-tuning.

The paper's title. Its figures compare the methods at their own best rates (sections 4.1, 4.2), and
so do the two checks here. But what moves less forgets less, whatever the method, so a third figure
asks the fairer question (section 4.3, where the paper sees both methods near one curve): at the
same quality, which forgets less? For each seed the rates up to the best make a curve from the
untouched base through (loss, forgetting), straight between its points in the logarithm of the loss,
and both curves are read at the loss that both reach. It stands in the table as a row of its own and
not in the verdict, since the title does not say it.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.forgetting_lr import forgotten, general, sweeps, variants
from benchmarks.papers.rates import FULL_RATES, LORA_RATES, Tuned, at_best, picture
from benchmarks.papers.task import BASE, score

RATES = {"LoRA": LORA_RATES, "full": FULL_RATES}
LOSSES = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5)  # named on the axis
Curve = Sequence[tuple[float, float]]  # (held-out loss, bits per byte forgotten), by rate


def run(settings: Settings) -> Finding:
    """Both methods at their best, and their curves of quality against forgetting."""
    before, found = general(settings), sweeps(settings)
    start = [(score(settings, BASE, seed).loss, 0.0) for seed in settings.seeds]
    best: dict[str, Tuned] = {}
    curves: dict[str, list[Curve]] = {}
    for name, variant in variants(settings).items():
        best[name] = at_best(settings, variant, RATES[name], general=True)
        by_rate = {**found[name], best[name].lr: best[name].scores}
        curves[name] = [
            [
                start[i],
                *(
                    (by_rate[lr][i].loss, forgotten(by_rate[lr], before)[i])
                    for lr in sorted(by_rate)
                ),
            ]
            for i in range(len(settings.seeds))
        ]
    finding = judge(best, curves, before)
    finding.figures["picture"] = picture(settings, "full_vs_lora", drawn(curves))
    return finding


def rising(curve: Curve) -> list[tuple[float, float]]:
    """The part of a curve in which a higher rate still learns more: each loss below all before."""
    kept: list[tuple[float, float]] = []
    for loss, lost in curve:
        if not kept or loss < kept[-1][0]:
            kept.append((loss, lost))
    return kept


def forgotten_at(curve: Curve, loss: float) -> float:
    """What a curve has forgotten where it reaches a loss, straight in the loss's logarithm.

    Raises:
        ValueError: a loss that the curve does not reach.
    """
    points = rising(curve)
    for (before, lost), (after, more) in pairwise(points):
        if after <= loss <= before:
            share = (math.log(before) - math.log(loss)) / (math.log(before) - math.log(after))
            return lost + share * (more - lost)
    reached = f"{points[-1][0]:.4g} to {points[0][0]:.4g}"
    raise ValueError(f"the curve goes through losses from {reached}; {loss:.4g} is not among them")


def matched(one: Sequence[Curve], other: Sequence[Curve]) -> tuple[list[float], list[list[float]]]:
    """For each seed the best loss that both curves reach, and what each has forgotten there."""
    losses = [max(rising(a)[-1][0], rising(b)[-1][0]) for a, b in zip(one, other, strict=True)]
    read = [
        [forgotten_at(curve, loss) for curve, loss in zip(curves, losses, strict=True)]
        for curves in (one, other)
    ]
    return losses, read


def judge(
    best: Mapping[str, Tuned], curves: Mapping[str, Sequence[Curve]], before: float
) -> Finding:
    """The table and the checks: LoRA's loss above, its forgetting below, at the best rates.

    Args:
        best: "LoRA" and "full" at their best rates.
        curves: of each, a curve a seed.
        before: the base's bits per byte of general text.
    """
    lora, full = best["LoRA"], best["full"]
    lost = {name: forgotten(one.scores, before) for name, one in best.items()}
    rows = [
        {
            "method": name,
            "rate": one.rate,
            "held-out loss": over_seeds(one.losses),
            "forgotten, bits per byte": over_seeds(lost[name]),
        }
        for name, one in best.items()
    ]
    same, (lora_lost, full_lost) = matched(curves["LoRA"], curves["full"])
    for name, figures in (("LoRA", lora_lost), ("full", full_lost)):
        rows.append(
            {
                "method": name,
                "rate": "at the same loss",
                "held-out loss": over_seeds(same),
                "forgotten, bits per byte": over_seeds(figures),
            }
        )
    difference = over_seeds(lora_lost, full_lost)
    rows.append(
        {
            "method": "LoRA - full",
            "rate": "at the same loss",
            "held-out loss": "",
            "forgotten, bits per byte": difference,
        }
    )
    checks = [
        Check("learns less: loss, LoRA - full", over_seeds(lora.losses, full.losses), "above"),
        Check("forgets less: LoRA - full", over_seeds(lost["LoRA"], lost["full"]), "below"),
    ]
    return Finding(rows, checks, {"at_the_same_loss": difference.facts()})


def drawn(curves: Mapping[str, Sequence[Curve]]) -> object:
    """Forgetting against loss: a line a seed, through the rates."""
    from lora_core.report.drawing import new_figure, styled
    from lora_core.report.palette import SERIES

    with styled():
        figure = new_figure()
        axes = figure.add_subplot(
            xlabel="held-out loss (nats a token)", ylabel="forgotten (bits per byte)", xscale="log"
        )
        for (name, seeds), colour in zip(curves.items(), SERIES, strict=False):
            for i, curve in enumerate(seeds):
                points = rising(curve)
                axes.plot(
                    [loss for loss, _ in points],
                    [lost for _, lost in points],
                    "o-",
                    ms=4,
                    c=colour,
                    label=name if i == 0 else None,
                )
        axes.invert_xaxis()
        low, high = sorted(axes.get_xlim())
        shown = [loss for loss in LOSSES if low <= loss <= high]
        axes.set_xticks(shown, [f"{loss:g}" for loss in shown])
        axes.set_xticks([], minor=True)
        axes.legend()
    return figure


CLAIM = Claim(
    name="full_vs_lora",
    paper="Biderman et al. 2024, arXiv:2405.09673, sections 4.1 to 4.3",
    says="LoRA learns less and forgets less than full fine-tuning",
    run=run,
    scale="LoRA of rank 16 trains 7 % of these weights, of a 7 B model 0.6 %; a task that a few "
    "hundred rows teach, instead of code and mathematics from billions of tokens",
)
