"""Training."""

from lora_core.train.config import DEFAULT_LR, TrainConfig
from lora_core.train.loop import train
from lora_core.train.optim import make_adamw, trained_parameters
from lora_core.train.report import TrainResult
from lora_core.train.schedule import make_schedule
from lora_core.train.step import CausalLoss, NonFiniteError, train_step

__all__ = [
    "DEFAULT_LR",
    "CausalLoss",
    "NonFiniteError",
    "TrainConfig",
    "TrainResult",
    "make_adamw",
    "make_schedule",
    "train",
    "train_step",
    "trained_parameters",
]
