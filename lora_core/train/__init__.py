"""Training."""

from lora_core.train.adamw8 import AdamW8bit
from lora_core.train.config import DEFAULT_LR, TrainConfig
from lora_core.train.loop import train
from lora_core.train.optim import make_adamw, make_optimizer, trained_parameters
from lora_core.train.paged import PagedAdamW
from lora_core.train.report import TrainResult
from lora_core.train.schedule import make_schedule
from lora_core.train.step import CausalLoss, NonFiniteError, train_step
from lora_core.train.surgery import PCGrad

__all__ = [
    "DEFAULT_LR",
    "AdamW8bit",
    "CausalLoss",
    "NonFiniteError",
    "PCGrad",
    "PagedAdamW",
    "TrainConfig",
    "TrainResult",
    "make_adamw",
    "make_optimizer",
    "make_schedule",
    "train",
    "train_step",
    "trained_parameters",
]
