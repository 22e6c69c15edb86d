"""What the configuration of an adapter kind has to offer, and the registry of kinds.

A configuration is any object with

    build(name, module) -> Adapter | None        the adapter for one module, or None: not a site

and, where it wants them,

    build_all(model) -> {name: Adapter}          in place of build: for choices that need the model
    check(built) -> None                         what a new adapter must fulfil; not a loaded one
    host(module) -> Adapted                      another host than the plain one
    untie: bool                                  give a tied weight its own copy instead of refusing
    installed(model), removed(model)             told that adapters of theirs came, or went

`add_adapter` needs no more. To be saved and loaded, the configuration is a dataclass of plain
values under `@register_adapter("KIND")`; `peft_type` on disk is then LORA_CORE_KIND, and the keys
are `<module>.<parameter>`. LoRA itself is a configuration like any other (lora_config.py), with
PEFT's files (checkpoint/peft.py).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar, cast

from torch import nn

from lora_core.adapters.adapter import Adapter
from lora_core.targets import nearest, sites, unwrap

__all__ = ["AdapterConfig", "build_all", "kind_of", "offer", "register_adapter", "registered"]

Config = TypeVar("Config", bound=type)

_KINDS: dict[str, type] = {}


class AdapterConfig(Protocol):
    """The one method that a configuration needs; the module's docstring lists the optional ones."""

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        """Return the adapter for the module of this name, or None if it is not a site."""


def register_adapter(kind: str) -> Callable[[Config], Config]:
    """Make a kind of adapter savable and loadable: decorates its configuration's dataclass.

    Args:
        kind: its name, capitals, digits and underscores; LORA_CORE_<kind> is written to disk.

    Returns:
        The decorator.

    Raises:
        ValueError: a malformed or taken name.
        TypeError: what is decorated is no dataclass.
    """
    if not isinstance(kind, str) or not kind.replace("_", "").isalnum() or kind != kind.upper():
        raise ValueError(f"an adapter kind is named in capitals, such as 'IA3'; got {kind!r}")

    def register(cls: Config) -> Config:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{cls.__name__} must be a dataclass to be saved: decorate it as one")
        known = _KINDS.get(kind)
        # a cell of a notebook that is run again defines the same class again
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"the adapter kind {kind!r} is taken by {known.__name__}")
        _KINDS[kind] = cls
        return cls

    return register


def registered(kind: str) -> type:
    """Configuration class of a registered kind; ValueError with the nearest names if unknown."""
    if kind not in _KINDS:
        raise ValueError(
            f"no adapter kind {kind!r} is registered; import the module that registers it "
            f"({nearest(kind, sorted(_KINDS))})"
        )
    return _KINDS[kind]


def kind_of(config: object) -> str | None:
    """Name under which the configuration's class is registered, or None."""
    return next((kind for kind, cls in _KINDS.items() if cls is type(config)), None)


def build_all(config: AdapterConfig, model: nn.Module) -> dict[str, Adapter]:
    """Every adapter that a configuration wants in a model, by module name; changes nothing.

    Args:
        config: the configuration.
        model: the model, possibly with other adapters in it.

    Returns:
        {name: adapter} in module order.

    Raises:
        TypeError: no `build`, or it returned something else than an Adapter or None.
    """
    whole = getattr(config, "build_all", None)
    if callable(whole):
        return cast(dict[str, Adapter], whole(model))
    if not callable(getattr(config, "build", None)):
        raise TypeError(f"{type(config).__name__} has no build(name, module) method")
    return offer(config, ((name, unwrap(module)) for name, module in sites(model) if name))


def offer(config: AdapterConfig, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Adapter]:
    """Ask a configuration's `build` about modules, each once.

    Args:
        config: the configuration.
        modules: (name, module), without hosts.

    Returns:
        {name: adapter} of those that it wants.

    Raises:
        TypeError: `build` returned something else than an Adapter or None.
    """
    built: dict[str, Adapter] = {}
    seen: set[int] = set()
    for name, module in modules:
        if id(module) in seen:
            continue
        adapter = config.build(name, module)
        if adapter is None:
            continue
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"{type(config).__name__}.build({name!r}, …) must return an Adapter or None, "
                f"got {type(adapter).__name__}"
            )
        seen.add(id(module))
        built[name] = adapter
    return built
