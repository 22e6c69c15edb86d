"""Merging: adapters folded into the layers they are at, and back.

    W' = round(W + s·B A)        added in float32 (float64 for a float64 base), rounded once

A merged host calls a second module that holds W'; the base is never written, so unmerging restores
the model bit for bit. PEFT adds into the weight and subtracts again, which in bfloat16 leaves
about one weight in five changed, and rounds twice with a bfloat16 base.

A 4-bit base is merged into a dense weight: the dequantized W, which is what the adapter was trained
on, plus the update. `requantize=True` makes it 4-bit again, where an update smaller than the
quantization step mostly vanishes; with `samples` the codes are chosen so that the layer's outputs
come out right all the same, as far as the format allows (lora_core.quant.compensate), and the
report says how far that is.

Every function computes all layers first and changes the model last: an error changes nothing.
What is where: merge_layer.py makes one merged layer, merge_samples.py runs the samples,
merge_report.py tells the outcome.

Ref: Hu et al. 2021, arXiv:2106.09685, section 4.1 (merging); Frantar et al. 2022,
arXiv:2210.17323 (compensated rounding).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_core.adapters.host import Adapted, Merged, adapted_modules, spelt
from lora_core.adapters.inject import replace_modules, tell
from lora_core.adapters.layers import precision_of
from lora_core.adapters.merge_layer import (
    DenseLinear,
    MergedLayer,
    check_mergeable,
    merged_layer,
)
from lora_core.adapters.merge_report import LayerMerge, MergeReport, precision_warnings
from lora_core.adapters.merge_samples import check_samples, gather, groups, model_output_error
from lora_core.adapters.switch import refuse_rows
from lora_core.quant import NF4Linear, is_4bit
from lora_core.targets import nearest, sites, unwrap

__all__ = [
    "DenseLinear",
    "LayerMerge",
    "MergeReport",
    "merge_adapters",
    "unload_adapters",
    "unmerge_adapters",
]

METHODS = ("compensated", "plain")
Chosen: TypeAlias = list[tuple[str, Adapted, list[str]]]


@torch.no_grad()
def merge_adapters(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    dtype: torch.dtype | None = None,
    requantize: bool = False,
    keep_base: bool = True,
    *,
    samples: Iterable[Any] | None = None,
    method: str | None = None,
) -> MergeReport:
    """Fold active adapters into the layers' weights, so that the model runs without them.

    Args:
        model: a model with adapters (or one host).
        names: active adapters to fold; None: all that are active.
        dtype: of the merged weights; None: the base weight's (for a 4-bit base its bias's, or that
            of the model's other weights).
        requantize: quantize the merged weight of a 4-bit base again, in its own format.
        keep_base: keep the base beside it; False frees it, and unmerging is refused from then on.
        samples: batches that the model is run on in evaluation mode, each a tensor, a tuple of
            arguments or a dict of them. Output errors are then measured, on a quarter of the rows.
        method: of requantizing: "compensated" chooses codes by the other three quarters of the
            rows so that outputs come out right; "plain" rounds entry by entry. None: compensated
            where there are samples.

    Returns:
        How much of each layer's update is in the stored weight, and warnings.

    Raises:
        ValueError: nothing to merge, merged already, a kind that cannot be merged, an inactive
            name, an overflow, a tie that would break, requantize without a 4-bit base, or a method
            that does not go with the rest. The model is then as it was.
        TypeError: `dtype` is not a floating-point dtype, or `samples` are no batches.
    """
    refuse_rows(model, "merging")
    hosts = list(adapted_modules(model))
    for name, host in hosts:
        if host.merged is not None:
            raise ValueError(f"{spelt(name)} is merged already: {host.merged.way_back} first")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"a merged weight needs a floating-point dtype, got {dtype}")
    chosen = _chosen(hosts, [names] if isinstance(names, str) else names)
    if requantize and not any(is_4bit(host.base) for _, host, _ in chosen):
        raise ValueError("requantize=True, but none of the layers to merge has a 4-bit base")
    batches = None if samples is None else check_samples(samples)
    way = _method(requantize, method, batches is not None)
    for site, host, some in chosen:
        check_mergeable(site, host, some)
    done = _merged_layers(model, chosen, dtype, way, batches)
    _refuse_torn_ties(model, [(s, h.base, d.module) for (s, h, _), d in _paired(chosen, done)])
    error = None
    if batches is not None:
        plan = [(h, tuple(some), d.module) for (_, h, some), d in _paired(chosen, done)]
        error = model_output_error(model, plan, batches)
    _tie_alike([host.base for _, host, _ in chosen], [layer.module for layer in done])
    report = MergeReport(tuple(d.report for d in done), _warnings(chosen, done), error)
    for (_, host, some), layer in _paired(chosen, done):
        host.merged = Merged(tuple(some), layer.module if keep_base else None)
        if not keep_base:
            host.base = layer.module
    return report


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
        ValueError: the model is itself a host, or an adapter that cannot be merged, a tie that
            would break, or a layer merged in part. The model is then as it was.
    """
    if isinstance(model, Adapted):
        raise ValueError("the model is itself a host and cannot replace itself: use its .base")
    refuse_rows(model, "taking adapters out")
    hosts = list(adapted_modules(model))
    plain: dict[int, nn.Module] = {}
    for name, host in hosts:
        if host.merged is None and merge and host.active:
            check_mergeable(name, host, host.active)
            dtype = _default_dtype(model, host.base)
            plain[id(host)] = merged_layer(name, host, host.active, dtype).module
        elif host.merged is not None and merge:
            if set(host.active) - set(host.merged.names):
                raise ValueError(f"{name!r} is merged in part: call unmerge_adapters first")
            plain[id(host)] = host.merged.module or host.base
        else:
            plain[id(host)] = host.base
    if merge:
        _refuse_torn_ties(model, [(name, host.base, plain[id(host)]) for name, host in hosts])
    _tie_alike([host.base for _, host in hosts], [plain[id(host)] for _, host in hosts])
    gone = [adapter.config for _, host in hosts for adapter in host.adapters.values()]
    replace_modules(model, plain)
    tell(model, "removed", gone)


