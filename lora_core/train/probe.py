"""Memory asked for before the first step instead of in the middle of the night.

The largest batch needs the most memory, and a shuffled run meets it at a step of its own choosing.
So a batch as large as any is run once, forward and backward and without a step, before all others:
too little memory shows at once, with what to change. Nothing of it stays: gradients are dropped by
whoever runs it, and the random generators are put back, so a run with a probe is bit for bit the
run without. (What a module counts in buffers of its own, as batch norms do, counts the probe too.)

What the optimizer will hold from the first step on is set aside meanwhile. AdamW's float32 state is
twice the trained weights: nothing beside a LoRA, most of the memory of a full fine-tune.

The trade-off: one batch of time, and memory that the allocator then keeps for the steps to come.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lora_core.device import out_of_memory
from lora_core.train.batches import Batch, BatchSource
from lora_core.train.config import TrainConfig
from lora_core.train.parts import part_here
from lora_core.train.report import say
from lora_core.train.snapshot import generators, restore_generators

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256}
"""On the device, for each trained number: two float32, or two bytes and two scales a block."""


def probe_due(config: TrainConfig, device: torch.device) -> bool:
    """Whether the configuration wants a probe on this device: by default on a GPU."""
    return device.type != "cpu" if config.probe is None else config.probe


def run_longest(
    source: BatchSource,
    run: Callable[[Batch], object],
    config: TrainConfig,
    parameters: Iterable[nn.Parameter] = (),
) -> None:
    """Run the batch that needs the most memory, and leave nothing of it behind.

    Args:
        source: the run's batches. Where they do not know their largest, that is said and no more.
        run: forward and backward of one batch; drops the gradients.
        config: the run's.
        parameters: the trained ones, if the optimizer has no state of them yet.

    Raises:
        ValueError: it does not fit; names the batch and what to change.
    """
    largest = source.largest()
    if largest is None:
        say("no probe: of batches that are made elsewhere the largest is not known")
        return
    batch, size = largest
    saved = generators()
    try:
        held = state_to_come(config, parameters)
        run(batch)
        del held
    except (RuntimeError, MemoryError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise ValueError(
            f"the longest batch ({size}) does not fit: {said}; {advice(config)}"
        ) from None
    finally:
        restore_generators(*saved)


def state_to_come(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Memory the size of what the optimizer will hold in this process.

    Args:
        config: names the optimizer; none of a paged one's state is counted.
        parameters: the trained ones.

    Returns:
        One tensor of bytes for each.
    """
    each = STATE_BYTES.get(config.optimizer, 0.0)
    sizes = [(int(p.numel() * each), p.device) for p in map(part_here, parameters)]
    return [torch.empty(size, dtype=torch.uint8, device=device) for size, device in sizes]


def advice(config: TrainConfig) -> str:
    """What to change where memory is short, in the order of what it costs.

    Args:
        config: the run's; what it has switched on already is left out.

    Returns:
        A phrase: "lower batch_size (4) and raise accumulate by as much; or set …".
    """
    offload = config.activation_checkpointing and not config.offload_activations
    steps = [
        (
            config.batch_size > 1,
            f"lower batch_size ({config.batch_size}) and raise accumulate by as much",
        ),
        (not config.activation_checkpointing, "set activation_checkpointing"),
        (offload, "set offload_activations"),
        (config.packing is None, "lower max_length"),
        (config.packing is not None, f"lower max_length and packing ({config.packing})"),
        (config.optimizer == "adamw", "set optimizer to adamw8bit"),
        (True, "load the base in 4 bits (quantize, or method qlora) if it is not"),
    ]
    return "; or ".join(text for holds, text in steps if holds)
