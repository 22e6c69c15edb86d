"""What a rollout's answers weigh, and the loss of a batch of them.

What does not change while a rollout is gone over is settled when it is sampled (`Weighing`):
log-probabilities under the policy that sampled the answers, under the reference where there is a
KL, and advantages. All of it goes with the answers into their batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_core.device import DtypePolicy
from lora_core.evaluate import modes_kept
from lora_core.losses import (
    aggregation_count,
    clipped,
    group_advantages,
    grpo_loss,
    kl_estimate,
    log_ratios,
    rloo_advantages,
)
from lora_core.objectives.policy_options import PolicyOptions
from lora_core.objectives.reference import Reference
from lora_core.objectives.rollouts import Rollout
from lora_core.objectives.scoring import completion_log_probs
from lora_core.train.batches import Batch, to_device
from lora_core.train.step import LossResult


@dataclass
class Scoring:
    """Log-probabilities of a rollout's answers, batch by batch as the loss will see them."""

    model: nn.Module
    reference: Reference | None
    """None: no KL is asked for"""
    temperature: float
    shared: bool
    pad_id: int
    policy: DtypePolicy

    def __call__(self, rollout: Rollout) -> Tensor:
        """Put `old_log_probs`, and `ref_log_probs` where there is a reference, into a rollout.

        Returns:
            Which tokens there are, bool (N, L).
        """
        longest = max(map(len, rollout.completions))
        shape = (len(rollout.completions), longest)
        mask = torch.zeros(shape, dtype=torch.bool)
        names = ["old_log_probs"] + (["ref_log_probs"] if self.reference else [])
        rollout.tensors.update({name: torch.zeros(shape) for name in names})
        with modes_kept(self.model), torch.no_grad(), self.policy.autocast():
            self.model.eval()
            for chosen in rollout.chunks:
                plain = rollout.batch(chosen, self.shared, self.pad_id)
                batch = to_device(plain, self.policy.device)
                found, some = completion_log_probs(self.model, batch, self.temperature)
                width = found.shape[1]
                mask[chosen, :width] = some.cpu()
                rollout.tensors["old_log_probs"][chosen, :width] = found.float().cpu()
                if self.reference is not None:
                    ref = self.reference.log_probs(self.model, batch, self.temperature)
                    rollout.tensors["ref_log_probs"][chosen, :width] = ref.float().cpu()
        return mask


@dataclass
class Weighing:
    """Advantages of a rollout's answers by their group."""

    scoring: Scoring
    options: PolicyOptions
    group_size: int
    kl_coef: float
    """inside the reward for rloo; grpo has its KL in the loss"""
    kind: Literal["grpo", "rloo"]

    def __call__(self, rollout: Rollout) -> None:
        """Fill `advantages` (N,) and what the loss needs beside them."""
        mask = self.scoring(rollout)
        tensors = rollout.tensors
        rewards = tensors["rewards"]
        if self.kind == "rloo":
            if self.kl_coef:
                beyond = kl_estimate(tensors["old_log_probs"], tensors["ref_log_probs"], "k1")
                rewards = rewards - self.kl_coef * (beyond * mask).sum(1)
            advantages = rloo_advantages(rewards, self.group_size)
        else:
            advantages = group_advantages(rewards, self.group_size, self.options.scale_rewards)
        tensors["advantages"] = advantages.float()
        note_flat(rollout)


def note_flat(rollout: Rollout) -> None:
    """Mark the answers of groups whose rewards are all equal, which teach nothing."""
    groups = rollout.tensors["rewards"].view(-1, rollout.group_size)
    known = ~groups.isnan()
    high = torch.where(known, groups, -torch.inf).amax(1, keepdim=True)
    low = torch.where(known, groups, torch.inf).amin(1, keepdim=True)
    rollout.tensors["flat"] = (high <= low).expand_as(groups).flatten()


