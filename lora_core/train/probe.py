"""Memory asked for before the first step instead of in the middle of the night.

The longest batch needs the most memory, and a shuffled run meets it at a step of its own choosing.
So it is run once, forward and backward and without a step, before all others; nothing of it stays.
"""

from collections.abc import Callable

import torch

from lora_core.train.batches import Batch, BatchSource
from lora_core.train.config import TrainConfig


def probe_due(config: TrainConfig, device: torch.device) -> bool:
    """Whether the configuration wants a probe on this device: by default on a GPU."""
    return device.type != "cpu" if config.probe is None else config.probe


def run_longest(source: BatchSource, run: Callable[[Batch], object]) -> None:
    """Run the batch that needs the most memory, and leave nothing of it behind.

    Args:
        source: the run's batches.
        run: forward and backward of one batch.
    """


def advice(config: TrainConfig) -> str:
    """What to change where memory is short, the cheapest first."""
    return "lower batch_size and raise accumulate"
