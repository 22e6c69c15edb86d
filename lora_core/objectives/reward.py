"""`reward`: a model that scores answers, from pairs of which one is preferred.

The decoder keeps its weights; a LoRA and a score head (score.py) are trained so that the chosen
side of each pair scores above the rejected one, by Bradley and Terry's model:
-log sigmoid(r_c - r_r - margin). A row's `margin` says by how much the chosen side is to be ahead.
Scores are free up to a constant for each prompt; centering (`--center-rewards`) keeps them near 0.

The folder is a LoRA in PEFT's format with the head in it, task SEQ_CLS: what
`--objective ppo --reward DIR` takes.

Ref: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; Touvron et al. 2023, arXiv:2307.09288, eq. 2, for
the margin.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_core.adapters import LoRAConfig
from lora_core.adapters.adapter_report import AdapterReport
from lora_core.adapters.full import FullCopy
from lora_core.adapters.inject import attach_built
from lora_core.checkpoint.peft import built_from
from lora_core.data import PairRows
from lora_core.data.branches import branch_batch
from lora_core.data.pair_rows import PairRow
from lora_core.losses import reward_loss
from lora_core.models import CausalLM
from lora_core.objectives.objective import LoadModel, Objective, Work
from lora_core.objectives.preference_data import check_preference_data, read_split
from lora_core.objectives.score import HEAD, add_score_head, completion_scores
from lora_core.objectives.scoring import why_not_shared
from lora_core.objectives.setup import Setup
from lora_core.train import TrainResult
from lora_core.train.batches import Batch
from lora_core.train.step import LossResult


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """How scores are learned."""

    center_rewards: float = 0.0
    """weight of (chosen + rejected)², which keeps scores near 0; 0.01 is usual"""

    def __post_init__(self) -> None:
        if not 0 <= self.center_rewards < float("inf"):
            raise ValueError(f"center_rewards must be 0 or more; got {self.center_rewards}")


@dataclass(frozen=True)
class RewardLoss:
    """The loss of a batch of pairs: their sum, divided by the pairs of the step."""

    center: float

    def __call__(self, model: CausalLM, batch: Batch, normalizer: float) -> LossResult:
        """Score both sides of each pair; `margin` (R,) of the batch is 0 where rows have none."""
        scores = completion_scores(model, batch)  # (2R,)
        chosen, rejected = scores[::2], scores[1::2]
        losses = reward_loss(chosen, rejected, batch["margin"], self.center, reduction="none")
        ahead, pairs = (chosen - rejected).detach(), len(losses)
        figures = {
            "accuracy": ((ahead > 0).sum(), pairs),
            "margin": (ahead.sum(), pairs),
            "score": (scores.detach().sum(), 2 * pairs),
        }
        return LossResult(losses.sum() / normalizer, figures=figures)

    def count(self, batch: Batch) -> float:
        """The batch's pairs."""
        return len(batch["ends"]) // 2


def collate_pairs(rows: Sequence[PairRow], *, shared: bool, pad_id: int) -> Batch:
    """Pairs with their margins (R,), 0 where a row has none."""
    margins = [0.0 if row.margin is None else row.margin for row in rows]
    return {**branch_batch(rows, shared=shared, pad_id=pad_id), "margin": torch.tensor(margins)}


class Reward(Objective[RewardOptions]):
    """A reward model."""

    name = "reward"
    help = "pairs: a score head learns which completion is preferred (a reward model)"
    options_class = RewardOptions

    def check(self, setup: Setup) -> None:
        """A head is saved within a LoRA alone."""
        if setup.method not in ("lora", "qlora"):
            raise ValueError(
                f"the score head is saved within a LoRA, as PEFT has it, which method "
                f"{setup.method} is not: choose lora or qlora"
            )
        if setup.training.label_smoothing:
            raise ValueError("label_smoothing smooths labels, of which reward has none")
        check_preference_data(setup, self.name)

    def read(self, setup: Setup) -> None:
        """Pairs to train on and pairs to evaluate on."""
        self.rows: PairRows
        self.held_out: PairRows | None
        self.rows, self.held_out = read_split(setup, PairRows)

    def load(self, setup: Setup, load: LoadModel) -> Any:
        """The base with a score head."""
        model: Any = load()
        if isinstance(model, CausalLM):
            add_score_head(model)
        return model

    def adapt(self, config: Any) -> Any:
        """The LoRA with the head trained whole beside it."""
        assert isinstance(config, LoRAConfig)  # check() let no other method through
        kept = [*(config.modules_to_save or []), HEAD]
        return dataclasses.replace(config, modules_to_save=kept, exclude=_without_head(config))

    def go_on(self, setup: Setup, model: nn.Module) -> AdapterReport:
        """The adapter that is there, with a head beside it if it has none."""
        assert setup.continued is not None
        config, built = built_from(model, setup.continued, True)
        if not isinstance(config, LoRAConfig):
            raise ValueError(f"{setup.continued} is no LoRA, within which the score head is saved")
        if HEAD not in built:
            built[HEAD] = FullCopy(model.get_submodule(HEAD))
            kept = [*(config.modules_to_save or []), HEAD]
            config = dataclasses.replace(config, modules_to_save=kept)
        return attach_built(model, config, "default", built, trainable=True)

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """Batches with shared prompts, and the loss."""
        why = why_not_shared(model)
        assert why is None, why  # a decoder of this library under a LoRA
        setup.say("completions share their prompt's computation")
        collate = partial(collate_pairs, shared=True, pad_id=setup.tok.pad_id)
        loss: Any = RewardLoss(self.options.center_rewards)
        return Work(self.rows, self.held_out, loss, collate)

    def report(self, result: TrainResult) -> list[str]:
        """What the held-out pairs say."""
        kept = [record for record in result.history if "eval_accuracy" in record]
        best = [r for r in kept if r["step"] == result.best_step] or kept[-1:]
        return [
            f"held-out pairs, step {r['step']}: loss {r['eval_loss']:.4f}, accuracy "
            f"{r['eval_accuracy']:.3f}, margin {r['eval_margin']:.4f}"
            for r in best
        ]


def _without_head(config: LoRAConfig) -> Any:
    """The configuration's `exclude` with the head in it: a new linear layer is trained whole."""
    before = config.exclude
    if not before:
        return [HEAD]
    if isinstance(before, str):
        return f"(?:{before})|{HEAD}"
    if callable(before):
        return lambda name, module: name == HEAD or before(name, module)
    return [*before, HEAD]
