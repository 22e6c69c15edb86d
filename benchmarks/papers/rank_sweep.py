"""Quality does not depend much on LoRA's rank.

LoRA finds rank 1 enough for GPT-3's queries and values, and rank 64 no better (table 6).
QLoRA, with every linear layer adapted, finds no relation between rank and quality from 8 to 256
(appendix A, figure 4). Both keep alpha while the rank changes, and so does this: with alpha / r
the size of an update does not grow with r, and one list of rates does for all ranks.

"Not much" is `MARGIN` of what rank 16 gains at all. Every rank is held against 16, so the claim
agrees only where all of them are level.
"""

from collections.abc import Mapping, Sequence

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.rates import LORA_RATES, Tuned, at_best, lora, margin_of, picture
from benchmarks.papers.task import BASE, LORA, score
from lora_core.adapters import LoRAConfig

RANKS = (1, 2, 4, 8, 16, 64)
REFERENCE, ALPHA = LORA.r, LORA.alpha


def run(settings: Settings) -> Finding:
    """Held-out loss by rank, each at its best rate."""
    tuned = {
        r: at_best(settings, lora(settings, adapter=LoRAConfig(r=r, alpha=ALPHA)), LORA_RATES)
        for r in RANKS
    }
    base = [score(settings, BASE, seed).loss for seed in settings.seeds]
    finding = judge(tuned, base)
    from lora_core.report import sweep

    losses = {"LoRA, alpha 32": {float(r): one.losses for r, one in tuned.items()}}
    figure = sweep(losses, x="rank", y="held-out loss (nats a token)")
    finding.figures["picture"] = picture(settings, "rank_sweep", figure)
    return finding


def judge(tuned: Mapping[int, Tuned], base: Sequence[float]) -> Finding:
    """The table and the checks: each rank within the margin of the reference.

    Args:
        tuned: rank -> its runs; 16 among them.
        base: held-out loss without tuning, one a seed.
    """
    reference = tuned[REFERENCE].losses
    margin = margin_of(base, reference)
    rows = [
        {
            "r": r,
            "trained": one.trained,
            "rate": one.rate,
            "held-out loss": over_seeds(one.losses),
            f"loss, less that of {REFERENCE}": over_seeds(one.losses, reference),
        }
        for r, one in tuned.items()
    ]
    checks = [
        Check(
            f"loss, r {r} - r {REFERENCE}",
            over_seeds(one.losses, reference),
            "within",
            margin,
        )
        for r, one in tuned.items()
        if r != REFERENCE
    ]
    searched = {
        str(r): {f"{lr:g}": x for lr, x in one.searched.items()} for r, one in tuned.items()
    }
    return Finding(rows, checks, {"margin": margin, "searched": searched})


CLAIM = Claim(
    name="rank_sweep",
    paper="Hu et al. 2021, arXiv:2106.09685, section 7.2; Dettmers et al. 2023, arXiv:2305.14314, "
    "appendix A, figure 4",
    says="LoRA of a very low rank is as good as of a high one, if every linear layer has it",
    run=run,
    scale="layers of 256 instead of 4096 to 12288, and a few hundred rows instead of tens of "
    "thousands: rank 1 is a larger share of these weights, and has less time to learn",
)
