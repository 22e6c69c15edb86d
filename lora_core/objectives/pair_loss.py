"""The loss of a batch of pairs, whatever it makes of their two sides.

One forward over both sides of each pair, on a prompt that is computed once where the model allows.
The loss of a batch is the sum over its pairs, divided by the pairs of the whole optimizer step, so
that gradients do not depend on how the pairs were cut into batches. Reported beside it are means
over pairs of what the loss is a function of: the rewards of either side, in units of the loss's
margin, how far they are apart, and the share of pairs in which the chosen side is ahead (a tie is
not: at a reference's own weights the share is 0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_core.objectives.reference import Reference
from lora_core.objectives.scoring import completion_log_probs
from lora_core.train.batches import Batch
from lora_core.train.step import LossResult


class Sides(NamedTuple):
    """A batch of pairs in numbers, one a pair: (B,) float32 each."""

    chosen: Tensor
    """sums of graded tokens' log-probabilities under the policy"""
    rejected: Tensor
    ref_chosen: Tensor
    """under the reference; 0 where there is none"""
    ref_rejected: Tensor
    chosen_tokens: Tensor
    """graded tokens"""
    rejected_tokens: Tensor

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """chosen, rejected, and both under the reference."""
        return self[:4]

    @property
    def means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same by token."""
        c, r = self.chosen_tokens, self.rejected_tokens
        return self.chosen / c, self.rejected / r, self.ref_chosen / c, self.ref_rejected / r


OfSides = Callable[[Sides], tuple[Tensor, Tensor, Tensor]]
"""Sides -> each pair's loss, and the rewards of the chosen and of the rejected side, (B,) each."""


@dataclass(frozen=True)
class PairLoss:
    """The loss of a batch of pairs: their sum, divided by the pairs of the step."""

    of: OfSides
    """what the objective makes of the two sides"""
    reference: Reference | None = None
    """None: the loss has none"""

    def __call__(self, model: nn.Module, batch: Batch, normalizer: float) -> LossResult:
        """Run policy and reference on the batch.

        Args:
            model: the policy.
            batch: of `branch_batch`, two completions a row: chosen, rejected.
            normalizer: pairs of the whole step.

        Returns:
            The sum over pairs / normalizer, and means over pairs for the record.
        """
        sides = self.sides(model, batch)
        losses, better, worse = self.of(sides)
        better, worse, pairs = better.detach(), worse.detach(), len(losses)
        sums = {
            "accuracy": (better > worse).sum(),
            "margin": (better - worse).sum(),
            "rewards/chosen": better.sum(),
            "rewards/rejected": worse.sum(),
            "log_probs/chosen": sides.chosen.detach().sum(),
            "log_probs/rejected": sides.rejected.detach().sum(),
        }
        return LossResult(
            losses.sum() / normalizer, figures={name: (s, pairs) for name, s in sums.items()}
        )

    def count(self, batch: Batch) -> float:
        """The batch's pairs."""
        return len(batch["completions"]) // 2

    def sides(self, model: nn.Module, batch: Batch) -> Sides:
        """The reference first, whose pass keeps nothing for a backward one."""
        before = None if self.reference is None else self.reference.log_probs(model, batch)
        log_probs, mask = completion_log_probs(model, batch)  # (2B, L)
        if before is None:
            before = torch.zeros_like(log_probs)
        values, ref, tokens = log_probs.sum(1), before.sum(1), mask.sum(1).to(log_probs.dtype)
        return Sides(values[::2], values[1::2], ref[::2], ref[1::2], tokens[::2], tokens[1::2])
