"""Each method near its own best rate, and what the claims about training share.

A comparison at one learning rate for all is a comparison of rates: what trains more weights, or
scales them up, wants a lower one. So each variant has a short list of rates, a factor of two apart;
the first seed is trained at all of them, the best by held-out loss is kept, and the other seeds are
trained at that one alone. The first seed's loss is thus the least of a few, a little too good, for
every variant alike. Where the best rate is the first or last of its list, the true best may lie
beyond: the table marks it (`at_end`).

Runs are `SHARE` of the settings' steps, and see each row once: the task is not quite learnt by
then, which tells methods apart better than a task that all of them have learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.papers.claim import Settings, over_seeds
from benchmarks.papers.task import LORA, Score, Variant, score
from lora_core.checkpoint import base_model_path

SHARE = 0.4
BATCH = 8  # rows a step, a Variant's default
MARGIN = 0.02  # of what LoRA of rank 16 gains on the base: no larger difference counts as none
LORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FULL_RATES = (5e-4, 1e-3, 2e-3)
PICTURES = Path(__file__).parents[2] / "docs" / "papers"


@dataclass(frozen=True)
class Tuned:
    """A variant at its best rate."""

    lr: float
    """that rate, per step"""
    scores: list[Score]
    """one a seed"""
    searched: dict[float, float]
    """rate -> held-out loss of the first seed"""

    @property
    def losses(self) -> list[float]:
        """Held-out loss of each seed, in nats a token."""
        return [one.loss for one in self.scores]

    @property
    def general(self) -> list[float]:
        """Bits per byte of general text, of each seed; NaN where it was not asked for."""
        return [float("nan") if one.general is None else one.general for one in self.scores]

    @property
    def rate(self) -> str:
        """The rate for a table, marked where the search ended on the edge of its list."""
        at_end = len(self.searched) > 2 and self.lr in (min(self.searched), max(self.searched))
        return f"{self.lr:g}{' (end of the list)' if at_end else ''}"

    @property
    def trained(self) -> int:
        """Trained parameters; 0 where nothing was trained."""
        return int(self.scores[0].facts.get("trained", 0))


def few_steps(settings: Settings) -> int:
    """Steps of the runs that these claims share."""
    return max(2, round(SHARE * settings.steps))


def lora(settings: Settings, **options: Any) -> Variant:
    """The variant of the shared runs: LoRA of rank 16 on every linear layer, unless told other."""
    steps = few_steps(settings)
    return Variant(**{"adapter": LORA, "steps": steps, "rows": steps * BATCH, **options})


def full(settings: Settings) -> Variant:
    """The same with every weight trained."""
    return lora(settings, adapter=None, full=True)


def at_best(settings: Settings, variant: Variant, rates: Sequence[float], **asked: Any) -> Tuned:
    """A variant at the best of a few rates.

    Args:
        settings: seeds, steps, base.
        variant: what is trained; its rate does not matter.
        rates: to search.
        **asked: what `score` shall measure besides the loss.

    Returns:
        Its scores on all seeds at the rate that was best on the first.
    """
    first = settings.seeds[0]
    searched = {lr: score(settings, replace(variant, lr=lr), first).loss for lr in rates}
    best = min(searched, key=lambda lr: searched[lr])
    return Tuned(best, at_rate(settings, variant, best, **asked), searched)


def at_rate(settings: Settings, variant: Variant, lr: float, **asked: Any) -> list[Score]:
    """A variant's scores at one rate, on all seeds."""
    return [score(settings, replace(variant, lr=lr), seed, **asked) for seed in settings.seeds]


def margin_of(base: Sequence[float], reference: Sequence[float]) -> float:
    """The difference in loss that counts as none: `MARGIN` of the reference's gain.

    Args:
        base: held-out loss without tuning, one a seed.
        reference: the same of LoRA of rank 16.
    """
    return MARGIN * abs(over_seeds(base, reference).value)


def picture(settings: Settings, name: str, figure: Any) -> str:
    """Save a claim's plot beside the page, or in the scratch folder where it is not for the page.

    Returns:
        Its path, relative to docs/.
    """
    from lora_core.report import save

    own = settings.quick or settings.text is not None or settings.model != base_model_path()
    folder = settings.out / "papers" if own else PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    save(figure, folder / f"{name}.png")
    return f"papers/{name}.png"
