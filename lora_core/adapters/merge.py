"""Merging: the adapted layer as one dense weight, and back.

    W' = round(W + s·B A)        added in float32 (float64 for a float64 base), rounded once

A merged host calls a second module that holds W'; the base is never written, so unmerging restores
the model bit for bit. PEFT adds into the weight and subtracts again, which in bfloat16 leaves
about one weight in five changed, and rounds twice with a bfloat16 base.

A 4-bit base is merged into a dense weight: the dequantized W, which is what the adapter was trained
on, plus the update. `requantize=True` quantizes W' again; an update smaller than the quantization
step mostly vanishes then, and the report says how much of it is left in each layer.

Every function computes all layers first and changes the model last: an error changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.base import (
    Adapted,
    Merged,
    adapted_modules,
    compute_dtype,
    dense_weight,
    is_linear,
    spelt,
)
from lora_core.adapters.inject import replace_modules, tell
from lora_core.quant import NF4Linear
from lora_core.targets import nearest

__all__ = [
    "DenseLinear",
    "LayerMerge",
    "MergeReport",
    "merge_adapters",
    "unload_adapters",
    "unmerge_adapters",
]


@dataclass(frozen=True)
class LayerMerge:
    """What merging did to one layer's update Δ = W' - W, given the stored W'.

    Attributes:
        name: the module.
        kept: share of Δ in the stored weight, <stored - W, Δ> / <Δ, Δ>; 1 is all of it.
        error: |stored - W - Δ| / |Δ|, Frobenius norms; 0 is exact.
        requantized: whether the stored weight is 4-bit.
    """

    name: str
    kept: float
    error: float
    requantized: bool


@dataclass(frozen=True)
class MergeReport:
    """What merging did; `print` it.

    Attributes:
        layers: one entry a layer.
    """

    layers: tuple[LayerMerge, ...]

    def __str__(self) -> str:
        four_bit = sum(layer.requantized for layer in self.layers)
        kept = [layer.kept for layer in self.layers]
        lines = [
            f"merged {len(self.layers)} layers, {four_bit} of them requantized to 4 bits",
            f"of the update {min(kept):.1%} to {max(kept):.1%} is in the stored weights",
        ]
        lines += [
            f"  {layer.name}: {layer.kept:.1%} of the update kept, error {layer.error:.1%} of it"
            for layer in self.layers
            if layer.requantized
        ]
        return "\n".join(lines)


@torch.no_grad()
def merge_adapters(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
    keep_base: bool = True,
) -> MergeReport:
    """Fold active adapters into dense weights, so that the model runs without them.

    Args:
        model: a model with adapters (or one host).
        names: active adapters to fold; None: all that are active.
        dtype: of the merged weights; None: the base weight's (for a 4-bit base its bias's, or that
            of the model's other weights).
        requantize: quantize the merged weight of a 4-bit base again, in its own format.
        keep_base: keep the base beside it; False frees it, and unmerging is refused from then on.

    Returns:
        How much of each layer's update is in the stored weight.

    Raises:
        ValueError: nothing to merge, merged already, a kind that cannot be merged, an inactive
            name, an overflow, or requantize without a 4-bit base. The model is then as it was.
        TypeError: `dtype` is not a floating-point dtype.
    """
    hosts = list(adapted_modules(model))
    for name, host in hosts:
        if host.merged is not None:
            raise ValueError(f"{spelt(name)} is merged already: {host.merged.way_back} first")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"a merged weight needs a floating-point dtype, got {dtype}")
    chosen = _chosen(hosts, [names] if isinstance(names, str) else names)
    if requantize and not any(isinstance(host.base, NF4Linear) for _, host, _ in chosen):
        raise ValueError("requantize=True, but none of the layers to merge has a 4-bit base")
    done = [
        _merged_module(name, host, some, dtype or _default_dtype(model, host.base), requantize)
        for name, host, some in chosen
    ]
    _tie_alike([host.base for _, host, _ in chosen], [module for module, _ in done])
    for (_, host, some), (module, _) in zip(chosen, done, strict=True):
        host.merged = Merged(tuple(some), module if keep_base else None)
        if not keep_base:
            host.base = module
    return MergeReport(tuple(layer for _, layer in done))


def unmerge_adapters(model: nn.Module) -> None:
    """Drop the merged weights; the model is bit for bit what it was before merging.

    Args:
        model: a model (or one host) that `merge_adapters` merged.

    Raises:
        ValueError: nothing is merged, or the base was not kept.
    """
    merged = [(name, host) for name, host in adapted_modules(model) if host.merged is not None]
    if not merged:
        raise ValueError("nothing is merged")
    for name, host in merged:
        if host.merged is not None and host.merged.module is None:
            raise ValueError(
                f"{spelt(name)} was merged with keep_base=False: there is nothing to go back to; "
                "load the base model again"
            )
    for _, host in merged:
        host.merged = None


@torch.no_grad()
def unload_adapters(model: nn.Module, merge: bool = False) -> None:
    """Take all adapters out: every host is replaced by a plain module.

    Args:
        model: a model with adapters.
        merge: put the merged modules in place (merging the active adapters first where that has
            not been done); else the bases, which with keep_base=False are the merged modules.

    Raises:
        ValueError: the model is itself a host, or an adapter that cannot be merged, or a layer
            merged in part. The model is then as it was.
    """
    if isinstance(model, Adapted):
        raise ValueError("the model is itself a host and cannot replace itself: use its .base")
    hosts = list(adapted_modules(model))
    plain: dict[int, nn.Module] = {}
    for name, host in hosts:
        if host.merged is None and merge and host.active:
            dtype = _default_dtype(model, host.base)
            plain[id(host)], _ = _merged_module(name, host, host.active, dtype, False)
        elif host.merged is not None and merge:
            if set(host.active) - set(host.merged.names):
                raise ValueError(f"{name!r} is merged in part: call unmerge_adapters first")
            plain[id(host)] = host.merged.module or host.base
        else:
            plain[id(host)] = host.base
    _tie_alike([host.base for _, host in hosts], [plain[id(host)] for _, host in hosts])
    gone = [adapter.config for _, host in hosts for adapter in host.adapters.values()]
    replace_modules(model, plain)
    tell(model, "removed", gone)


def _chosen(
    hosts: list[tuple[str, Adapted]], names: Sequence[str] | None
) -> list[tuple[str, Adapted, list[str]]]:
    """(name, host, adapters to merge) for every host with something to merge."""
    known = list(dict.fromkeys(name for _, host in hosts for name in host.adapters))
    for name in names or ():
        if name not in known:
            raise ValueError(f"no adapter {name!r} in the model; {nearest(name, known)}")
    chosen = []
    for site, host in hosts:
        some = [name for name in host.active if names is None or name in names]
        if idle := [name for name in names or () if name in host.adapters and name not in some]:
            raise ValueError(
                f"the adapter {idle[0]!r} is not active at {site!r}, and merging must not change "
                "the output: call set_adapters first"
            )
        if some != host.active[: len(some)] and not all(
            host.adapter(name).additive for name in host.active
        ):
            raise ValueError(f"{host.active} apply in this order at {site!r}: merge from the first")
        if some:
            chosen.append((site, host, some))
    if not chosen:
        raise ValueError("no adapter is active: there is nothing to merge")
    return chosen


def _merged_module(
    name: str, host: Adapted, names: Sequence[str], dtype: torch.dtype, requantize: bool
) -> tuple[nn.Module, LayerMerge]:
    """The dense (or again 4-bit) module that gives the host's output, and what it kept."""
    base = host.base
    for adapter_name in names:
        if (reason := host.adapter(adapter_name).unmergeable) is not None:
            raise ValueError(f"the adapter {adapter_name!r} at {name!r} cannot be merged: {reason}")
    old = dense_weight(base)
    old_bias = getattr(base, "bias", None)
    bias = None if old_bias is None else old_bias.detach().to(old.dtype)
    with torch.autocast(old.device.type, enabled=False):
        weight = old
        for adapter_name in names:
            weight, bias = host.adapter(adapter_name).merged(weight, bias)
    if weight.shape != old.shape:
        raise ValueError(
            f"merging at {name!r} made a weight of shape {tuple(weight.shape)} out of one of shape "
            f"{tuple(old.shape)}"
        )
    requantized = requantize and isinstance(base, NF4Linear)
    # the check comes before quantizing, which would refuse with a message about weights
    stored = weight if requantized else weight.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"the merged weight of {name!r} is not finite in {stored.dtype}: the adapter holds NaN "
            "or infinity, or the dtype is too narrow"
        )
    module = _module(base, stored, None if bias is None else bias.to(dtype), requantized)
    return module, _kept(name, dense_weight(module) - old, weight - old, requantized)


