"""`ppo`: a value head says what to expect of each token, and tokens that did better are reinforced.

The value head is one linear layer on the policy's last hidden states, a trained module beside the
adapter: it starts at 0, so that it expects nothing, and costs a few thousand numbers. The KL to the
reference is part of each token's reward,

    r_t = - kl_coef · (log pi - log ref)_t  +  score at the last token,

and advantages are GAE's over these, whitened over the rollout. An answer whose reward failed counts
nowhere. With a target the coefficient is moved after each rollout until the KL meets it.

Against InstructGPT: policy and value share their trunk (one adapter), so that the value loss has a
weight; the value does not begin as the reward model. `value_head.safetensors` keeps the head beside
the adapter for a run that goes on; nothing that serves the adapter needs it.

Ref: Ouyang et al. 2022, arXiv:2203.02155, section 3.5; Schulman et al. 2017, arXiv:1707.06347, eq.
7 and 9; Ziegler et al. 2019, arXiv:1909.08593, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_core.evaluate import modes_kept
from lora_core.losses import AdaptiveKL, FixedKL, gae, kl_estimate, ppo_loss, value_loss, whiten
from lora_core.objectives.answers import Sampler
from lora_core.objectives.objective import Work
from lora_core.objectives.policy import Policy
from lora_core.objectives.policy_loss import PolicyLoss, Scoring, evaluated, kept_tokens
from lora_core.objectives.rewards import Rewards
from lora_core.objectives.rollouts import Rollout, Rollouts
from lora_core.objectives.scoring import completion_states
from lora_core.objectives.setup import Setup
from lora_core.train.batches import Batch, to_device
from lora_core.train.snapshot import write_tensors
from lora_core.train.step import LossResult

HEAD = "value_head"
FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """What the rest of an answer is expected to earn, from a token's hidden state.

    Args:
        size: H of the hidden states.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, H) to (…,), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


@dataclass
class TokenWeighing:
    """Each token's advantage and return."""

    scoring: Scoring
    options: Any
    controller: FixedKL

    def __call__(self, rollout: Rollout) -> None:
        """Fill `advantages`, `returns` and `old_values`, (N, L) each."""
        mask = self.scoring(rollout)
        tensors, options = rollout.tensors, self.options
        old = tensors["old_log_probs"]
        values = self.values(rollout, mask)
        score = tensors["rewards"].nan_to_num(0.0).float()
        rewards = torch.zeros_like(old)
        if "ref_log_probs" in tensors:
            beyond = kl_estimate(old, tensors["ref_log_probs"], "k1") * mask
            rewards = -self.controller.coef * beyond
            self.controller.update(float(beyond.sum(1).mean()), len(mask))
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += score
        advantages, returns = gae(rewards, values, mask, options.gamma, options.lam)
        counted = kept_tokens(tensors, mask, options.mask_truncated)
        tensors["advantages"] = whiten(advantages, counted)
        tensors["returns"], tensors["old_values"] = returns, values

    def values(self, rollout: Rollout, mask: Tensor) -> Tensor:
        """What the value head expects of every token now, (N, L)."""
        scoring = self.scoring
        found = torch.zeros(mask.shape)
        with modes_kept(scoring.model), torch.no_grad(), scoring.policy.autocast():
            scoring.model.eval()
            for chosen in rollout.chunks:
                plain = rollout.batch(chosen, scoring.shared, scoring.pad_id)
                batch = to_device(plain, scoring.policy.device)
                _, some, hidden = completion_states(scoring.model, batch, scoring.temperature)
                values = scoring.model.get_submodule(HEAD)(hidden)
                found[chosen, : values.shape[1]] = (values * some).float().cpu()
        return found


@dataclass(frozen=True)
class PPOLoss(PolicyLoss):
    """The clipped policy loss and the clipped value loss, both means over the step's tokens."""

    def __call__(self, model: nn.Module, batch: Batch, normalizer: float) -> LossResult:
        """(policy + value_coef · value), summed over the batch's tokens / normalizer."""
        if "evaluation" in batch:
            return evaluated(batch, normalizer)
        options = self.options
        log_probs, every, hidden = completion_states(model, batch, options.temperature)
        values = model.get_submodule(HEAD)(hidden)
        mask = kept_tokens(batch, every, options.mask_truncated)
        old, gains = batch["old_log_probs"], batch["advantages"]
        policy = ppo_loss(log_probs, old, gains, mask, options.clip_low, normalizer)
        worth = value_loss(
            values, batch["old_values"], batch["returns"], mask, options.value_clip, normalizer
        )
        figures = self.figures(batch, log_probs.detach(), every, mask)
        figures["value_loss"] = (worth.detach() * normalizer, int(mask.sum()))
        return LossResult(policy + options.value_coef * worth, figures=figures)


class PPO(Policy):
    """Proximal policy optimization with a value head."""

    name = "ppo"
    help = "prompts and a reward: tokens that did better than a value head expected (PPO)"
    group_size = 1
    least_group = 1
    kl_coef = 0.05
    uses = (Policy.uses - {"clip_high"}) | {
        *("gamma", "lam", "value_coef", "value_clip", "kl_target", "kl_horizon")
    }
    training: ClassVar[Mapping[str, Any]] = {**Policy.training, "batch_size": 4, "accumulate": 1}

    def check(self, setup: Setup) -> None:
        """As every policy's, and a target that there is something to meet it with."""
        super().check(setup)
        if self.options.kl_target is not None and not self.beta:
            raise ValueError("kl_target moves kl_coef, and 0 stays 0: set --kl-coef above 0")

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """Put the value head into the model, then as every policy."""
        size = model.config.hidden_size  # type: ignore[union-attr]  # a decoder's
        head = ValueHead(size).to(setup.device)  # type: ignore[arg-type]
        known = None if setup.continued is None else setup.continued / FILE
        if known is not None and known.is_file():
            from safetensors.torch import load_file

            head.load_state_dict(load_file(known))
            setup.say(f"value head: of {known}")
        model.add_module(HEAD, head)
        return super().prepare(setup, model)

    def source(
        self, setup: Setup, sampler: Sampler, rewards: Rewards, scoring: Scoring
    ) -> Rollouts:
        """Rollouts whose KL coefficient may move."""
        options = self.options
        controller = FixedKL(self.beta)
        if options.kl_target is not None:
            controller = AdaptiveKL(self.beta, options.kl_target, options.kl_horizon)
        weigh = TokenWeighing(scoring, options, controller)
        return self.rollouts(setup, sampler, rewards, weigh, scoring.shared, controller)

    def loss(self) -> PPOLoss:
        """Policy and value."""
        return PPOLoss(self.options, self.summed, 0.0)

    def save(self, setup: Setup, model: nn.Module) -> None:
        """The value head beside the adapter."""
        write_tensors(setup.out / FILE, model.get_submodule(HEAD).state_dict())

    def save_model(self, setup: Setup, model: nn.Module) -> None:
        """The whole model without its value head, and the head beside it."""
        self.save(setup, model)
        head = model.get_submodule(HEAD)
        del model._modules[HEAD]
        try:
            super().save_model(setup, model)
        finally:
            model.add_module(HEAD, head)
