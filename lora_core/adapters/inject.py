"""Putting adapters into a model, choosing among them, and taking them out again.

`add_adapter` asks the configuration for its adapters, checks everything, and only then swaps
modules for hosts, so an error leaves the model as it was. Hosts are put in wherever the module is
a child, shared modules included. Nothing is subclassed and no forward is patched.

Every function takes any nn.Module and finds the hosts by type.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lora_core.adapters.base import Adapted, Adapter, adapted_modules, check_name, spelt
from lora_core.adapters.config import AdapterConfig, build_all, kind_of
from lora_core.adapters.tokens import edit_configs, tied_modules
from lora_core.targets import nearest, sites, unwrap

__all__ = [
    "AdapterReport",
    "active_names",
    "adapter_names",
    "adapter_report",
    "add_adapter",
    "attach_built",
    "delete_adapter",
    "disable_adapters",
    "parameter_counts",
    "refuse_name",
    "refuse_rows",
    "replace_modules",
    "set_adapters",
    "tell",
]


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter is in a model; `print` it.

    Attributes:
        name: the adapter's name.
        kind: its registered kind, or its configuration's (without one, its own) class name.
        sites: the modules it is at.
        parameters: its own parameters.
        trainable: parameters of the whole model that are trained now.
        total: parameters of the whole model, a 4-bit weight counted by its elements.
    """

    name: str
    kind: str
    sites: tuple[str, ...]
    parameters: int
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / self.total

    def __str__(self) -> str:
        ends: dict[str, int] = {}
        for site in self.sites:
            ends[site.rsplit(".", 1)[-1]] = ends.get(site.rsplit(".", 1)[-1], 0) + 1
        where = ", ".join(f"{end} ×{count}" for end, count in ends.items())
        return (
            f"adapter {self.name!r} ({self.kind}): {self.parameters:,} parameters "
            f"at {len(self.sites)} modules ({where})\n"
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.share:.3%})"
        )


def add_adapter(model: nn.Module, config: AdapterConfig, name: str = "default") -> AdapterReport:
    """Add an adapter to a model in place; it alone is active and trainable afterwards.

    Args:
        model: any module; modules are replaced by hosts where the adapter attaches.
        config: LoRAConfig, BottleneckConfig or any object with `build(name, module)`.
        name: the adapter's name, new to the model.

    Returns:
        What was added.

    Raises:
        ValueError: a name taken, a target that matches nothing, a tied weight, a merged model, no
            site or no trainable parameter. The model is then as it was.
    """
    refuse_name(model, name)
    built = build_all(config, model)
    check = getattr(config, "check", None)
    if callable(check):
        check(built)
    return attach_built(model, config, name, built)


def refuse_name(model: nn.Module, name: str) -> None:
    """Refuse a name that a new adapter of the model cannot have; ValueError says why."""
    check_name(name)
    refuse_rows(model, "adding an adapter")
    _refuse_merged(model, "adding an adapter")
    if name in adapter_names(model):
        raise ValueError(
            f"the adapter name {name!r} is taken; delete_adapter it, or choose another"
        )


def attach_built(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    built: dict[str, Adapter],
    trainable: bool = True,
) -> AdapterReport:
    """Check adapters that were built for a model and put them in; the end of `add_adapter`.

    Args:
        model: the model they were built for.
        config: the configuration they were built from.
        name: the adapter's name.
        built: {module name: adapter}.
        trainable: False freezes the new adapter and leaves other adapters' `requires_grad` alone;
            everything else is frozen either way.

    Returns:
        What was added.

    Raises:
        ValueError: see `add_adapter`.
    """
    refuse_name(model, name)
    modules = dict(sites(model))
    if not built:
        raise ValueError(f"{type(config).__name__} found no module to attach to")
    if not any(p.requires_grad for adapter in built.values() for p in adapter.parameters()):
        raise ValueError(f"{type(config).__name__} built adapters without a trainable parameter")
    untied = _tied(model, modules, built, untie=bool(getattr(config, "untie", False)))
    _refuse_bypassed(model, modules, built)
    hosts = {site: _host(config, modules[site], adapter) for site, adapter in built.items()}

    for module in untied:
        _untie(model, module)
    replace_modules(model, {id(modules[site]): host for site, host in hosts.items()})
    others = {id(p) for _, host in adapted_modules(model) for p in host.adapters.parameters()}
    for parameter in model.parameters():
        if trainable or id(parameter) not in others:
            parameter.requires_grad_(False)
    for site, adapter in built.items():
        adapter.config = config
        hosts[site].attach(name, adapter)
        vars(adapter).pop("new_base", None)  # the host's now: nothing else may keep it alive
    if not trainable:
        for adapter in built.values():
            adapter.requires_grad_(False)
    _activate(model, [name])
    tell(model, "installed", [config])
    return adapter_report(model, name)


