"""`dpo`, `ipo`, `simpo`, `orpo`: what is preferred is made more probable than what is not.

Both sides of each pair come down to one number, the sum of its graded tokens' log-probabilities or
their mean (pair_loss.py). What differs between the four is the loss of these numbers
(lora_core/losses/preference.py) and whether it asks for a reference, which is the model itself
(reference.py).

Dropout has to be off where there is a reference: a policy that drops out differs from it before
anything is learned, and the loss at the first step would not be ln 2. A fresh adapter's is refused;
one that was trained with dropout goes on without, and says so.

Learning rates. DPO's loss of a sum over tokens soon has no bottom: on the shipped base, 20 steps of
8 pairs bring the mean margin to 0.6 at 5e-5, to 1.3 at 1e-4, to 4.5 at 3e-4 and to 12 at 1e-3, a
policy e^120 from its reference. So DPO (and KTO, which is alike) begin at a quarter of the usual
rate. IPO has a margin to reach, SimPO and ORPO a mean over tokens to move: they keep the usual one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

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
from lora_core.objectives.pair_loss import PairLoss, Sides
from lora_core.objectives.preference_data import check_preference_data, read_split
from lora_core.objectives.reference import Collate, Reference, turn_off_dropout
from lora_core.objectives.scoring import why_not_shared
from lora_core.objectives.setup import Setup
from lora_core.train import TrainResult


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


GENTLE = {"lora": 5e-5, "qlora": 5e-5, "full": 5e-6}
"""learning rates of losses without a bottom, by method"""


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


class DPO(Preference):
    """Direct preference optimization, its robust form, and the hinge on the same margin."""

    name = "dpo"
    help = "pairs: the chosen completion is made more probable than under the reference (DPO)"
    uses = frozenset({"beta", "dpo_loss"})
    rates: ClassVar[Mapping[str, float]] = GENTLE

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
