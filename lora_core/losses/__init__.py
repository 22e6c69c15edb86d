"""Losses on plain tensors.

cross_entropy.py, linear_cross_entropy.py         the next token
preference.py, kto.py                             which completion is better; which is good
reward.py                                         a reward model's scores
policy.py, aggregation.py, advantages.py, kl.py   sampled completions with rewards
"""

from lora_core.losses.advantages import gae, group_advantages, rloo_advantages, whiten
from lora_core.losses.aggregation import AGGREGATIONS, aggregate, aggregation_count
from lora_core.losses.cross_entropy import (
    IGNORE,
    count_graded,
    masked_cross_entropy,
    shift_labels,
    token_cross_entropy,
    token_mean,
)
from lora_core.losses.kl import AdaptiveKL, FixedKL, kl_estimate
from lora_core.losses.kto import kto_baseline, kto_loss
from lora_core.losses.linear_cross_entropy import (
    linear_cross_entropy,
    linear_token_cross_entropy,
)
from lora_core.losses.log_probs import label_log_probs, linear_log_probs
from lora_core.losses.policy import (
    clipped,
    grpo_loss,
    log_ratios,
    policy_token_losses,
    ppo_loss,
    value_loss,
)
from lora_core.losses.preference import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    log1mexp,
    log_ratio_margin,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from lora_core.losses.reward import reward_loss

__all__ = [
    "AGGREGATIONS",
    "IGNORE",
    "AdaptiveKL",
    "FixedKL",
    "aggregate",
    "aggregation_count",
    "clipped",
    "count_graded",
    "dpo_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kl_estimate",
    "kto_baseline",
    "kto_loss",
    "label_log_probs",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_token_cross_entropy",
    "log1mexp",
    "log_ratio_margin",
    "log_ratios",
    "masked_cross_entropy",
    "orpo_loss",
    "policy_token_losses",
    "ppo_loss",
    "reward_loss",
    "rloo_advantages",
    "robust_dpo_loss",
    "shift_labels",
    "simpo_loss",
    "token_cross_entropy",
    "token_mean",
    "value_loss",
    "whiten",
]
