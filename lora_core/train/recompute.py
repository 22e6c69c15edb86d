"""Activation checkpointing of a model's layers, for the time of a run.

Each layer's forward is replaced, on the instance, by one that keeps the layer's input alone and
runs the layer again in backward. Dropout draws the same numbers again (torch saves the generator's
state), so the gradients are those of the plain run. The non-reentrant form is used: the reentrant
one silently gives adapters no gradient where the layer's input requires none.
"""

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the longest ModuleList whose members are of one class.

    Args:
        model: any module.

    Returns:
        The members of that list, in order.

    Raises:
        ValueError: the model has no such list.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    stacks = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not stacks:
        raise ValueError(
            "activation_checkpointing needs the model's layers in an nn.ModuleList of one class; "
            f"{type(model).__name__} has none: switch it off"
        )
    return max(stacks, key=len)


@contextlib.contextmanager
def recomputed_layers(model: nn.Module, on: bool = True, offload: bool = False) -> Iterator[None]:
    """Within the block the model's layers recompute their activations in backward.

    Args:
        model: any module with an `nn.ModuleList` of layers.
        on: False changes nothing.
        offload: keep the layers' inputs in the host's memory.

    Yields:
        None. Afterwards the layers are as they were.
    """
    layers = repeated_layers(model) if on else []
    patched = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        # an attribute of the instance hides the class's method until it is deleted
        layer.forward = functools.partial(_recomputed, layer.forward, layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, patched, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _recomputed(forward, layer, *args, **kwargs):  # type: ignore[no-untyped-def]  # any layer's own
    if not layer.training:
        return forward(*args, **kwargs)
    # a key/value cache that transformers passes along, by position or under one of three names,
    # would be appended to twice
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {k: None if _is_cache(v, k) else v for k, v in kwargs.items()}
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_cache(value: object, name: str = "") -> bool:
    return name.startswith("past_key_value") or hasattr(value, "get_seq_length")
