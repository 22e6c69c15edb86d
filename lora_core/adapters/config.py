"""What the configuration of an adapter kind has to offer, the registry of kinds, and LoRA's.

A configuration is any object with

    build(name, module) -> Adapter | None        the adapter for one module, or None: not a site

and, where it wants them,

    build_all(model) -> {name: Adapter}          in place of build: for choices that need the model
    host(module) -> Adapted                      another host than the plain one
    untie: bool                                  give a tied weight its own copy instead of refusing

`add_adapter` needs no more. To be saved and loaded, the configuration is a dataclass of plain
values under `@register_adapter("KIND")`; `peft_type` on disk is then LORA_CORE_KIND, and the keys
are `<module>.<parameter>`. LoRA itself is a configuration like any other, with PEFT's files
(checkpoint/peft.py).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar, cast

from torch import nn

from lora_core.adapters.base import Adapted, Adapter, is_linear, linear_features
from lora_core.adapters.lora import LoRA, LoRALinear, check_lora
from lora_core.adapters.tokens import token_rows
from lora_core.targets import Targets, nearest, pattern_value, select_modules, sites, unwrap

__all__ = ["AdapterConfig", "LoRAConfig", "build_all", "kind_of", "register_adapter", "registered"]

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
    return _offer(config, ((name, unwrap(module)) for name, module in sites(model) if name))


def _offer(config: AdapterConfig, modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Adapter]:
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


def _check_patterns(option: str, patterns: object) -> None:
    if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
        raise TypeError(f"{option} must be a dict of {{pattern: value}}, got {patterns!r}")
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{option}: {key!r} is no regular expression: {error}") from None


@register_adapter("LORA")
@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """LoRA on the linear layers that `targets` selects.

    Raises:
        ValueError: a value out of range.
        TypeError: a pattern option that is no dict.
    """

    r: int = 16
    """Rank of the update."""
    alpha: float = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input, in training."""
    targets: Targets = "all-linear"
    """Which linear layers: names or suffixes, "all-linear", a regular expression or a callable."""
    exclude: Targets | None = None
    """Which of them to leave out, in the same forms."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank of the modules whose name a key matches, in place of r."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alpha of the modules whose name a key matches, in place of alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead, so that the update's size does not fall with the rank."""
    init: str = "kaiming"
    """Start of A: "kaiming" (uniform, PEFT's) or "gaussian" (deviation 1/r); B starts at zero."""
    untie: bool = False
    """Give a targeted module whose weight is tied its own copy, instead of refusing it."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows are trained too (tied head rows with them); {module: ids}."""

    def __post_init__(self) -> None:
        check_lora(self.r, self.alpha, self.dropout, self.init)
        _check_patterns("rank_pattern", self.rank_pattern)
        _check_patterns("alpha_pattern", self.alpha_pattern)
        for r in self.rank_pattern.values():
            check_lora(r, self.alpha, self.dropout, self.init)
        for alpha in self.alpha_pattern.values():
            check_lora(self.r, alpha, self.dropout, self.init)

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        """Return the LoRA pair for a linear-like module, None for any other."""
        if not is_linear(module):
            return None
        return LoRA(
            *linear_features(module),
            r=pattern_value(self.rank_pattern, name, self.r),
            alpha=pattern_value(self.alpha_pattern, name, self.alpha),
            dropout=self.dropout,
            init=self.init,
            use_rslora=self.use_rslora,
        )

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the pairs of all targets, and the trainable rows."""
        names = select_modules(model, self.targets, kind=is_linear, exclude=self.exclude)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                if not any(pattern_value({key: True}, name, False) for name in names):
                    raise ValueError(f"{option}: {key!r} matches no target; {nearest(key, names)}")
        modules = dict(sites(model))
        built = _offer(self, ((name, unwrap(modules[name])) for name in names))
        if self.trainable_token_indices is None:
            return built
        rows = token_rows(model, self.trainable_token_indices)
        if both := sorted(built.keys() & rows.keys()):
            raise ValueError(
                f"{both[0]!r} is both a target and tied to (or named in) trainable_token_indices; "
                "exclude it from the targets"
            )
        return {**built, **rows}

    def host(self, module: nn.Module) -> Adapted:
        """Return a LoRALinear around a linear-like module, the plain host around any other."""
        return LoRALinear.around(module) if is_linear(module) else Adapted(module)
