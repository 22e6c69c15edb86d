"""Few good rows against many rows of which some are wrong.

LIMA fine-tunes on 1,000 chosen conversations and is preferred to models tuned on fifty times as
many that nobody chose. Here noise is the plainest there is: `WRONG` of the many rows have the
answer of another row. All arms make the same number of steps over batches of the same size, so
that the few are seen several times and the many once at most. The third arm, all rows and no noise,
is what could be had.

A model that has seen wrong answers is right to be less sure, which the loss counts against it, so
exact match of greedy answers is judged beside it.
"""

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.task import Variant, score

FEW, MANY, WRONG = 200, 2000, 0.4
ARMS = {
    f"{FEW} clean": Variant(rows=FEW),
    f"{MANY}, {WRONG:.0%} wrong": Variant(rows=MANY, wrong=WRONG),
    "all, clean": Variant(),  # a run that other claims share
}


def run(settings: Settings) -> Finding:
    """Held-out loss and exact match of the three arms."""
    found = {
        name: [score(settings, variant, seed, exact=True) for seed in settings.seeds]
        for name, variant in ARMS.items()
    }
    losses = {name: [one.loss for one in scores] for name, scores in found.items()}
    right = {name: [one.exact_match for one in scores] for name, scores in found.items()}
    few, noisy, _ = ARMS
    rows = [
        {
            "rows": name,
            "held-out loss": over_seeds(losses[name]),
            "exact match": over_seeds(right[name]),
            "loss − few clean": "" if name == few else over_seeds(losses[name], losses[few]),
        }
        for name in ARMS
    ]
    checks = [
        Check(f"loss, {few} − {noisy}", over_seeds(losses[few], losses[noisy]), "below"),
        Check(f"exact match, {few} − {noisy}", over_seeds(right[few], right[noisy]), "above"),
    ]
    return Finding(rows, checks)


CLAIM = Claim(
    name="few_clean",
    paper="Zhou et al. 2023, arXiv:2305.11206",
    says="a few hundred clean rows beat ten times as many noisy ones",
    run=run,
    scale="noise is exchanged answers of one narrow task; in LIMA it is the taste and variety of "
    "open conversations, judged by people; the model is 65 B there",
)
