"""Other weights in an adapter's own tensors, so that nothing around them has to change.

A server that takes one adapter out and puts another in would compile its model again: other
modules, other shapes, another number s. Here the new weights are copied into the tensors that are
there. A pair of smaller rank is padded with zeros, which add nothing; s is a tensor and is set in
place; a layer that the new adapter leaves alone gets B = 0. So `torch.compile` and captured graphs
go on with the new adapter. What does not fit into the tensors that are there is refused.

PEFT needs `prepare_model_for_compiled_hotswap` to be called before compiling, for the ranks and for
scalings that are tensors. Here every pair has room for its own rank: add the adapter with the
largest r that is to come.

Everything is checked and padded first, then copied: an error leaves the adapter as it was.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.biases import TrainedBias
from lora_core.adapters.host import Adapted, adapted_modules
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.adapters.rows import SiteRows

__all__ = ["swap_adapters"]


@torch.no_grad()
def swap_adapters(model: nn.Module, name: str, new: Mapping[str, Adapter]) -> None:
    """Put the weights of other adapters into those of one that is in the model.

    Args:
        model: a model with the adapter.
        name: which.
        new: {module name: adapter} built for the same model; not changed, and not kept.

    Raises:
        ValueError: the layer is merged; another kind, a larger rank, other parts or biases, or a
            module where the adapter is not. The adapter is then as it was.
    """
    hosts = {site: host for site, host in adapted_modules(model) if name in host.adapters}
    for site, host in hosts.items():
        if host.merged is not None:
            raise ValueError(f"swapping while {site!r} is merged: {host.merged.way_back} first")
    if any(isinstance(adapter, LoRA) and adapter.new_base for adapter in new.values()):
        raise ValueError(
            "the new adapter's start (LoftQ) quantizes the base, which is shared: load_adapter it "
            "into a model of its own"
        )
    if more := [site for site in new if site not in hosts]:
        raise ValueError(
            f"the new adapter is at {more[0]!r} too, where {name!r} is not (and {len(more) - 1} "
            "more): load_adapter it under another name"
        )
    values = {site: _values(site, name, host.adapter(name), new) for site, host in hosts.items()}
    for site, host in hosts.items():
        own = host.adapter(name)
        tensors = own.state_dict(keep_vars=True)
        for key, value in values[site].items():
            tensors[key].copy_(value)
        other = new.get(site)
        own.trained_on = own.trained_on if other is None else other.trained_on or own.trained_on
        if isinstance(own, LoRA) and isinstance(other, LoRA):
            own.rescale(other.scaling)
    _describe({site: host.adapter(name) for site, host in hosts.items()})
    _tell(hosts.values())


def _values(site: str, name: str, own: Adapter, new: Mapping[str, Adapter]) -> dict[str, Any]:
    """What goes into an adapter's tensors, of their shapes."""
    other = new.get(site)
    if other is None:
        return _nothing(site, name, own)
    if type(own) is not type(other):
        raise ValueError(
            f"{name!r} is a {type(own).__name__} at {site!r} and the new adapter a "
            f"{type(other).__name__}: load_adapter it under another name"
        )
    if isinstance(own, LoRA) and isinstance(other, LoRA):
        return _pair(site, name, own, other)
    mine, theirs = own.state_dict(), other.state_dict()
    shapes = [{key: tuple(p.shape) for key, p in found.items()} for found in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name!r} holds {shapes[0]} at {site!r} and the new adapter {shapes[1]}: tensors of "
            "other shapes cannot be swapped; load_adapter it under another name"
        )
    beside = dict(other.named_buffers())
    if not all(torch.equal(t.cpu(), beside[key].cpu()) for key, t in own.named_buffers()):
        raise ValueError(
            f"the new adapter is at other places of {site!r} than {name!r}, as other token ids "
            "are: load_adapter it under another name"
        )
    return theirs


def _nothing(site: str, name: str, own: Adapter) -> dict[str, Any]:
    """The values with which an adapter changes nothing."""
    if type(own) is LoRA:
        return _zeros(own)
    if type(own) is TrainedBias:
        return {"bias": own.bias0}
    raise ValueError(
        f"the new adapter leaves {site!r} alone, where {name!r} is a {type(own).__name__}, which "
        "has no weights that change nothing: load_adapter it under another name"
    )


def _zeros(own: LoRA) -> dict[str, Any]:
    """The values with which a pair adds nothing."""
    tensors = {"A": own.A, "B": own.B, "A0": own.A0, "B0": own.B0, "up_bias": own.up_bias}
    found: dict[str, Any] = {k: torch.zeros_like(t) for k, t in tensors.items() if t is not None}
    return found if own.bias is None else {**found, "bias": own.bias0}


def _pair(site: str, name: str, own: LoRA, other: LoRA) -> dict[str, Any]:
    """The values of a pair, padded to the rank of the own one."""
    if own.form != other.form or own.parts != other.parts:
        raise ValueError(
            f"the new adapter's pair at {site!r} has another form than that of {name!r} (parts "
            f"{list(other.parts)}, not {list(own.parts)}): load_adapter it under another name"
        )
    if other.r > own.r:
        raise ValueError(
            f"the new adapter has rank {other.r} at {site!r}, and {name!r} room for {own.r}: "
            f"add_adapter with r={other.r} before compiling, or load_adapter it under another name"
        )
    beside = {"a start that is subtracted": (own.A0, other.A0)}
    beside |= {"a trained bias": (own.bias, other.bias), "lora_bias": (own.up_bias, other.up_bias)}
    for what, (mine, theirs) in beside.items():
        if theirs is not None and mine is None:
            raise ValueError(
                f"the new adapter has {what} at {site!r}, and {name!r} has no room for it: "
                "load_adapter it under another name"
            )
    values = _zeros(own)
    blocks, columns = max(own.form.groups, len(own.parts), 1), own.form.in_features
    for down, up in (("A", "B"), ("A0", "B0")):
        if getattr(other, down) is not None:
            values[down] = _padded(getattr(other, down).view(blocks, -1, columns), own.r, own)
            missing = (own.r - other.r) // own.form.groups
            values[up] = F.pad(getattr(other, up).detach(), (0, missing))
    for key, tensor in other.named_parameters():
        if key not in ("A", "B"):
            values[key] = tensor.detach()
    return values


def _padded(down: Tensor, r: int, own: LoRA) -> Tensor:
    """A (blocks, r', K) with rows of zeros in each block."""
    wanted = r // own.form.groups
    return F.pad(down.detach(), (0, 0, 0, wanted - down.shape[1])).flatten(0, 1)


def _describe(adapters: Mapping[str, Adapter]) -> None:
    """Write the new scalings into the configuration, which is saved with the adapter."""
    config = next(iter(adapters.values())).config
    if not isinstance(config, LoRAConfig):
        return
    alphas = {site: pair.alpha for site, pair in adapters.items() if isinstance(pair, LoRA)}
    if not alphas:
        return
    same = len(set(alphas.values())) == 1
    patterns = {} if same else {f"^{re.escape(site)}": alpha for site, alpha in alphas.items()}
    alpha = next(iter(alphas.values())) if same else config.alpha
    new = dataclasses.replace(config, alpha=alpha, alpha_pattern=patterns)
    for adapter in adapters.values():
        adapter.config = new


def _tell(hosts: Any) -> None:
    """Let rows that name the adapter see its new weights."""
    for host in hosts:
        if isinstance(host, Adapted) and isinstance(host.mixture, SiteRows):
            host.mixture.refresh()
