"""`kto`: completions that are good or bad on their own, without pairs.

Each row stands beside a completion of another prompt (data/pair_rows.py). On those the policy's
gain over the reference is averaged, z₀, and a completion's own gain is judged against it
(lora_core/losses/kto.py). Both are completions of the row's prompt, which is computed once where
the model allows.

z₀ is of a forward batch, as everywhere; so, unlike every other objective's here, the gradient
depends on how rows are cut into batches, and a batch of one would judge a row by a single number:
`--batch-size 1` is refused. The trade-off of fixed partners: they are not drawn anew each epoch;
in return the reference can be recorded beforehand, and the evaluation is the same each time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.data import RatedRows
from lora_core.losses import kto_baseline, kto_loss
from lora_core.objectives.preference import GENTLE, Preference, PreferenceOptions
from lora_core.objectives.reference import Collate, Reference
from lora_core.objectives.scoring import completion_log_probs
from lora_core.objectives.setup import Setup
from lora_core.train.batches import Batch
from lora_core.train.step import LossResult


@dataclass(frozen=True)
class RatedLoss:
    """The loss of a batch of rated completions: their sum, divided by the rows of the step."""

    reference: Reference
    beta: float
    desirable_weight: float
    undesirable_weight: float

    def __call__(self, model: nn.Module, batch: Batch, normalizer: float) -> LossResult:
        """Run policy and reference on the batch.

        Args:
            model: the policy.
            batch: of `branch_batch` with `desirable`, two completions a row: its own, another's.
            normalizer: rows of the whole step.

        Returns:
            The sum over rows / normalizer, and means for the record.
        """
        before = self.reference.log_probs(model, batch).sum(1)  # (2B,)
        after = completion_log_probs(model, batch)[0].sum(1)
        good = batch["desirable"]  # (B,) bool
        kl = kto_baseline(after[1::2], before[1::2])
        losses = kto_loss(
            after[::2],
            before[::2],
            good,
            kl,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
            reduction="none",
        )
        gains = self.beta * (after[::2] - before[::2]).detach()
        return LossResult(losses.sum() / normalizer, figures=self.figures(gains, good, kl))

    def figures(
        self, gains: Tensor, good: Tensor, kl: Tensor
    ) -> dict[str, tuple[float | Tensor, float]]:
        """Rewards of good and of bad rows, and the share on the right side of the baseline."""
        level = self.beta * kl
        right = torch.where(good, gains > level, gains < level)
        count, goods = len(good), int(good.sum())
        return {
            "accuracy": (right.sum(), count),
            # of one sign each, so that it is above 0 where good rows gain and bad ones lose
            "margin": (torch.where(good, gains - level, level - gains).sum(), count),
            "rewards/desirable": (gains[good].sum(), goods),
            "rewards/undesirable": (gains[~good].sum(), count - goods),
            "kl": (kl * count, count),
        }

    def count(self, batch: Batch) -> float:
        """The batch's rows."""
        return len(batch["desirable"])


class KTO(Preference):
    """Kahneman–Tversky optimization."""

    name = "kto"
    help = "rated completions: good ones gain on the reference, bad ones lose (KTO)"
    kind = RatedRows
    rates: ClassVar[Mapping[str, float]] = GENTLE
    uses: ClassVar[frozenset[str]] = frozenset({"beta", "desirable_weight", "undesirable_weight"})

    def __init__(self, options: PreferenceOptions) -> None:
        super().__init__(options)
        if not options.desirable_weight and not options.undesirable_weight:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0: nothing is left to learn"
            )

    def check(self, setup: Setup) -> None:
        """A batch of one has no baseline."""
        super().check(setup)
        if setup.training.batch_size < 2:
            raise ValueError(
                "kto judges a row against its batch, so that batch_size must be 2 or more; got 1"
            )

    def read(self, setup: Setup) -> None:
        """Rows, and how many of them are good."""
        super().read(setup)
        goods, count = sum(self.rows.labels), len(self.rows)
        bads = count - goods
        setup.say(f"{goods} good and {bads} bad completions")
        good, bad = self.options.desirable_weight * goods, self.options.undesirable_weight * bads
        if not good or not bad:
            setup.say("note: only one kind of them counts; the other is not learned from")
        elif not 0.5 <= good / bad <= 2:
            setup.say(
                f"note: good ones weigh {good / bad:.2g} times as much as bad ones in all; "
                "--desirable-weight and --undesirable-weight balance them"
            )

    def collate(self, shared: bool, pad_id: int) -> Collate:
        """A branch batch with `desirable` (B,) bool."""
        lay_out = super().collate(shared, pad_id)

        def rated(rows: Sequence[Any]) -> Batch:
            return {**lay_out(rows), "desirable": torch.tensor([row.label for row in rows])}

        return rated

    def loss(self, setup: Setup, reference: Reference | None) -> RatedLoss:
        """λ_D σ(−β (r − z₀)) for good rows, λ_U σ(β (r − z₀)) for bad ones."""
        assert reference is not None  # kto is referenced
        options = self.options
        return RatedLoss(
            reference, self.scale, options.desirable_weight, options.undesirable_weight
        )
