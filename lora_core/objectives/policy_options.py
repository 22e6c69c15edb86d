"""What can be chosen where a policy learns from rewards of its own answers."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from lora_core.losses import AGGREGATIONS


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """How answers are sampled, rewarded and weighed; each objective refuses what is not its own."""

    reward: str = ""
    """FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION or a reward adapter's folder, each optionally with
    :WEIGHT; several are separated by commas and add up"""
    reward_timeout: float = 10.0
    """seconds that a reward function may take for one answer"""
    group_size: int | None = None
    """answers to a prompt that are compared; none: grpo 8, rloo 4, ppo 1"""
    rollout_prompts: int = 4
    """prompts that are answered before the weights move"""
    max_new_tokens: int = 64
    """longest answer"""
    temperature: float = 1.0
    """of sampling, and of the log-probabilities that are trained"""
    passes: int = 1
    """how often the answers of a rollout are gone over"""
    kl_coef: float | None = None
    """weight of the KL to the reference; 0: there is no reference; none: grpo 0, rloo and ppo
    0.05"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """grpo's estimate of the KL; rloo and ppo have k1 inside the reward"""
    clip_low: float = 0.2
    """how far a token's ratio may fall below 1"""
    clip_high: float | None = None
    """how far it may rise above 1; none: as clip-low"""
    aggregation: Literal["dapo", "grpo", "bnpo", "dr_grpo"] | None = None
    """how tokens' losses become one; none: grpo and ppo dapo, rloo dr_grpo"""
    ratio: Literal["token", "sequence"] = "token"
    """grpo: a ratio a token, or one a sequence (GSPO)"""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """grpo: advantages are divided by the deviation in the group, in the rollout, or by nothing"""
    mask_truncated: bool = False
    """leave answers that were cut at max-new-tokens out of the loss"""
    gamma: float = 1.0
    """ppo: discount of later rewards"""
    lam: float = 0.95
    """ppo: how far GAE trusts rewards over values"""
    value_coef: float = 0.5
    """ppo: weight of the value loss"""
    value_clip: float | None = 0.2
    """ppo: how far a value may move in a rollout; none: any"""
    kl_target: float | None = None
    """ppo: nats an answer may differ from the reference; kl-coef is moved to meet it; none: it
    stays"""
    kl_horizon: float = 1000.0
    """ppo: answers over which kl-coef moves by at most 20 %"""

    def __post_init__(self) -> None:
        for name in ("group_size", "rollout_prompts", "max_new_tokens", "passes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}")
        for name in ("reward_timeout", "temperature", "kl_horizon", "kl_target", "value_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0; got {value!r}")
        for name in ("kl_coef", "clip_high", "value_coef"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be 0 or more; got {value!r}")
        for name in ("clip_low", "gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)!r}")
        if self.aggregation not in (None, *AGGREGATIONS):
            raise ValueError(
                f"aggregation must be one of {', '.join(AGGREGATIONS)}; got {self.aggregation!r}"
            )

    @property
    def rewards(self) -> list[str]:
        """The rewards' words, one each."""
        return [word.strip() for word in self.reward.split(",") if word.strip()]

    def check_used(self, objective: str, used: frozenset[str]) -> None:
        """Refuse an option that was set and that the objective does not look at."""
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name not in used and value != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} is no option of {objective}: leave it out")