def figures_of(batch: Mapping[str, Tensor], mask: Tensor) -> dict[str, tuple[Tensor, float]]:
    """What is reported of a batch's answers."""
    rewards, count = batch["rewards"], len(mask)
    known = ~rewards.isnan()
    figures: dict[str, tuple[Tensor, float]] = {
        "reward": (torch.where(known, rewards, 0.0).sum(), int(known.sum())),
        "length": (mask.sum(), count),
        "ended": (batch["ended"].sum(), count),
        "failed_rewards": ((~known).sum(), count),
    }
    if "flat" in batch:
        figures["flat_groups"] = (batch["flat"].sum(), count)
    for name in (name for name in batch if name.startswith("reward/")):  # the parts of a sum
        known = ~batch[name].isnan()
        figures[name] = (batch[name].nan_to_num(0.0).sum(), int(known.sum()))
    return figures


def kept_tokens(batch: Mapping[str, Tensor], mask: Tensor, mask_truncated: bool) -> Tensor:
    """The tokens that count: of answers with a reward, and on request of those that ended."""
    kept = ~batch["rewards"].isnan()
    if mask_truncated:
        kept = kept & batch["ended"]
    return mask & kept[:, None]


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss of a batch of answers, and minus their reward at evaluations."""

    options: PolicyOptions
    aggregation: Any
    kl_coef: float
    """of the KL in the loss"""

    def __call__(self, model: nn.Module, batch: Batch, normalizer: float) -> LossResult:
        """Sum over the batch / normalizer; see losses/aggregation.py for what is summed."""
        if "evaluation" in batch:
            return evaluated(batch, normalizer)
        options = self.options
        log_probs, every = completion_log_probs(model, batch, options.temperature)
        mask = kept_tokens(batch, every, options.mask_truncated)
        value = grpo_loss(
            log_probs,
            batch["old_log_probs"],
            batch["advantages"],
            mask,
            batch.get("ref_log_probs"),
            options.clip_low,
            options.clip_high,
            self.kl_coef,
            options.kl,
            self.aggregation,
            options.max_new_tokens,
            normalizer,
            options.ratio,
        )
        return LossResult(value, figures=self.figures(batch, log_probs.detach(), every, mask))

    def figures(
        self, batch: Batch, log_probs: Tensor, every: Tensor, mask: Tensor
    ) -> dict[str, tuple[Tensor, float]]:
        """Of the answers, and of how far the policy has moved."""
        options, tokens = self.options, int(mask.sum())
        ratio = log_ratios(log_probs, batch["old_log_probs"], mask, options.ratio)
        gain = batch["advantages"]
        gain = gain if gain.dim() == 2 else gain[:, None]
        out = clipped(ratio, gain, options.clip_low, options.clip_high) & mask
        figures = figures_of(batch, every) | {
            "clipped": (out.sum(), tokens),
            "ratio": (torch.where(mask, ratio.exp(), 0.0).sum(), tokens),
            # of sampled tokens: its mean is the entropy while they are the policy's own
            "entropy": (-torch.where(mask, log_probs, 0.0).sum(), tokens),
        }
        if "ref_log_probs" in batch:
            beyond = kl_estimate(log_probs, batch["ref_log_probs"], "k3")
            figures["kl"] = (torch.where(every, beyond, 0.0).sum(), int(every.sum()))
        return figures

    def count(self, batch: Batch) -> float:
        """What the batch counts for in its step."""
        if "evaluation" in batch:
            return int((~batch["rewards"].isnan()).sum())
        mask = kept_tokens(batch, batch["completions"] >= 0, self.options.mask_truncated)
        return aggregation_count(mask, self.aggregation)


def evaluated(batch: Batch, normalizer: float) -> LossResult:
    """Minus the reward of held-out answers: the best policy is the one of the least loss."""
    rewards = batch["rewards"]
    known = ~rewards.isnan()
    total = torch.where(known, rewards, 0.0).sum()
    figures = {"reward": (total, int(known.sum())), "ended": (batch["ended"].sum(), len(rewards))}
    return LossResult(-total / normalizer, figures=figures)
