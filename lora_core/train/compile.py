"""`torch.compile` as a switch: each layer of the model is compiled, for the time of a run."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def compiled_layers(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within the block the model's layers run compiled.

    Args:
        model: any module with an `nn.ModuleList` of layers.
        on: False changes nothing.

    Yields:
        None. Afterwards the layers are as they were.
    """
    if on:
        raise ValueError("compile is not built yet: leave it out")
    yield
