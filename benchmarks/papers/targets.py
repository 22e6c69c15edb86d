"""LoRA on every linear layer is better than LoRA on attention alone, at equal size.

QLoRA tunes LLaMA 7B on Alpaca and finds that LoRA on queries and values, the habit until then, does
not reach full fine-tuning at any rank, and LoRA on all linear layers does (section 4, figure 2).
LoRA's own paper had spread a fixed budget over attention's matrices only (section 7.1).

Here the budget is fixed: the attention-only variants get the rank at which they train as many
parameters as rank 16 on all layers, alpha stays, and each variant has its own best rate. Full
fine-tuning stands in the table, not in the verdict.
"""

from collections.abc import Mapping

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.rates import FULL_RATES, LORA_RATES, Tuned, at_best, full, lora
from benchmarks.papers.task import LORA, Variant, trained
from lora_core.adapters import LoRAConfig, add_adapter, parameter_counts

ALL = "all linear layers"
PARTS = {
    "queries, values": ["q_proj", "v_proj"],
    "all of attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
FULL = "every weight (full)"
FEW_RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # fewer layers want a higher rate


def rank_of_equal_size(settings: Settings, targets: list[str]) -> int:
    """The rank at which LoRA on these layers trains about what the reference trains."""
    sizes = []
    for wanted in (LORA.targets, targets):
        model = trained(settings, Variant(adapter=None, steps=0), 0)
        add_adapter(model, LoRAConfig(r=1, alpha=1, targets=wanted))
        sizes.append(parameter_counts(model)[0])
    return round(LORA.r * sizes[0] / sizes[1])


def run(settings: Settings) -> Finding:
    """Held-out loss by target, each at its best rate."""
    tuned = {ALL: at_best(settings, lora(settings), LORA_RATES)}
    for name, targets in PARTS.items():
        r = rank_of_equal_size(settings, targets)
        adapter = LoRAConfig(r=r, alpha=LORA.alpha, targets=targets)
        variant = lora(settings, adapter=adapter)
        tuned[name] = at_best(settings, variant, FEW_RATES)
    tuned[FULL] = at_best(settings, full(settings), FULL_RATES)
    return judge(tuned)


def judge(tuned: Mapping[str, Tuned]) -> Finding:
    """The table and the checks: all layers below each part of attention.

    Args:
        tuned: name -> its runs.
    """
    rows = [
        {
            "targets": name,
            "trained": one.trained,
            "rate": one.rate,
            "held-out loss": over_seeds(one.losses),
            "loss, less that of all layers": over_seeds(one.losses, tuned[ALL].losses),
        }
        for name, one in tuned.items()
    ]
    checks = [
        Check(
            f"loss, {ALL} - {name}",
            over_seeds(tuned[ALL].losses, tuned[name].losses),
            "below",
        )
        for name in PARTS
    ]
    return Finding(rows, checks)


CLAIM = Claim(
    name="targets",
    paper="Dettmers et al. 2023, arXiv:2305.14314, section 4 and figure 2",
    says="LoRA on all linear layers is better than on attention's alone, at equal size",
    run=run,
    scale="a task of copying from the question, which is attention's work, instead of Alpaca; "
    "the paper does not hold the size fixed",
)
