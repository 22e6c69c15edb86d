"""Convolutions on disk, where PEFT's pair is another than this library's.

A of a grouped convolution has all channels in PEFT, those of a group here:

    here     (r, C/g, *kernel)    rows of group j see its channels
    on disk  (r, C,   *kernel)    PEFT's shape, zeros at the channels of other groups

What PEFT has trained is not zero there; it is read as a pair that sees all channels
(adapters/mixed_groups.py). And PEFT makes A without the layer's dilation, and pads its input with
zeros whatever the layer's `padding_mode`: other functions, which no file can make equal.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.forms import ConvForm
from lora_core.adapters.lora import LoRA
from lora_core.adapters.mixed_groups import MixedConvForm, mixed_pair
from lora_core.targets import sites, unwrap

__all__ = [
    "as_written",
    "check_padding",
    "from_disk",
    "is_grouped",
    "mixed",
    "unlike_peft",
]

_KEY = "lora_A.weight"


def unlike_peft(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Pairs at convolutions that PEFT computes otherwise.

    Args:
        model: the model.
        adapters: by site.

    Returns:
        {site: what PEFT does}.
    """
    modules = dict(sites(model))
    found = {}
    for site, adapter in adapters.items():
        module = unwrap(modules[site])
        if not isinstance(getattr(adapter, "form", None), ConvForm):
            continue
        if set(getattr(module, "dilation", ())) != {1}:
            found[site] = "PEFT leaves the layer's dilation out of A, and cannot run it"
        elif (mode := getattr(module, "padding_mode", "zeros")) != "zeros":
            found[site] = f"PEFT pads A's input with zeros, where the layer's padding is {mode!r}"
    return found


def check_padding(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Refuse an adapter that PEFT trained as another function; ValueError names the layer."""
    for site, why in unlike_peft(model, adapters).items():
        raise ValueError(f"{why} ({site!r}): such an adapter has no counterpart here")


def is_grouped(adapter: Adapter) -> bool:
    """Whether it is a pair at a grouped convolution, its A grouped too."""
    form = getattr(adapter, "form", None)
    return isinstance(form, ConvForm) and form.groups > 1 and not isinstance(form, MixedConvForm)


def as_written(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's tensors as they lie on disk."""
    tensors = adapter.tensors()
    if isinstance(adapter, LoRA) and is_grouped(adapter):
        tensors[_KEY] = _spread(tensors[_KEY], adapter.form.groups)
    return tensors


def from_disk(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a file, of the shapes of `as_written`, as `Adapter.load` takes them."""
    own = dict(tensors)
    if isinstance(adapter, LoRA) and is_grouped(adapter):
        own[_KEY] = _blocks(own[_KEY], adapter.form.groups)
    return own


def mixed(adapter: Adapter, tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter, or the one of PEFT's form where the file's A sees other groups' channels.

    Args:
        adapter: one just built.
        tensors: its own in the file, of the shapes of `as_written`.

    Returns:
        The adapter to load them into.

    Raises:
        ValueError: a DoRA whose A sees them.
    """
    if not isinstance(adapter, LoRA) or not is_grouped(adapter):
        return adapter
    down = tensors[_KEY]
    if torch.equal(_spread(_blocks(down, adapter.form.groups), adapter.form.groups), down):
        return adapter
    return mixed_pair(adapter, down.shape[1])


def _spread(down: Tensor, groups: int) -> Tensor:
    """(r, C/g, …) -> (r, C, …), zeros elsewhere."""
    blocks = down.chunk(groups)  # (r/g, C/g, …) each
    zeros = [torch.zeros_like(blocks[0])] * groups
    rows = [
        torch.cat([*zeros[:j], block, *zeros[j + 1 :]], dim=1) for j, block in enumerate(blocks)
    ]
    return torch.cat(rows)


def _blocks(down: Tensor, groups: int) -> Tensor:
    """(r, C, …) -> (r, C/g, …): each group's rows at its own channels."""
    pieces = [rows.chunk(groups, dim=1)[j] for j, rows in enumerate(down.chunk(groups))]
    return torch.cat(pieces)
