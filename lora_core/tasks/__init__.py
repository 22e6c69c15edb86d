"""Several tasks on one backbone: what meets in a step, what each counts, what is forgotten."""

from lora_core.tasks.batches import TaskBatches, shares
from lora_core.tasks.loss import HeadLoss, TaskLoss
from lora_core.tasks.rates import optimizer_with_rates, rate_factors

__all__ = [
    "HeadLoss",
    "TaskBatches",
    "TaskLoss",
    "optimizer_with_rates",
    "rate_factors",
    "shares",
]
