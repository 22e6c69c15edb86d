"""Which adapters of a model are active: naming, choosing and disabling them.

Every function takes any nn.Module and finds the hosts by type.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lora_core.adapters.host import adapted_modules, spelt
from lora_core.targets import nearest

__all__ = [
    "activate",
    "active_names",
    "adapter_names",
    "check_known",
    "disable_adapters",
    "refuse_merged",
    "refuse_rows",
    "set_adapters",
]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters in the model, in the order in which they first appear."""
    return list(dict.fromkeys(name for _, host in adapted_modules(model) for name in host.adapters))


def active_names(model: nn.Module) -> list[str]:
    """Names of the active adapters, in the order in which they first appear."""
    return list(dict.fromkeys(name for _, host in adapted_modules(model) for name in host.active))


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that no adapter of the model has, or repeated ones; ValueError names one."""
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


def refuse_merged(model: nn.Module, what: str) -> None:
    """Refuse to do something while a host is merged; ValueError says what to call first."""
    for site, host in adapted_modules(model):
        if host.merged is not None:
            raise ValueError(f"{what} while {spelt(site)} is merged: {host.merged.way_back} first")


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Make these adapters the active ones, in this order, wherever they are."""
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
    check_known(model, names)
    refuse_merged(model, "changing the active adapters")
    _refuse_company(model, names)
    activate(model, names)
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