def tell(model: nn.Module, event: str, configs: Iterable[object]) -> None:
    """Tell configurations that want to know that adapters of theirs came ("installed"), or went.

    Args:
        model: the model, as it is now.
        event: "installed" or "removed", the method to call where there is one.
        configs: the adapters' configurations.
    """
    for config in {id(config): config for config in configs}.values():
        if callable(method := getattr(config, event, None)):
            method(model)


def _host(config: AdapterConfig, module: nn.Module, adapter: Adapter) -> Adapted:
    """The host around a module, or around what the adapter brings in its place (LoftQ)."""
    instead = getattr(adapter, "new_base", ())
    if isinstance(module, Adapted):
        if instead:
            raise ValueError(
                f"{type(config).__name__} quantizes the base, on which the adapters "
                f"{list(module.adapters)} are already: delete them first"
            )
        return module
    module = instead[0] if instead else module
    make = getattr(config, "host", None)
    host = make(module) if callable(make) else Adapted(module)
    if not isinstance(host, Adapted):
        raise TypeError(f"{type(config).__name__}.host must return an Adapted, got {host!r}")
    return host


def replace_modules(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Replace child modules, by `id`, wherever they are children; the new ones are not entered."""
    places = [
        (parent, key, new[id(child)])
        for parent in list(model.modules())
        for key, child in parent._modules.items()
        if child is not None and id(child) in new and new[id(child)] is not child
    ]
    for parent, key, module in places:
        parent._modules[key] = module


def _tied(
    model: nn.Module, modules: dict[str, nn.Module], built: dict[str, Adapter], untie: bool
) -> list[nn.Module]:
    """The sites whose weight is tied to another module's, all of them to be untied, or an error."""
    found = []
    for site, adapter in built.items():
        module = unwrap(modules[site])
        tied = next(iter(tied_modules(model, module)), None)
        if tied is None or adapter.keeps_ties or adapter.unmergeable is not None:
            continue
        if not untie:
            raise ValueError(
                f"the weight of {site!r} is tied to that of {tied[0]!r}: an adapter on one of them "
                "could not be merged without changing the other. Leave it out, or set untie=True "
                "to give it its own copy"
            )
        found.append(module)
    return found


def _untie(model: nn.Module, module: nn.Module) -> None:
    """Give a module its own copy of every parameter it shares, and say so in the configuration."""
    tied = [m for _, m in tied_modules(model, module)]
    shared = {id(p) for m in tied for p in m._parameters.values()}
    own: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for key, old in part._parameters.items():
            if old is not None and id(old) in shared:
                new = own.setdefault(id(old), nn.Parameter(old.detach().clone(), old.requires_grad))
                part._parameters[key] = new
    if any(isinstance(m, nn.Embedding) for m in (module, *tied)):
        edit_configs(model, tie_word_embeddings=False)


def _refuse_bypassed(
    model: nn.Module, modules: dict[str, nn.Module], built: dict[str, Adapter]
) -> None:
    """Refuse sites whose weight PyTorch reads without calling the module."""
    for site in built:
        parents = [
            unwrap(modules[".".join(site.split(".")[:n])]) for n in range(site.count(".") + 1)
        ]
        if parents and isinstance(parents[-1], nn.MultiheadAttention):
            raise ValueError(
                f"{site!r} belongs to nn.MultiheadAttention, which reads its weight "
                "without calling it: an adapter there would do nothing. Exclude it"
            )
        if torch.backends.mha.get_fastpath_enabled() and any(
            isinstance(parent, nn.TransformerEncoderLayer) for parent in parents
        ):
            raise ValueError(
                f"{site!r} is in an nn.TransformerEncoderLayer, whose fast path reads weights "
                "without calling modules, so that the adapter would do nothing in evaluation: "
                "call torch.backends.mha.set_fastpath_enabled(False) first"
            )


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters in the model, in the order in which they first appear."""
    return list(dict.fromkeys(name for _, host in adapted_modules(model) for name in host.adapters))


def active_names(model: nn.Module) -> list[str]:
    """Names of the active adapters, in the order in which they first appear."""
    return list(dict.fromkeys(name for _, host in adapted_modules(model) for name in host.active))


def _known(model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter {name!r} in the model; {nearest(name, known)}")
    if len(set(names)) != len(names):
        raise ValueError(f"adapters are named once each, got {list(names)}")


def refuse_rows(model: nn.Module, what: str) -> None:
    """Refuse a change of the hosts while the rows of a batch name their adapters; ValueError."""
    if any(host.mixture is not None for _, host in adapted_modules(model)):
        raise ValueError(f"{what} inside adapter_rows: leave that context first")


def _refuse_merged(model: nn.Module, what: str) -> None:
    for site, host in adapted_modules(model):
        if host.merged is not None:
            raise ValueError(f"{what} while {spelt(site)} is merged: {host.merged.way_back} first")


def _activate(model: nn.Module, names: Sequence[str]) -> None:
    for _, host in adapted_modules(model):
        host.active = [name for name in names if name in host.adapters]


def _refuse_company(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters beside one that is defined on the base alone, or inside what it replaces."""
    for site, host in adapted_modules(model):
        here = [name for name in names if name in host.adapters]
        single = next((name for name in here if host.adapter(name).alone), None)
        if single is not None and host.adapter(single).replaces and len(here) == 1:
            for inner_site, inner in adapted_modules(host.base):
                if idle := [name for name in names if name in inner.adapters]:
                    raise ValueError(
                        f"{names} cannot be active together: {single!r} replaces {spelt(site)} as "
                        f"a whole, and {idle[0]!r} is at {inner_site!r} inside it"
                    )
        if single is not None and len(here) > 1:
            kind = type(host.adapter(single)).__name__
            raise ValueError(
                f"{here} cannot be active together at {spelt(site)}: {single!r} ({kind}) is "
                "defined on the base alone"
            )


def set_adapters(
    model: nn.Module, names: str | Sequence[str], trainable: bool | None = None
) -> None:
    """Choose the active adapters; several at one module apply in the order given (LoRAs add up).

    Args:
        model: a model with adapters.
        names: one name or several; an empty list makes none active.
        trainable: None leaves every `requires_grad`; True makes exactly these adapters trainable
            and freezes the other adapters; False freezes these.

    Raises:
        ValueError: an unknown or repeated name, or a merged model.
    """
    names = [names] if isinstance(names, str) else list(names)
    _known(model, names)
    _refuse_merged(model, "changing the active adapters")
    _refuse_company(model, names)
    _activate(model, names)
    if trainable is None:
        return
    for _, host in adapted_modules(model):
        for name in host.adapters:
            adapter = host.adapter(name)
            if trainable or name in names:
                for key, parameter in adapter.named_parameters():
                    if key in adapter.trained:
                        parameter.requires_grad_(trainable and name in names)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, merged ones included; nests, and survives exceptions.

    Args:
        model: a model with adapters (or none: then nothing changes).

    Yields:
        None.

    Raises:
        ValueError: adapters were merged with keep_base=False: the base is gone.
    """
    hosts = [host for _, host in adapted_modules(model)]
    if any(host.merged is not None and host.merged.module is None for host in hosts):
        raise ValueError(
            "adapters merged with keep_base=False cannot be disabled: no base is left; "
            "load the base model again"
        )
    before = [host.enabled for host in hosts]
    try:
        for host in hosts:
            host.enabled = False
        yield
    finally:
        for host, enabled in zip(hosts, before, strict=True):
            host.enabled = enabled


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; modules left without any become plain again.

    Args:
        model: a model with the adapter.
        name: which.

    Raises:
        ValueError: an unknown name, or a merged model.
    """
    _known(model, [name])
    refuse_rows(model, "deleting an adapter")
    _refuse_merged(model, "deleting an adapter")
    plain: dict[int, nn.Module] = {}
    gone: list[object] = []
    for _, host in adapted_modules(model):
        if name in host.adapters:
            gone.append(host.adapter(name).config)
            del host.adapters[name]
            host.stacks = None
            host.active = [other for other in host.active if other != name]
            if not host.adapters:
                plain[id(host)] = host.base
    replace_modules(model, plain)
    tell(model, "removed", gone)


def adapter_report(model: nn.Module, name: str = "default") -> AdapterReport:
    """Describe an adapter that is in the model.

    Args:
        model: the model.
        name: which adapter.

    Returns:
        Where it is and how large.

    Raises:
        ValueError: an unknown name.
    """
    _known(model, [name])
    at = {
        site: host.adapter(name) for site, host in adapted_modules(model) if name in host.adapters
    }
    first = next(iter(at.values()))
    what = first if first.config is None else first.config
    own = {id(p): p.numel() for adapter in at.values() for p in adapter.parameters()}
    trainable, total = parameter_counts(model)
    return AdapterReport(
        name=name,
        kind=kind_of(what) or type(what).__name__,
        sites=tuple(at),
        parameters=sum(own.values()),
        trainable=trainable,
        total=total,
    )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count a model's parameters, a tied one once and a 4-bit weight by its elements.

    Args:
        model: any module.

    Returns:
        (those that are trained, all).
    """
    every = list(model.parameters())
    # two 4-bit codes lie in one byte
    sizes = [p.numel() * 2 if p.dtype == torch.uint8 else p.numel() for p in every]
    return sum(p.numel() for p in every if p.requires_grad), sum(sizes)
