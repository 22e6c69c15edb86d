"""Several tasks on one backbone: what meets in a step, what each counts, what is forgotten."""

from lora_core.tasks.batches import TaskBatches, shares
from lora_core.tasks.compare import Comparison, compare_tasks
from lora_core.tasks.forgetting import average_score, backward_transfer, forgetting
from lora_core.tasks.head_scores import head_scores
from lora_core.tasks.loss import HeadLoss, TaskLoss
from lora_core.tasks.plan import PLANS, Outcome, Task
from lora_core.tasks.rates import optimizer_with_rates, rate_factors

__all__ = [
    "PLANS",
    "Comparison",
    "HeadLoss",
    "Outcome",
    "Task",
    "TaskBatches",
    "TaskLoss",
    "average_score",
    "backward_transfer",
    "compare_tasks",
    "forgetting",
    "head_scores",
    "optimizer_with_rates",
    "rate_factors",
    "shares",
]
