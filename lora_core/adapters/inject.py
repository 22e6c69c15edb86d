"""Putting adapters into a model and taking them out again.

`add_adapter` asks the configuration for its adapters, checks everything, and only then swaps
modules for hosts, so an error leaves the model as it was. Hosts are put in wherever the module is
a child, shared modules included. Nothing is subclassed and no forward is patched.

Every function takes any nn.Module and finds the hosts by type.
"""

from collections.abc import Iterable

import torch
from torch import nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.adapter_report import AdapterReport, adapter_report
from lora_core.adapters.config import AdapterConfig, build_all
from lora_core.adapters.host import Adapted, adapted_modules, check_name
from lora_core.adapters.switch import (
    activate,
    adapter_names,
    check_known,
    refuse_merged,
    refuse_rows,
)
from lora_core.adapters.tokens import edit_configs, tied_modules
from lora_core.targets import sites, unwrap

__all__ = [
    "add_adapter",
    "attach_built",
    "delete_adapter",
    "refuse_name",
    "replace_modules",
    "tell",
]


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
    refuse_merged(model, "adding an adapter")
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
    activate(model, [name])
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


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; modules left without any become plain again.

    Args:
        model: a model with the adapter.
        name: which.

    Raises:
        ValueError: an unknown name, or a merged model.
    """
    check_known(model, [name])
    refuse_rows(model, "deleting an adapter")
    refuse_merged(model, "deleting an adapter")
    plain: dict[int, nn.Module] = {}
    gone: list[object] = []
    for _, host in adapted_modules(model):
        if name in host.adapters:
            gone.append(host.adapter(name).config)
            del host.adapters[name]
            host.active = [other for other in host.active if other != name]
            if not host.adapters:
                plain[id(host)] = host.base
    replace_modules(model, plain)
    tell(model, "removed", gone)
