"""Activation checkpointing of a model's layers, for the time of a run.

    kept between forward and backward     plain   L · (everything a layer saves)
                                          here    L · B T C  and, while a layer's backward runs,
                                                  everything that one layer saves

Each layer's forward is replaced, on the instance, by one that keeps the layer's input alone and
runs the layer again in backward. Dropout draws the same numbers again (torch saves the generator's
state), so the gradients are those of the plain run, bit for bit on a CPU. The non-reentrant form is
used: the reentrant one silently gives adapters no gradient where the layer's input requires none.

The price is one more forward pass of the layers. With 4-bit weights it would also expand each of
them a third time; the recomputation and the backward pass after it share one expansion
(lora_kernels/expansions.py). What is kept, the layers' inputs, can go to the host's memory
(offload.py), and then the device holds those of one or two layers.

transformers decides layer by layer class, in each model's own file, and keeps the inputs on the
device; torchtune's offload hooks every saved tensor of the model. Here it is one wrapper around
whatever the layers are.

Ref: Chen et al. 2016, arXiv:1604.06174, section 3.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_core.train.offload import Offload, offload_to_host
from lora_kernels.expansions import checkpoint_contexts


def repeated_layers(model: nn.Module, what: str = "activation_checkpointing") -> list[nn.Module]:
    """The layers of a model: the longest ModuleList whose members are of one class.

    Args:
        model: any module.
        what: the switch that needs them, for the message.

    Returns:
        The members of that list, in order, each once.

    Raises:
        ValueError: the model has no such list.
    """
    # a layer that stands in the list more than once (shared weights) is one module
    lists = [list(dict.fromkeys(m)) for m in model.modules() if isinstance(m, nn.ModuleList)]
    stacks = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not stacks:
        raise ValueError(
            f"{what} needs the model's layers in an nn.ModuleList of one class; "
            f"{type(model).__name__} has none: switch it off"
        )
    return max(stacks, key=len)


@contextlib.contextmanager
def patched_layers(layers: list[nn.Module], wrap: Any) -> Iterator[None]:
    """Within the block each layer's forward is `wrap(forward, layer)`.

    Args:
        layers: modules, each at most once.
        wrap: gives what is called in the place of the forward.

    Yields:
        None. Afterwards the layers are as they were, after an error too.
    """
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        # an attribute of the instance hides the class's method until it is deleted
        layer.forward = wrap(layer.forward, layer)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


@contextlib.contextmanager
def recomputed_layers(model: nn.Module, on: bool = True, offload: bool = False) -> Iterator[None]:
    """Within the block the model's layers recompute their activations in backward.

    Args:
        model: any module with an `nn.ModuleList` of layers.
        on: False changes nothing.
        offload: keep the layers' inputs in the host's memory.

    Yields:
        None. Afterwards the layers are as they were.

    Raises:
        ValueError: the model's layers are not to be found.
    """
    if not on:
        yield
        return
    away = offload_to_host(model) if offload else None
    layers = repeated_layers(model)
    with patched_layers(layers, functools.partial(functools.partial, _recomputed, away)):
        yield


def _recomputed(  # type: ignore[no-untyped-def]  # any layer's own
    away: Offload | None, forward, layer: nn.Module, *args, **kwargs
):
    if not layer.training:
        return forward(*args, **kwargs)
    # a key/value cache that transformers passes along, by position or under one of three names,
    # would be appended to twice
    args = tuple(None if _is_cache(value) else value for value in args)
    kwargs = {k: None if _is_cache(v, k) else v for k, v in kwargs.items()}
    if not torch.compiler.is_compiling():  # traced, a recomputation is a graph and no context
        kwargs["context_fn"] = checkpoint_contexts
    # the hooks see the layer's inputs alone: inside, the checkpoint's own take their place
    with contextlib.nullcontext() if away is None else away.hooks():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_cache(value: object, name: str = "") -> bool:
    return name.startswith("past_key_value") or hasattr(value, "get_seq_length")
