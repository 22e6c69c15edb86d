"""Which experts a LoRAConfig means, and the pairs that it makes for them.

Experts are one module whose parameters are stacks of matrices. `targets` takes the module, with all
of them; `target_parameters` names a parameter, as PEFT's option does. It may name a plain layer's
`weight` too, as PEFT needs it for routers: that is the layer itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_core.adapters.experts import ExpertLoRA, ExpertPair, has_experts
from lora_core.adapters.forms import form_of
from lora_core.targets import nearest, pattern_value

if TYPE_CHECKING:
    from lora_core.adapters.lora_config import LoRAConfig

__all__ = ["expert_lora", "pattern_names", "targeted_parameters"]


def expert_lora(
    config: "LoRAConfig", site: str, module: Any, names: Iterable[str] | None = None
) -> ExpertLoRA:
    """Make the pairs for the experts of a layer.

    Args:
        config: the configuration.
        site: the module's name.
        module: experts.
        names: parameters; None: all.

    Returns:
        The adapter.

    Raises:
        ValueError: an option that experts have no form of.
    """
    _refuse(config, site)
    shapes: dict[str, tuple[int, int, int]] = module.expert_shapes
    wanted = shapes if names is None else [name for name in shapes if name in set(names)]
    pairs = {
        name: ExpertPair(
            shapes[name],
            pattern_value(config.rank_pattern, f"{site}.{name}", config.r),
            pattern_value(config.alpha_pattern, f"{site}.{name}", config.alpha),
            config.init,
            config.use_rslora,
        )
        for name in wanted
    }
    return ExpertLoRA(pairs, config.dropout)


def _refuse(config: "LoRAConfig", site: str) -> None:
    plain = config.init in ("kaiming", "gaussian")
    options = {
        "use_dora": config.use_dora,
        f"init={config.init!r}": not plain,
        "lora_bias": config.lora_bias,
    }
    for option, on in options.items():
        if on:
            raise ValueError(
                f"{option} is not there for experts, of which {site!r} is a target: exclude "
                f"{site.rsplit('.', 1)[-1]!r}, or leave the option out"
            )


def targeted_parameters(
    modules: Mapping[str, nn.Module], patterns: Sequence[str]
) -> dict[str, list[str]]:
    """The modules that parameters' names mean.

    Args:
        modules: by name, without hosts.
        patterns: whole names or dotted suffixes.

    Returns:
        {module: experts' parameters by their own names; [] for a layer, by its weight}.

    Raises:
        TypeError: something else than names.
        ValueError: a name that matches no parameter that LoRA knows.
    """
    if isinstance(patterns, str) or not all(isinstance(name, str) for name in patterns):
        raise TypeError(f"target_parameters must be a list of names, got {patterns!r}")
    known: dict[str, tuple[str, str]] = {}
    for site, module in modules.items():
        if has_experts(module):
            known |= {f"{site}.{name}": (site, name) for name in parameters_of(module)}
        elif site and form_of(module) is not None:
            known[f"{site}.weight"] = (site, "")
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        hits = [known[name] for name in known if f".{name}".endswith(f".{pattern}") and pattern]
        if not hits:
            raise ValueError(
                f"target_parameters: {pattern!r} matches no parameter; "
                f"{nearest(pattern, list(known))}"
            )
        for site, name in hits:
            own = found.setdefault(site, [])
            if name and name not in own:
                own.append(name)
    return found


def parameters_of(module: nn.Module) -> list[str]:
    """Names of the experts' parameters of a module, in the order of use."""
    shapes: dict[str, Any] = getattr(module, "expert_shapes")  # noqa: B009  # an experts module's
    return list(shapes)


def pattern_names(
    modules: Mapping[str, nn.Module], sites: Iterable[str], some: Mapping[str, Sequence[str]]
) -> list[str]:
    """What rank_pattern and alpha_pattern are held against: modules, and experts' parameters.

    Args:
        modules: by name, without hosts.
        sites: the targets.
        some: of targets named by parameters, these.
    """
    names: list[str] = []
    for site in sites:
        if has_experts(modules[site]):
            names += [f"{site}.{name}" for name in some.get(site) or parameters_of(modules[site])]
        else:
            names.append(site)
    return names
