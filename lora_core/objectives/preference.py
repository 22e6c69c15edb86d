"""`dpo`, `ipo`, `simpo`, `orpo`: what is preferred is made more probable than what is not.

One forward over both sides of each pair, on a prompt that is computed once where the model allows,
and one number a side: the sum of its graded tokens' log-probabilities, or their mean. What
differs between the four is the loss of these numbers (lora_core/losses/preference.py) and whether
it asks for a reference, which is the model itself (reference.py).

The loss of a batch is the sum over its pairs, divided by the pairs of the whole optimizer step, so
that gradients do not depend on how the pairs were cut into batches. Reported beside it are means
over pairs of what the loss is a function of: the rewards of either side, in units of the loss's
margin, how far they are apart, and the share of pairs in which the chosen side is ahead.

Dropout has to be off where there is a reference: a policy that drops out differs from it before
anything is learned, and the loss at the first step would not be ln 2. A fresh adapter's is refused;
one that was trained with dropout goes on without, and says so.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.data import PairRows
from lora_core.data.branches import branch_batch
from lora_core.data.record_rows import RecordRows
from lora_core.losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from lora_core.objectives.objective import Objective, Work
from lora_core.objectives.preference_data import check_preference_data, read_split
from lora_core.objectives.reference import Collate, Reference, turn_off_dropout
from lora_core.objectives.scoring import completion_log_probs, why_not_shared
from lora_core.objectives.setup import Setup
from lora_core.train import TrainResult
from lora_core.train.batches import Batch
from lora_core.train.step import LossResult


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """How preferences are weighed; each objective takes its own of these and refuses the others."""

    beta: float | None = None
    """How dear it is to leave the reference (dpo, ipo, kto: 0.1), what the mean log-probabilities
    are scaled by (simpo: 2), or the weight of the odds ratio beside the next token (orpo: 0.1);
    none: these."""
    dpo_loss: Literal["sigmoid", "robust", "hinge"] = "sigmoid"
    """dpo's loss of the margin: -log sigmoid, smoothed by --label-smoothing for the share of pairs
    that are labelled the wrong way round; robust: unbiased by that share; or the hinge."""
    target_margin: float = 1.0
    """simpo's gamma, by how much the scaled mean of the chosen side is to be ahead."""
    desirable_weight: float = 1.0
    """kto's weight of good completions; with the next one it balances unequal counts."""
    undesirable_weight: float = 1.0
    """kto's weight of bad completions."""

    def __post_init__(self) -> None:
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be a number above 0; got {self.beta}")
        if self.dpo_loss not in ("sigmoid", "robust", "hinge"):
            raise ValueError(f"dpo_loss must be sigmoid, robust or hinge; got {self.dpo_loss!r}")
        for name in ("target_margin", "desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")


class Preference(Objective[PreferenceOptions]):
    """What every objective on preferences shares: data, prompts shared, the reference."""

    options_class = PreferenceOptions
    kind: ClassVar[type[RecordRows[Any, Any]]] = PairRows
    beta: ClassVar[float] = 0.1
    """where the options leave it open"""
    uses: ClassVar[frozenset[str]] = frozenset({"beta"})
    """its fields of the options"""
    referenced: ClassVar[bool] = True
    """whether there is a reference"""

    @property
    def scale(self) -> float:
        """β of this run."""
        return self.beta if self.options.beta is None else self.options.beta

    def facts(self) -> dict[str, Any]:
        """The options with the β that is used."""
        return {**super().facts(), "beta": self.scale}

    def check(self, setup: Setup) -> None:
        """Options of other objectives, smoothing that would do nothing, rows of another shape."""
        for field in dataclasses.fields(self.options):
            if field.name not in self.uses and vars(self.options)[field.name] != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} is no option of {self.name}: leave it out")
        self.check_smoothing(setup.training.label_smoothing)
        check_preference_data(setup, self.name)

    def check_smoothing(self, epsilon: float) -> None:
        """Refuse label smoothing where the loss has none."""
        if epsilon:
            raise ValueError(
                f"label_smoothing is {epsilon:g}, but {self.name} smooths nothing: leave it out "
                "(dpo with --dpo-loss sigmoid or robust does)"
            )

    def read(self, setup: Setup) -> None:
        """Rows to train on and rows to evaluate on."""
        self.rows: Any
        self.held_out: Any
        self.rows, self.held_out = read_split(setup, self.kind)

    def adapt(self, config: Any) -> Any:
        """The adapter as it was asked for, but never with dropout beside a reference."""
        dropout = getattr(config, "dropout", 0.0)
        if self.referenced and dropout:
            raise ValueError(
                f"dropout is {dropout:g}, and {self.name} compares the policy with its "
                "reference: with dropout they differ before anything is learned; set it to 0"
            )
        return config

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """Batches with shared prompts where the model can, the reference, and the loss."""
        why = why_not_shared(model)
        setup.say(
            "completions share their prompt's computation"
            if why is None
            else f"each completion computes its prompt: {why}"
        )
        collate = self.collate(why is None, setup.tok.pad_id)
        if not self.referenced:
            return Work(self.rows, self.held_out, self.loss(setup, None), collate)
        if count := turn_off_dropout(model):
            setup.say(f"note: dropout is off in {count} modules, as policy and reference compare")
        reference = Reference.of(setup, model)
        setup.say(f"reference: {reference}")
        if reference.kind == "disabled" and setup.method in ("prefix", "prompt"):
            setup.say(
                f"note: a fresh {setup.method} changes the model before anything is learned, so "
                "that policy and reference differ from the first step on"
            )
        train, held_out = (
            None if rows is None else reference.record(model, rows, collate, setup)
            for rows in (self.rows, self.held_out)
        )
        return Work(train, held_out, self.loss(setup, reference), reference.collating(collate))

    def collate(self, shared: bool, pad_id: int) -> Collate:
        """Rows -> a batch of their completions."""
        return partial(branch_batch, shared=shared, pad_id=pad_id)

    def loss(self, setup: Setup, reference: Reference | None) -> Any:
        """The loss of a batch."""
        raise NotImplementedError

    def report(self, result: TrainResult) -> list[str]:
        """What the held-out rows say, at the evaluation whose weights are kept."""
        kept = [r for r in result.history if "eval_accuracy" in r]
        best = [r for r in kept if r["step"] == result.best_step] or kept[-1:]
        rows = 0 if self.held_out is None else len(self.held_out)
        return [
            f"held-out {self.kind.what}s ({rows}), step {r['step']}: loss {r['eval_loss']:.4f}, "
            f"accuracy {r['eval_accuracy']:.3f}, margin {r['eval_margin']:.4f}"
            for r in best
        ]


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


