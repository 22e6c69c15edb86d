"""`grpo` and `rloo`: answers are sampled, and those better than their group's others reinforced.

A rollout (rollouts.py) is a few prompts with a group of answers each; what they weigh is settled
when they are sampled, and the loss of a batch needs nothing but the batch (policy_loss.py).

At the first step on a rollout the policy is the one that sampled, every ratio is 1, and as the
advantages of a group sum to 0 the loss is about 0. Its gradient is not: watch `reward`.

Ref: Shao et al. 2024, arXiv:2402.03300, section 4.1 (grpo); Ahmadian et al. 2024, arXiv:2402.14740,
section 2 (rloo).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from lora_core.data import PromptRows
from lora_core.device import dtype_policy
from lora_core.objectives.answers import HeldOut, Sampler
from lora_core.objectives.objective import Objective, Work
from lora_core.objectives.policy_loss import PolicyLoss, Scoring, Weighing
from lora_core.objectives.policy_options import PolicyOptions
from lora_core.objectives.preference_data import check_preference_data
from lora_core.objectives.prompts import beyond_positions, read_prompts, refuse_processes
from lora_core.objectives.reference import Reference, turn_off_dropout
from lora_core.objectives.rewards import Rewards
from lora_core.objectives.rollout_log import LOG
from lora_core.objectives.rollouts import Rollouts
from lora_core.objectives.scoring import why_not_shared
from lora_core.objectives.setup import Setup
from lora_core.train import TrainResult


class Policy(Objective[PolicyOptions]):
    """What every objective on sampled answers shares."""

    options_class = PolicyOptions
    training: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "accumulate": 4, "epochs": 1}
    group_size: ClassVar[int]
    """where the options leave it open"""
    least_group: ClassVar[int] = 2
    kl_coef: ClassVar[float] = 0.0
    """where the options leave it open"""
    aggregation: ClassVar[str] = "dapo"
    """where the options leave it open"""
    uses: ClassVar[frozenset[str]] = frozenset(
        {"reward", "reward_timeout", "group_size", "rollout_prompts", "max_new_tokens"}
        | {"temperature", "passes", "kl_coef", "clip_low", "clip_high", "mask_truncated"}
    )
    """its fields of the options"""

    @property
    def group(self) -> int:
        """Answers to a prompt."""
        return self.group_size if self.options.group_size is None else self.options.group_size

    @property
    def beta(self) -> float:
        """Weight of the KL."""
        return self.kl_coef if self.options.kl_coef is None else self.options.kl_coef

    @property
    def summed(self) -> Any:
        """The aggregation of tokens' losses."""
        return self.options.aggregation or self.aggregation

    def facts(self) -> dict[str, Any]:
        """The options with what stands for those left open."""
        chosen = {"group_size": self.group, "kl_coef": self.beta, "aggregation": self.summed}
        return {**super().facts(), **chosen}

    def check(self, setup: Setup) -> None:
        """Options of other objectives, and a rollout that does not fill whole steps."""
        options, training = self.options, setup.training
        options.check_used(self.name, self.uses)
        check_preference_data(setup, self.name)
        refuse_processes(self.name)
        Rewards.check(options.rewards)
        if self.group < self.least_group:
            raise ValueError(
                f"{self.name} compares the answers to a prompt: group_size must be "
                f"{self.least_group} or more; got {self.group}"
            )
        if training.label_smoothing:
            raise ValueError(f"label_smoothing smooths labels, of which {self.name} has none")
        if training.probe:
            raise ValueError(f"probe runs the longest batch first, which {self.name} cannot know")
        answers = options.rollout_prompts * self.group
        step = training.batch_size * training.accumulate
        if step > answers or answers % step:
            raise ValueError(
                f"a rollout of {options.rollout_prompts} prompts x {self.group} answers = "
                f"{answers} does not fill whole steps of batch_size x accumulate = {step} answers: "
                "make the one a multiple of the other"
            )

    def read(self, setup: Setup) -> None:
        """Prompts to answer, and prompts to evaluate on."""
        self.rows: PromptRows
        self.held_out: PromptRows | None
        self.rows, self.held_out = read_prompts(setup, self.name)
        least = self.options.rollout_prompts
        if len(self.rows) < least:
            raise ValueError(
                f"{len(self.rows)} prompts are fewer than a rollout takes: set --rollout-prompts "
                f"to {len(self.rows)} or less (it is {least}), or give more"
            )

    def adapt(self, config: Any) -> Any:
        """The adapter as it was asked for, but never with dropout."""
        if getattr(config, "dropout", 0.0):
            raise ValueError(
                f"dropout is {config.dropout:g}, and {self.name} compares the policy with the one "
                "that sampled: with dropout they differ before anything is learned; set it to 0"
            )
        return config

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """Rollouts, their loss, and held-out prompts answered at evaluations."""
        options = self.options
        # a base that is trained is not the reward model's any more
        base = None if setup.method == "full" else (setup.settings.model, setup.quantize)
        rewards = Rewards.open(
            options.rewards, options.reward_timeout, model, setup.tok, setup.device, base
        )
        for line in rewards.notes():
            setup.say(line)
        if count := turn_off_dropout(model):
            setup.say(f"note: dropout is off in {count} modules, as ratios would measure it")
        reference = self.reference(setup, model)
        why = why_not_shared(model)
        setup.say(
            "answers share their prompt's computation"
            if why is None
            else f"each answer computes its prompt: {why}"
        )
        if said := beyond_positions(self.rows, options.max_new_tokens, model):
            setup.say(f"note: {said}")
        policy = dtype_policy(setup.training.dtype, setup.device)
        scoring = Scoring(
            model, reference, options.temperature, why is None, setup.tok.pad_id, policy
        )
        seed = setup.training.seed
        sampler = Sampler(
            model, setup.tok, options.max_new_tokens, options.temperature, seed, policy
        )
        source = self.source(setup, sampler, rewards, scoring)
        held_out = None if self.held_out is None else HeldOut(self.held_out, sampler, rewards)
        return Work(source, held_out, self.loss(), facts={"rewards": rewards.facts()})

    def reference(self, setup: Setup, model: nn.Module) -> Reference | None:
        """The reference where a KL is asked for."""
        if not self.beta:
            setup.say("no KL to a reference is asked for (kl_coef 0)")
            return None
        if setup.method == "full":
            raise ValueError(
                f"method full keeps nothing of the reference that {self.name} measures its KL to, "
                "and answers are not known beforehand: set --kl-coef 0, or train an adapter"
            )
        reference = Reference.of(setup, model)
        setup.say(f"reference: {reference}")
        return reference

    def source(
        self, setup: Setup, sampler: Sampler, rewards: Rewards, scoring: Scoring
    ) -> Rollouts:
        """The rollouts."""
        return self.rollouts(setup, sampler, rewards, self.weighing(scoring), scoring.shared)

    def rollouts(
        self,
        setup: Setup,
        sampler: Sampler,
        rewards: Rewards,
        weigh: Any,
        shared: bool,
        controller: Any = None,
    ) -> Rollouts:
        """Rollouts by the options."""
        return Rollouts(
            self.rows,
            sampler,
            rewards,
            weigh,
            group_size=self.group,
            at_once=self.options.rollout_prompts,
            batch_size=setup.training.batch_size,
            passes=self.options.passes,
            shared=shared,
            log=setup.out / LOG,
            step=setup.training.batch_size * setup.training.accumulate,
            controller=controller,
            say=setup.say,
        )

    def weighing(self, scoring: Scoring) -> Any:
        """What fills a rollout's tensors."""
        raise NotImplementedError

    def loss(self) -> Any:
        """The loss of a batch."""
        return PolicyLoss(self.options, self.summed, 0.0)

    def report(self, result: TrainResult) -> list[str]:
        """The reward at the beginning and at the end, and what taught nothing."""
        history = [record for record in result.history if "reward" in record]
        if not history:
            return ["no answer was rewarded"]
        tenth = max(1, len(history) // 10)
        first, last = (
            sum(record["reward"] for record in some) / len(some)
            for some in (history[:tenth], history[-tenth:])
        )
        lines = [f"mean reward: {first:.4f} in the first {tenth} steps, {last:.4f} in the last"]
        if flat := sum(record.get("flat_groups", 0) for record in history) / len(history):
            lines.append(f"{flat:.0%} of the answers were in groups of equal rewards, unused")
        if failed := sum(record["failed_rewards"] for record in history) / len(history):
            lines.append(f"{failed:.1%} of the answers had no reward; {LOG} says why")
        return lines


class GRPO(Policy):
    """Group relative policy optimization."""

    name = "grpo"
    help = "prompts and a reward: answers better than their group's mean are reinforced (GRPO)"
    group_size = 8
    uses = Policy.uses | {"kl", "aggregation", "ratio", "scale_rewards"}

    def weighing(self, scoring: Scoring) -> Weighing:
        """Advantages over the group's mean."""
        return Weighing(scoring, self.options, self.group, self.beta, "grpo")

    def loss(self) -> PolicyLoss:
        """The clipped loss with its KL."""
        return PolicyLoss(self.options, self.summed, self.beta)


class RLOO(Policy):
    """REINFORCE leave-one-out."""

    name = "rloo"
    help = "prompts and a reward: answers are compared with the others to their prompt (RLOO)"
    group_size = 4
    kl_coef = 0.05
    aggregation = "dr_grpo"
    uses = Policy.uses | {"aggregation"}
    training: ClassVar[Mapping[str, Any]] = {**Policy.training, "accumulate": 2}

    def weighing(self, scoring: Scoring) -> Weighing:
        """Advantages over the others, the KL inside the reward."""
        return Weighing(scoring, self.options, self.group, self.beta, "rloo")
