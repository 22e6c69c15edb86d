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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.forms import TransposedForm, form_of
from lora_core.adapters.host import Adapted, adapted_modules, spelt
from lora_core.adapters.inject import attach_built, refuse_name
from lora_core.adapters.layers import dense_weight, is_linear
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig, config_of_ranks
from lora_core.adapters.switch import adapter_names
from lora_core.adapters.truncate import ConversionReport, Factors, truncated
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
    found = {site: host for site, host in adapted_modules(model) if name in host.adapters}
    if not found:
        raise ValueError(f"no adapter {name!r} in the model; {nearest(name, adapter_names(model))}")
    updates = ((site, _update_at(site, name, host)) for site, host in found.items())
    return _add(model, updates, _Options(r, error, bias), new_name, trainable)


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
    for site in names:
        _check_pair(site, modules[site], tuned)
    updates = ((site, _between(modules[site], tuned[site])) for site in names)
    others = _elsewhere(modules, tuned, set(names))
    return _add(base_model, updates, _Options(r, error, bias), name, trainable, others)


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


def _check_pair(site: str, base: nn.Module, tuned: Mapping[str, nn.Module]) -> None:
    """Refuse a layer that has no counterpart in the tuned model."""
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


def _between(base: nn.Module, other: nn.Module) -> Update:
    """The update from a layer to its counterpart."""
    new, old = dense_weight(other), dense_weight(base)
    update = difference(form_of(base), new.to(old.device), old)
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
class _Options:
    """What the public functions were asked for."""

    r: int | None
    error: float | None
    bias: str


def _add(
    model: nn.Module,
    updates: Iterable[tuple[str, Update]],
    options: _Options,
    name: str,
    trainable: bool,
    others: tuple[str, ...] = (),
) -> ConversionReport:
    """Decompose one layer's update after the other, then build and attach; nothing before that."""
    modules = {site: unwrap(module) for site, module in sites(model)}
    pairs: dict[str, Factors] = {}
    biases: dict[str, Tensor] = {}
    unchanged, dropped = [], list(others)
    for site, update in updates:
        change = _kept_bias(site, update, options.bias)
        if update.bias is not None and change is None:
            dropped.append(f"{site}.bias")
        if update.norm() == 0 and change is None:
            unchanged.append(site)
            continue
        if form_of(modules[site]) is None:
            raise ValueError(
                f"{site!r} ({type(modules[site]).__name__}) changes, and is no layer that a LoRA "
                "can be on: linear, embedding or convolution"
            )
        pairs[site] = truncated(site, update, options.r, options.error)
        if change is not None:
            biases[site] = change
    if not pairs:
        raise ValueError("nothing to convert: the update is zero in every layer")
    ranks = {site: pair.entry.rank for site, pair in pairs.items()}
    config = config_of_ranks(ranks, lora_bias=bool(biases))
    built = {
        site: _lora(config, site, modules[site], pair, biases.get(site))
        for site, pair in pairs.items()
    }
    attach_built(model, config, name, built, trainable=trainable)
    size = math.hypot(*(pair.size for pair in pairs.values()))
    residue = math.hypot(*(pair.residue for pair in pairs.values()))
    return ConversionReport(
        name,
        tuple(pair.entry for pair in pairs.values()),
        residue / size if size else 0.0,
        tuple(unchanged),
        tuple(dropped),
    )


def _kept_bias(site: str, update: Update, bias: str) -> Tensor | None:
    """The change of a bias that the LoRA is to have, or None; ValueError where it is refused."""
    if update.bias is not None and bias == "refuse":
        raise ValueError(
            f"the bias of {spelt(site)} changes, which no low-rank matrix does: bias='keep' gives "
            "the LoRA biases (lora_bias), bias='drop' leaves such changes out"
        )
    return update.bias if bias == "keep" else None


def _lora(
    config: LoRAConfig, site: str, module: nn.Module, pair: Factors, bias: Tensor | None
) -> Adapter:
    """One layer's LoRA with these factors; without factors as it starts, B = 0."""
    lora = config.build(site, module)
    assert isinstance(lora, LoRA)
    if pair.down is not None and pair.up is not None:
        lora.start_at(pair.down, pair.up, subtract=False)
    if lora.up_bias is not None and bias is not None:
        lora.up_bias.copy_(bias)
    return lora
