"""Grading the answers alone teaches answers better than grading the questions too.

QLoRA compares the two on four instruction data sets and grades answers alone ever since (appendix
B.3, table 10). Without the mask the gradient also learns to write questions, which nobody will ask
of the model. `loss_on_questions` asks the opposite claim of another paper on the same task.

Losses are of the held-out answers alone in both cases, each at its own best rate.
"""

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.rates import LORA_RATES, Tuned, at_best, lora


def run(settings: Settings) -> Finding:
    """Held-out loss on answers, trained on answers and on everything."""
    masked, everything = (
        at_best(settings, lora(settings, train_on=graded), LORA_RATES, exact=True)
        for graded in ("assistant", "all")
    )
    return judge(masked, everything)


def table(masked: Tuned, everything: Tuned) -> list[dict[str, object]]:
    """A row for each of the two."""
    rows: list[dict[str, object]] = []
    for name, one in (("answers", masked), ("questions and answers", everything)):
        row: dict[str, object] = {
            "graded in training": name,
            "rate": one.rate,
            "loss on held-out answers": over_seeds(one.losses),
            "loss, less that of answers alone": over_seeds(one.losses, masked.losses),
        }
        if one.scores[0].exact is not None:
            row["exact match"] = over_seeds([score.exact_match for score in one.scores])
        rows.append(row)
    return rows


def judge(masked: Tuned, everything: Tuned) -> Finding:
    """The table and the check: the masked loss below the other.

    Args:
        masked: runs in which answers alone were graded.
        everything: runs in which questions were, too.
    """
    check = Check(
        "loss on answers, graded answers - graded everything",
        over_seeds(masked.losses, everything.losses),
        "below",
    )
    return Finding(table(masked, everything), [check])


CLAIM = Claim(
    name="loss_mask",
    paper="Dettmers et al. 2023, arXiv:2305.14314, appendix B.3, table 10",
    says="Grading the answers alone is better than grading the questions too",
    run=run,
    scale="judged by the answers' own loss instead of MMLU; questions of 70 tokens are copied from "
    "in answers of 40",
)