def _module(base: nn.Module, weight: Tensor, bias: Tensor | None, requantize: bool) -> nn.Module:
    """A module like the base, with another weight and bias."""
    if requantize and isinstance(base, NF4Linear):
        made = NF4Linear.from_tensor(
            weight,
            bias,
            code=base.codebook,
            block_size=base.block_size,
            double_quant=base.double_quant,
        )
        return made.train(base.training)
    own = base._parameters.get("weight")
    if own is None or (is_linear(base) and own.dtype != weight.dtype):
        return DenseLinear(weight, bias).train(base.training)
    # the same class with the same settings, hooks and submodules; only the parameters differ
    twin = base.__class__.__new__(base.__class__)
    twin.__dict__.update(base.__dict__)
    twin._parameters = dict(base._parameters)
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if bias is not None or "bias" in base._parameters:
        twin._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return twin


class DenseLinear(nn.Linear):
    """An nn.Linear that computes in x's dtype (autocast's when active), as NF4Linear does.

    Args:
        weight: (N, K).
        bias: (N,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, (…, N) in x's dtype."""
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def _kept(name: str, stored: Tensor, wanted: Tensor, requantized: bool) -> LayerMerge:
    """Compare the update that is in the stored weight with the one that was wanted."""
    size = float(wanted.norm())
    if size == 0.0:
        return LayerMerge(name, 1.0, 0.0, requantized)
    kept = float((stored * wanted).sum()) / size**2
    return LayerMerge(name, kept, float((stored - wanted).norm()) / size, requantized)


def _default_dtype(model: nn.Module, base: nn.Module) -> torch.dtype:
    """The base's own dtype; for a 4-bit base its bias's, else that of the model's other weights."""
    adapters = {id(p) for _, h in adapted_modules(model) for p in h.adapters.parameters()}
    others = (p for p in model.parameters() if id(p) not in adapters)
    for tensor in (getattr(base, "weight", None), getattr(base, "bias", None), *others):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _tie_alike(bases: Sequence[nn.Module], modules: Sequence[nn.Module]) -> None:
    """Let modules whose bases shared a weight share the merged one, where it is the same."""
    first: dict[int, nn.Module] = {}
    for base, module in zip(bases, modules, strict=True):
        shared, weight = base._parameters.get("weight"), module._parameters.get("weight")
        if shared is None or weight is None or module is base:
            continue
        twin = first.setdefault(id(shared), module)
        same = twin._parameters["weight"]
        if twin is not module and same is not None and torch.equal(same, weight):
            module._parameters["weight"] = same
