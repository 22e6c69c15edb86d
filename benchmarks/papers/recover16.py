"""4 bits and LoRA give what 16 bits and LoRA give.

The paper fine-tunes the same models with LoRA on bfloat16, int8, FP4 and NF4 bases and finds NF4
with double quantization level with bfloat16, FP4 about a point of MMLU behind (tables 3, 4).
Here four bases learn one task from the same rows in the same order. "Recovers" means: the
held-out losses differ by no more than `MARGIN` nats a token, 1 % of perplexity.
"""

from benchmarks.papers.claim import Check, Claim, Finding, Settings, over_seeds
from benchmarks.papers.task import BASE, LORA, Score, Variant, score

CODES = ("nf4", "fp4", "int4")
MARGIN = 0.01  # nats


def run(settings: Settings) -> Finding:
    """Held-out loss with and without LoRA, on the dense base and on each 4-bit code."""
    bases: dict[str, list[Score]] = {}
    tuned: dict[str, list[Score]] = {}
    for code in (None, *CODES):
        name = code or "dense"
        base = Variant(adapter=None, steps=0, quantize=code) if code else BASE
        bases[name] = [score(settings, base, seed) for seed in settings.seeds]
        tuned[name] = [
            score(settings, Variant(adapter=LORA, quantize=code), seed) for seed in settings.seeds
        ]
    losses = {name: [one.loss for one in scores] for name, scores in tuned.items()}
    before = {name: [one.loss for one in scores] for name, scores in bases.items()}
    rows = [
        {
            "base": name,
            "loss without LoRA": over_seeds(before[name]),
            "loss with LoRA": over_seeds(losses[name]),
            "behind dense": over_seeds(losses[name], losses["dense"]),
        }
        for name in ("dense", *CODES)
    ]
    difference = over_seeds(losses["nf4"], losses["dense"])
    checks = [Check("loss, NF4 + LoRA − dense + LoRA", difference, "within", MARGIN)]
    return Finding(rows, checks)


CLAIM = Claim(
    name="recover16",
    paper="Dettmers et al. 2023, arXiv:2305.14314, tables 3 and 4",
    says="LoRA on a 4-bit NF4 base is as good as LoRA on the 16-bit base",
    run=run,
    scale="one task of copying instead of MMLU and Super-NaturalInstructions; in a model of 5 M "
    "parameters LoRA of rank 16 is 7 % of the weights, in the paper's below 1 %",
)