def _chosen(hosts: list[tuple[str, Adapted]], names: Sequence[str] | None) -> Chosen:
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


def _method(requantize: bool, method: str | None, samples: bool) -> str:
    """How 4-bit layers are merged: "dense", "plain" or "compensated"."""
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method is not None and not requantize:
        raise ValueError(f"method={method!r} is a way to requantize: it needs requantize=True")
    if method == "compensated" and not samples:
        raise ValueError(
            "method='compensated' chooses codes by the layers' inputs: it needs samples"
        )
    if not requantize:
        return "dense"
    return method or ("compensated" if samples else "plain")


def _paired(
    chosen: Chosen, done: list[MergedLayer]
) -> list[tuple[tuple[str, Adapted, list[str]], MergedLayer]]:
    return list(zip(chosen, done, strict=True))


def _merged_layers(
    model: nn.Module,
    chosen: Chosen,
    dtype: torch.dtype | None,
    method: str,
    batches: list[Any] | None,
) -> list[MergedLayer]:
    """Every merged layer, in order; those of linear layers group by group as moments allow."""
    made: dict[int, MergedLayer] = {}
    at = {id(host): (site, host, some) for site, host, some in chosen}
    measured = [] if batches is None else list(groups([host for _, host, _ in chosen]))
    for group in measured:
        moments = gather(model, group, batches or [])
        for host in group:
            site, _, some = at[id(host)]
            own = moments.pop(id(host), None)  # freed layer by layer
            if own is not None and own.rows == 0:
                raise ValueError(
                    f"the samples hold too few rows at {spelt(site)} to hold some out: give "
                    "batches of at least two rows"
                )
            to = dtype or _default_dtype(model, host.base)
            made[id(host)] = merged_layer(site, host, some, to, method, own)
    for site, host, some in chosen:
        if id(host) not in made:
            to = dtype or _default_dtype(model, host.base)
            made[id(host)] = merged_layer(site, host, some, to, method)
    return [made[id(host)] for _, host, _ in chosen]


def _warnings(chosen: Chosen, done: list[MergedLayer]) -> tuple[str, ...]:
    """What the user should know: another precision, an update that was lost."""
    onto = [
        (name, host.adapter(name).trained_on, precision_of(host.base))
        for _, host, some in chosen
        for name in some
    ]
    lines = list(precision_warnings(onto))
    lost = [d.report for d in done if d.report.method == "unchanged"]
    if lost:
        lines.append(
            f"at {len(lost)} layers nothing was nearer to the update than the base's own codes, "
            "which were kept: the update is lost there"
        )
    poor = [r for d in done if (r := d.report).requantized and (r.output_error or r.error) > 0.5]
    if poor:
        lines.append(
            f"more than half of the update's effect is missing at {len(poor)} of "
            f"{len(done)} layers: merge without requantize, or leave the adapter unmerged"
        )
    return tuple(lines)


def _default_dtype(model: nn.Module, base: nn.Module) -> torch.dtype:
    """The base's own dtype; for a 4-bit base its bias's, else that of the model's other weights."""
    adapters = {id(p) for _, h in adapted_modules(model) for p in h.adapters.parameters()}
    others = (p for p in model.parameters() if id(p) not in adapters)
    own = [getattr(base, "weight", None), getattr(base, "bias", None)]
    inside = () if isinstance(base, NF4Linear) else base.parameters()
    for tensor in (*own, *inside, *others):
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


def _refuse_torn_ties(model: nn.Module, plan: list[tuple[str, nn.Module, nn.Module]]) -> None:
    """Refuse merged modules that would differ where their bases share one parameter.

    The configuration would go on saying that the weights are tied, and saving would write one of
    them for both.
    """
    new = _replacements(plan)
    for parameter, slots in _holders(model):
        first, *others = [new.get(slot, parameter) for slot in slots]
        if not all(_same(first, other) for other in others):
            one, two, *_ = slots.values()
            raise ValueError(
                f"the weights of {one!r} and {two!r} are tied, and merging would change them "
                "differently: add the adapter with untie=True, or to both"
            )


Slot: TypeAlias = tuple[int, str]


def _replacements(plan: list[tuple[str, nn.Module, nn.Module]]) -> dict[Slot, Tensor | None]:
    """What merging puts in the place of each parameter: by its module's identity and its key."""
    new: dict[Slot, Tensor | None] = {}
    for _, base, module in plan:
        parts = dict(module.named_modules())
        for path, part in base.named_modules():
            for key in part._parameters if path in parts else ():
                new[id(part), key] = parts[path]._parameters.get(key)
    return new


def _holders(model: nn.Module) -> Iterator[tuple[Tensor, dict[Slot, str]]]:
    """Every parameter, and the modules that hold it with their names."""
    holders: dict[int, tuple[Tensor, dict[Slot, str]]] = {}
    for name, site in sites(model):
        part = unwrap(site)
        for key, parameter in part._parameters.items():
            if parameter is not None:
                _, slots = holders.setdefault(id(parameter), (parameter, {}))
                slots.setdefault((id(part), key), name)
    yield from holders.values()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)
