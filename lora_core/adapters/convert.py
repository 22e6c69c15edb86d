r"""Any linear update as a plain LoRA: of another adapter, or of a model that was fine-tuned whole.

    ΔW = U S Vᵀ  ->  B = U_r √S_r,  A = √S_r V_rᵀ,  s = 1

B A is the best rank-r approximation of ΔW in the Frobenius norm (Eckart-Young), and what it misses
is known before anything is built: sqrt(Σ_{i>r} σᵢ²). The report has it by layer. An update that is
a product already (a LoRA of higher rank, with a scaling, with independent parts, on a convolution)
is decomposed from its factors and never becomes a matrix; update.py has both ways.

The rank is given, or the smallest one in each layer whose relative error is at most `error`. Ranks
above what the update has are not padded: rows of zeros in both A and B would never get a gradient.
A layer that does not change gets no LoRA. PEFT's `convert_to_lora` takes a rank or a share of the
energy, linear layers alone, forms every update densely in float32, and reports no error.

Biases are no part of a low-rank matrix: a change of one is refused unless `bias` says what to do.

Ref: Eckart and Young 1936, "The approximation of one matrix by another of lower rank"; Hu et al.
2021, arXiv:2106.09685, section 4.1.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_core.adapters.base import (
    Adapted,
    Adapter,
    adapted_modules,
    dense_weight,
    is_linear,
    spelt,
)
from lora_core.adapters.forms import TransposedForm, form_of
from lora_core.adapters.inject import adapter_names, attach_built, refuse_name
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.adapters.truncate import ConversionReport, truncated
from lora_core.adapters.update import Update, difference, update_of, with_bias
from lora_core.targets import Targets, nearest, select_modules, sites, unwrap

__all__ = ["convert_to_lora", "extract_lora"]

BIASES = ("refuse", "keep", "drop")


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    name: str = "default",
    r: int | None = None,
    new_name: str = "converted",
    *,
    error: float | None = None,
    bias: str = "refuse",
    trainable: bool = True,
) -> ConversionReport:
    """Add a plain LoRA that does what another adapter does, as nearly as its rank allows.

    The other adapter stays in the model, inactive; the new one alone is active.

    Args:
        model: a model with the adapter.
        name: an adapter of any kind that changes weights: DoRA, full copies of layers, trained
            rows, a LoRA of higher rank or with independent parts, a kind of one's own.
        r: the largest rank of a layer's LoRA (with grouped convolutions a multiple of the groups).
        new_name: of the LoRA, new to the model.
        error: instead of r, the largest relative error of a layer; each gets its smallest rank.
        bias: what to do with changed biases: "refuse", "keep" them as `lora_bias`, or "drop".
        trainable: whether the LoRA is trained further.

    Returns:
        Ranks and errors by layer.

    Raises:
        ValueError: an unknown name, or a new one that is taken; neither or both of r and error; an
            adapter that changes no weight, or none of a kind that LoRA knows; a changed bias;
            whatever `add_adapter` refuses. The model is then as it was.
    """
    _check_options(r, error, bias)
    refuse_name(model, new_name)
    updates = {
        site: _update_at(site, name, host)
        for site, host in adapted_modules(model)
        if name in host.adapters
    }
    if not updates:
        raise ValueError(f"no adapter {name!r} in the model; {nearest(name, adapter_names(model))}")
    return _add(model, _Wanted(updates, r, error, bias), new_name, trainable)


@torch.no_grad()
def extract_lora(
    base_model: nn.Module,
    tuned_model: nn.Module,
    r: int | None = None,
    name: str = "default",
    *,
    error: float | None = None,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    bias: str = "refuse",
    trainable: bool = True,
) -> ConversionReport:
    """Add a LoRA to a model that makes it, as nearly as its rank allows, another, tuned one.

    Args:
        base_model: the model before tuning, dense or 4-bit, possibly with adapters in it.
        tuned_model: the model afterwards, with the same modules, without adapters; not changed.
        r: the largest rank of a layer's LoRA.
        name: of the LoRA, new to `base_model`.
        error: instead of r, the largest relative error of a layer; each gets its smallest rank.
        targets: which layers, as for LoRAConfig.
        exclude: which of them to leave out.
        bias: what to do with changed biases of these layers: "refuse", "keep" or "drop".
        trainable: whether the LoRA is trained further.

    Returns:
        Ranks and errors by layer, and what else differs between the two models.

    Raises:
        ValueError: as `convert_to_lora`; a layer that the tuned model has not, or has in another
            shape, or with adapters. The models are then as they were.
    """
    _check_options(r, error, bias)
    refuse_name(base_model, name)
    modules = {site: unwrap(module) for site, module in sites(base_model)}
    tuned = dict(sites(tuned_model))
    names = select_modules(
        base_model,
        targets,
        kind=lambda module: form_of(module) is not None,
        linear=lambda module: is_linear(module) or isinstance(form_of(module), TransposedForm),
        exclude=exclude,
    )
    updates = {site: _between(site, modules[site], tuned) for site in names}
    others = _elsewhere(modules, tuned, set(names))
    return _add(base_model, _Wanted(updates, r, error, bias, others), name, trainable)


def _check_options(r: int | None, error: float | None, bias: str) -> None:
    if (r is None) == (error is None):
        raise ValueError("give either r, a rank, or error, the largest relative error of a layer")
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 1):
        raise ValueError(f"r must be a whole number of at least 1, got {r!r}")
    if error is not None and not 0.0 <= error < 1.0:
        raise ValueError(f"error must be in [0, 1), got {error!r}")
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {bias!r}")


def _update_at(site: str, name: str, host: Adapted) -> Update:
    """The update of an adapter in the model; errors name the module."""
    try:
        return update_of(host.adapter(name), unwrap(host))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} at {spelt(site)} cannot be converted: {error}") from None


def _between(site: str, base: nn.Module, tuned: Mapping[str, nn.Module]) -> Update:
    """The update from a layer to the one of the same name in the tuned model."""
    if site not in tuned:
        raise ValueError(f"the tuned model has no {site!r}; {nearest(site, sorted(tuned))}")
    other = tuned[site]
    if isinstance(other, Adapted):
        raise ValueError(
            f"the tuned model has adapters at {site!r}: call unload_adapters(model, merge=True), "
            "or convert_to_lora on them"
        )
    form, theirs = form_of(base), form_of(other)
    if form != theirs:
        raise ValueError(f"{site!r} is {form} in the base model and {theirs} in the tuned one")
    new, old = dense_weight(other), dense_weight(base)
    update = difference(form, new.to(old.device), old)
    biases = [getattr(module, "bias", None) for module in (other, base)]
    zero = torch.zeros(update.shape[0], dtype=torch.float64, device=old.device)
    new_bias, old_bias = (zero if b is None else b.detach().to(zero) for b in biases)
    return with_bias(update, new_bias - old_bias)


def _elsewhere(
    modules: Mapping[str, nn.Module], tuned: Mapping[str, nn.Module], names: set[str]
) -> tuple[str, ...]:
    """Parameters outside the targets that are not the same in both models."""
    found = [f"{site}.*" for site in tuned if site not in modules]
    for site, module in modules.items():
        theirs = unwrap(tuned[site])._parameters if site in tuned else {}
        for key in dict.fromkeys([*module._parameters, *theirs]) if site not in names else ():
            own, other = module._parameters.get(key), theirs.get(key)
            if own is None and other is None:
                continue
            same = own is not None and other is not None and own.shape == other.shape
            if own is None or other is None or not same or not torch.equal(own, other.to(own)):
                found.append(f"{site}.{key}" if site else key)
    return tuple(found)


# --- from updates to a LoRA ---


@dataclass(frozen=True)
class _Wanted:
    """What to build: updates by module, and the options of the public functions."""

    updates: Mapping[str, Update]
    r: int | None
    error: float | None
    bias: str
    others: tuple[str, ...] = ()


def _add(model: nn.Module, wanted: _Wanted, name: str, trainable: bool) -> ConversionReport:
    """Decompose, build and attach; the model is changed last."""
    modules = {site: unwrap(module) for site, module in sites(model)}
    dropped = _check_biases(wanted, modules)
    keep = wanted.bias == "keep"
    pairs = {
        site: truncated(site, update, wanted.r, wanted.error)
        for site, update in wanted.updates.items()
        if update.norm() != 0 or (keep and update.bias is not None)
    }
    if not pairs:
        raise ValueError("nothing to convert: the update is zero in every layer")
    config = _config({site: pair.entry.rank for site, pair in pairs.items()}, wanted, keep)
    built: dict[str, Adapter] = {}
    for site, pair in pairs.items():
        lora = config.build(site, modules[site])
        assert isinstance(lora, LoRA)
        if pair.down is not None and pair.up is not None:
            lora.start_at(pair.down, pair.up, subtract=False)
        bias = wanted.updates[site].bias
        if lora.up_bias is not None and bias is not None:
            lora.up_bias.copy_(bias)
        built[site] = lora
    attach_built(model, config, name, built, trainable=trainable)
    size = math.hypot(*(pair.size for pair in pairs.values()))
    residue = math.hypot(*(pair.residue for pair in pairs.values()))
    return ConversionReport(
        name,
        tuple(pair.entry for pair in pairs.values()),
        residue / size if size else 0.0,
        tuple(site for site in wanted.updates if site not in pairs),
        (*wanted.others, *dropped),
    )


def _check_biases(wanted: _Wanted, modules: Mapping[str, nn.Module]) -> list[str]:
    """Refuse what the options do not allow; returns the biases that are dropped."""
    changed = [site for site, update in wanted.updates.items() if update.bias is not None]
    for site, update in wanted.updates.items():
        no_form = form_of(modules[site]) is None
        if no_form and (update.norm() != 0 or (site in changed and wanted.bias == "keep")):
            raise ValueError(
                f"{site!r} ({type(modules[site]).__name__}) changes, and is no layer that a LoRA "
                "can be on: linear, embedding or convolution"
            )
    if changed and wanted.bias == "refuse":
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ValueError(
            f"the bias of {spelt(changed[0])}{more} changes, which no low-rank matrix does: "
            "bias='keep' gives the LoRA biases (lora_bias), bias='drop' leaves the change out"
        )
    return [f"{site}.bias" for site in changed] if wanted.bias == "drop" else []


def _config(ranks: Mapping[str, int], wanted: _Wanted, keep: bool) -> LoRAConfig:
    """A configuration whose scaling is 1 in every layer."""
    r = max(ranks.values())
    fewer = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != r}
    return LoRAConfig(
        r=r,
        alpha=r,
        targets=list(ranks),
        rank_pattern=fewer,
        alpha_pattern=dict(fewer),
        lora_bias=keep and any(update.bias is not None for update in wanted.updates.values()),
    )