class DPO(Preference):
    """Direct preference optimization, its robust form, and the hinge on the same margin."""

    name = "dpo"
    help = "pairs: the chosen completion is made more probable than under the reference (DPO)"
    uses = frozenset({"beta", "dpo_loss"})

    def check_smoothing(self, epsilon: float) -> None:
        """Smoothing is a share of pairs, and the hinge has none."""
        if self.options.dpo_loss == "hinge":
            super().check_smoothing(epsilon)
        if epsilon >= 0.5:
            raise ValueError(
                f"label_smoothing must be below 0.5 for dpo, where it is the share of pairs that "
                f"are labelled the wrong way round; got {epsilon:g}"
            )

    def loss(self, setup: Setup, reference: Reference | None) -> PairLoss:
        """−log σ(βΔ), smoothed, robust, or max(0, 1 − βΔ)."""
        beta, smoothing = self.scale, setup.training.label_smoothing
        kinds: dict[str, Callable[..., Tensor]] = {
            "sigmoid": partial(dpo_loss, label_smoothing=smoothing),
            "robust": partial(robust_dpo_loss, label_smoothing=smoothing),
            "hinge": hinge_loss,
        }
        loss = kinds[self.options.dpo_loss]

        def of(s: Sides) -> tuple[Tensor, Tensor, Tensor]:
            losses = loss(*s.sums, beta, reduction="none")
            return losses, beta * (s.chosen - s.ref_chosen), beta * (s.rejected - s.ref_rejected)

        return PairLoss(of, reference)


class IPO(Preference):
    """Identity preference optimization: a margin to reach, on means over tokens."""

    name = "ipo"
    help = "pairs: a margin over the reference to reach, not to exceed (IPO)"

    def loss(self, setup: Setup, reference: Reference | None) -> PairLoss:
        """(Δ̄ − 1 / 2β)²; rewards are β times the means."""
        beta = self.scale

        def of(s: Sides) -> tuple[Tensor, Tensor, Tensor]:
            chosen, rejected, ref_chosen, ref_rejected = s.means
            losses = ipo_loss(*s.means, beta, reduction="none")
            return losses, beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)

        return PairLoss(of, reference)


class SimPO(Preference):
    """Simple preference optimization: means over tokens, no reference."""

    name = "simpo"
    help = "pairs: mean log-probabilities a target margin apart, without a reference (SimPO)"
    beta = 2.0
    uses = frozenset({"beta", "target_margin"})
    referenced = False

    def loss(self, setup: Setup, reference: Reference | None) -> PairLoss:
        """−log σ(β (ℓ̄_c − ℓ̄_r) − γ); rewards are β times the means."""
        beta, gamma = self.scale, self.options.target_margin

        def of(s: Sides) -> tuple[Tensor, Tensor, Tensor]:
            chosen, rejected, _, _ = s.means
            losses = simpo_loss(chosen, rejected, beta, gamma, reduction="none")
            return losses, beta * chosen, beta * rejected

        return PairLoss(of)


class ORPO(Preference):
    """Odds ratio preference optimization: fine-tuning and preference in one, no reference."""

    name = "orpo"
    help = "pairs: fine-tuning on the chosen side with an odds ratio, without a reference (ORPO)"
    referenced = False

    def loss(self, setup: Setup, reference: Reference | None) -> PairLoss:
        """−ℓ̄_c − β log σ(log odds); the chosen side's own loss is that of fine-tuning on it."""
        beta = self.scale

        def of(s: Sides) -> tuple[Tensor, Tensor, Tensor]:
            chosen, rejected, _, _ = s.means
            losses = orpo_loss(chosen, rejected, -chosen, beta, reduction="none")
            return losses, beta * chosen, beta * rejected

        return PairLoss(of)
