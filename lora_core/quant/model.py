"""Quantize the linear layers of a model in place, and put dense ones back.

The walk goes by identity: a layer that hangs in several places, or inside an adapter's host, is
replaced in all of them by one new layer. Weights are checked before the first layer is replaced, so
a bad one leaves the model as it was, and each dense weight is freed before the next is quantized.
The check is a bound of each weight, and the bounds of a device are read all at once: a GPU is
waited for once a model and not once a weight.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.quant.codebook import Codebook, codebook
from lora_core.quant.dense import can_be_4bit, is_4bit, made_4bit, made_dense, weights
from lora_core.quant.nf4 import quantize_4bit
from lora_core.targets import (
    Targets,
    in_head,
    output_head_name,
    select_modules,
    sites,
    unwrap,
)
from lora_kernels.blockwise4 import check_block_size
from lora_kernels.expand4 import FLOATS

__all__ = ["QuantizeReport", "dequantize_model", "quantize_model"]


LARGEST = 3e38  # float32 ends at 3.4e38; the rest is room for the roundings of a sum


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_model` did; `str()` of it is a few lines for the user."""

    modules: tuple[str, ...]
    """names of the layers that are 4-bit now"""
    kept: dict[str, str]
    """names of the linear layers that stay dense, and why"""
    bytes_before: int
    """parameters and buffers of the whole model, shared memory once"""
    bytes_after: int
    """the same afterwards"""

    def __str__(self) -> str:
        lines = [
            f"{len(self.modules)} linear layers are 4-bit now",
            f"the model: {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB",
            *(f"kept dense: {name} ({why})" for name, why in self.kept.items()),
        ]
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    skip: Targets | None = None,
    *,
    code: str | Tensor | Codebook = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> QuantizeReport:
    """Replace the linear layers of a model by 4-bit ones, in place, one after the other.

    Experts, many matrices in one module, become 4-bit too, each matrix by itself. Kept dense are
    the output head, what `skip` matches, routers, and layers whose weight another module shares:
    two 4-bit copies, or a 4-bit and a dense one, would not be tied any more. Of linear layers only
    modules of the very class `nn.Linear` are replaced; a subclass may use its weight its own way.
    All weights are checked before the first is replaced.

    Args:
        model: any module. Linear layers inside hosts (adapters) are reached too.
        skip: list of names or suffixes, regular expression, or predicate (name, module).
        code: as `NF4Linear`'s.
        block_size: as `NF4Linear`'s.
        double_quant: as `NF4Linear`'s.

    Returns:
        The report.

    Raises:
        ValueError: nothing to quantize, a pattern of `skip` that matches nothing, NaN or infinity
            in a weight (with its name), or a bad option. The model is left as it was.
    """
    book = codebook(code)
    check_block_size(block_size)
    kept = _kept(model, skip)
    linears = _linears(model)
    chosen = {name: module for name, module in linears.items() if name not in kept}
    if not chosen:
        raise ValueError(_nothing(model, kept))
    options: dict[str, Any] = {"code": book, "block_size": block_size, "double_quant": double_quant}
    _check({k: w for name, m in chosen.items() for k, w in weights(name, m).items()}, options)
    before = _nbytes(model)
    holders = _holders(model)
    names = tuple(chosen)
    linears.clear()
    while chosen:  # emptied on the way, so that each dense weight is freed before the next
        _, module = chosen.popitem()
        layer = made_4bit(module, options)
        for parent, attribute in holders[id(module)]:
            setattr(parent, attribute, layer)
    return QuantizeReport(names, kept, before, _nbytes(model))


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Replace every `NF4Linear` by a dense, frozen `nn.Linear`, in place (experts likewise).

    The dense weights are what the codes stand for, not the weights that were quantized.

    Args:
        model: any module.
        dtype: of the dense weights; default the bias's, and float32 without one.

    Returns:
        Names of the layers that are dense now, in module order; empty if none was 4-bit.
    """
    holders = _holders(model)
    layers = {id(m): (name, m) for name, m in _named(model) if is_4bit(m)}
    for key, (_, layer) in layers.items():
        dense = made_dense(layer, dtype)
        for parent, attribute in holders[key]:
            setattr(parent, attribute, dense)
    return [name for name, _ in layers.values()]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside any hosts with their first names; the model itself has none."""
    seen: set[int] = set()
    for name, host in sites(model):
        module = unwrap(host)
        if name and id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every plain linear layer and module of stacked matrices by its first name."""
    return {name: module for name, module in _named(model) if can_be_4bit(module)}


def _kept(model: nn.Module, skip: Targets | None) -> dict[str, str]:
    """The linear layers that stay dense, and why."""
    kept: dict[str, str] = {}
    linears = _linears(model)
    if skip is not None and skip != []:
        chosen = select_modules(model, skip, kind=can_be_4bit, option="skip")
        kept |= dict.fromkeys(chosen, "skipped")
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    for name, linear in linears.items():
        if any(owners[id(weight)] > 1 for weight in weights(name, linear).values()):
            kept.setdefault(name, "its weight is shared with another module")
    head = output_head_name(model)
    for name in linears:
        if in_head(name, head):
            kept.setdefault(name, "the output head")
    # a layer whose class says that it has to stay dense is told of too
    own = {name: getattr(module, "why_dense", None) for name, module in _named(model)}
    kept = {name: kept[name] for name in linears if name in kept}
    return kept | {name: why for name, why in own.items() if isinstance(why, str)}


def _nothing(model: nn.Module, kept: dict[str, str]) -> str:
    done = sum(is_4bit(module) for module in model.modules())
    if done:
        return f"the model is quantized already: {done} layers are 4-bit and no other is left to do"
    if kept:
        listed = ", ".join(f"{name} ({why})" for name, why in list(kept.items())[:5])
        return f"nothing to quantize: every linear layer is kept dense: {listed}"
    return "nothing to quantize: no nn.Linear inside; for one layer use NF4Linear.from_linear"


def _check(weights: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Refuse weights that cannot be quantized, without a copy of any and with one read a device.

    A weight is fine if its largest magnitude, times the number of scales that double quantization
    adds up, is within float32. Any other is quantized for the message, if there is one.
    """
    bounds: dict[torch.device, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to quantize")
        if weight.dtype not in FLOATS:
            quantize_4bit(weight, **options, name=name)  # refuses it
        if weight.numel():
            largest = torch.stack(weight.detach().aminmax()).abs().amax().double()
            scales = -(-weight.numel() // options["block_size"])
            bounds.setdefault(weight.device, {})[name] = largest * scales
    for device_bounds in bounds.values():
        values = torch.stack(list(device_bounds.values())).tolist()
        for name, bound in zip(device_bounds, values, strict=True):
            if not bound < LARGEST:
                quantize_4bit(weights[name], **options, name=name)


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module hangs: the parents and the attributes that hold it, by its identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, attribute))
    return found


def _nbytes(model: nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
