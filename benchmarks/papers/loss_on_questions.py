"""Grading the questions too helps where rows are few and answers short.

The opposite of `loss_mask`, from a paper that names its conditions: instructions much longer than
outputs, or few training examples, since the questions' loss keeps the model from overfitting the
answers. The task's questions are 1.7 times as long as its answers; here only `ROWS` rows
are trained on, several times over, at one rate.
"""

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.loss_mask import table
from benchmarks.papers.rates import Tuned, at_best, lora

ROWS = 48
RATES = (4e-3,)  # of few rows a low one, the same for both


def run(settings: Settings) -> Finding:
    """Held-out loss on answers after few rows, trained on answers and on everything."""
    masked, everything = (
        at_best(settings, lora(settings, train_on=graded, rows=ROWS), RATES)
        for graded in ("assistant", "all")
    )
    return judge(masked, everything)


def judge(masked: Tuned, everything: Tuned) -> Finding:
    """The table and the check: the loss of what graded everything below the other.

    Args:
        masked: runs in which answers alone were graded.
        everything: runs in which questions were, too.
    """
    check = Check(
        f"loss on answers after {ROWS} rows, graded everything - graded answers",
        over_seeds(everything.losses, masked.losses),
        "below",
    )
    return Finding(table(masked, everything), [check])


CLAIM = Claim(
    name="loss_on_questions",
    paper="Shi et al. 2024, arXiv:2405.14394",
    says="With few rows and short answers, grading the questions too is better",
    run=run,
    scale=f"{ROWS} rows instead of some thousand, and questions that the base has seen the like of "
    "in pretraining; judged by the answers' own loss instead of MMLU and AlpacaEval",
)
