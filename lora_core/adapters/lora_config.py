"""LoRA's configuration: which layers get a pair, of which size, and what is trained beside them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.biases import TrainedBias, bias_site
from lora_core.adapters.config import offer, register_adapter
from lora_core.adapters.dora import DoRA
from lora_core.adapters.expert_targets import expert_lora, pattern_names, targeted_parameters
from lora_core.adapters.experts import ExpertLoRA, has_experts
from lora_core.adapters.forms import TransposedForm, form_of
from lora_core.adapters.full import FullCopy
from lora_core.adapters.host import Adapted
from lora_core.adapters.layers import is_linear
from lora_core.adapters.lora import LoRA, check_lora
from lora_core.adapters.lora_linear import LoRALinear
from lora_core.adapters.starts import check_start, start_pair
from lora_core.adapters.tokens import token_rows
from lora_core.targets import Targets, nearest, pattern_value, select_modules, sites, unwrap

__all__ = ["LoRAConfig", "config_of_ranks"]

BIASES = ("none", "all", "lora_only")


@register_adapter("LORA")
@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """LoRA on the layers that `targets` selects: linear layers, embeddings, convolutions.

    Raises:
        ValueError: a value out of range, or options that exclude one another.
        TypeError: a pattern option that is no dict.
    """

    r: int = 16
    """Rank of the update."""
    alpha: float = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input, in training."""
    targets: Targets = "all-linear"
    """Which layers: names or suffixes, "all-linear" (experts and routers too), a regular
    expression or a callable."""
    target_parameters: list[str] | None = None
    """Further targets by their parameters, names or suffixes: "experts.gate_up_proj" for that of a
    layer's experts alone, where `targets` takes all of them. `targets` may then be []."""
    exclude: Targets | None = None
    """Which of them to leave out, in the same forms."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank of the modules whose name a key matches, in place of r."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Alpha of the modules whose name a key matches, in place of alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead, so that the update's size does not fall with the rank."""
    use_dora: bool = False
    """Train the length of each row of W beside its direction (DoRA)."""
    init: str = "kaiming"
    """Start: "kaiming" (PEFT's), "gaussian", "pissa", "pissa_niter_<n>", "olora" or "loftq"."""
    loftq_steps: int = 1
    """Rounds of quantizing and refitting with init="loftq"."""
    parts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """Fused projections: sizes of the parts of the output that get an update each, by name."""
    bias: str = "none"
    """Biases to train: "none", "lora_only" (of the targets) or "all" (norms' too)."""
    lora_bias: bool = False
    """Give B a bias of its own, scaled with it."""
    modules_to_save: list[str] | None = None
    """Modules to train whole, as copies, by name or suffix: a new head, norms."""
    untie: bool = False
    """Give a targeted module whose weight is tied its own copy, instead of refusing it."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows are trained too (tied head rows with them); {module: ids}."""

    def __post_init__(self) -> None:
        check_lora(self.r, self.alpha, self.dropout, "kaiming")
        check_start(self.init, self.loftq_steps)
        for option in ("rank_pattern", "alpha_pattern", "parts"):
            _check_patterns(option, getattr(self, option))
        for r in self.rank_pattern.values():
            check_lora(r, self.alpha, self.dropout, "kaiming")
        for alpha in self.alpha_pattern.values():
            check_lora(self.r, alpha, self.dropout, "kaiming")
        if self.bias not in BIASES:
            raise ValueError(
                f"bias must be one of {', '.join(map(repr, BIASES))}, got {self.bias!r}"
            )
        if self.use_dora and self.parts:
            raise ValueError("use_dora and parts cannot be used together: DoRA takes whole layers")

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        """Return the LoRA pair for a layer of a known kind, None for any other."""
        if has_experts(module):
            return expert_lora(self, name, module)
        form = form_of(module)
        if form is None:
            return None
        self._refuse_meta(name, module)
        kind = DoRA if self.use_dora else LoRA
        pair = kind(
            form.in_features,
            form.out_features,
            r=pattern_value(self.rank_pattern, name, self.r),
            alpha=pattern_value(self.alpha_pattern, name, self.alpha),
            dropout=self.dropout,
            init=self.init if self.init == "gaussian" else "kaiming",
            use_rslora=self.use_rslora,
            form=form,
            parts=pattern_value(cast(dict[str, Any], self.parts), name, None),
            bias=cast(Tensor, module.bias) if self._trains_bias(module) else None,
            up_bias=self.lora_bias,
        )
        start_pair(pair, module, self.init, self.loftq_steps, name)
        pair.begin(pair.new_base[0] if pair.new_base else module)
        return pair

    def _refuse_meta(self, name: str, module: nn.Module) -> None:
        """Refuse to read a weight that is not there yet."""
        reads = self.use_dora or self.init not in ("kaiming", "gaussian")
        reads = reads or self._trains_bias(module)
        if reads and any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise ValueError(
                f"{name!r} is on the meta device, and DoRA, trained biases and "
                f"init={self.init!r} start from its weights: load them first"
            )

    def _trains_bias(self, module: nn.Module) -> bool:
        return self.bias != "none" and isinstance(getattr(module, "bias", None), Tensor)

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the pairs of all targets, and what is trained beside them."""
        modules = {name: unwrap(module) for name, module in sites(model)}
        copies = self._copies(model, modules)
        by_parameter = targeted_parameters(modules, self.target_parameters or ())
        names = self._selected(model) if self.targets or not by_parameter else []
        if self.targets == "all-linear":
            names = [name for name in names if not _inside(name, copies)]
        left_out = self._left_out(model) if by_parameter else []
        some = {k: own for k, own in by_parameter.items() if k not in names and k not in left_out}
        names = [name for name in modules if name in some or name in names]
        for option in ("rank_pattern", "alpha_pattern", "parts"):
            for key in getattr(self, option):
                known = pattern_names(modules, names, some)
                if not any(pattern_value({key: True}, name, False) for name in known):
                    raise ValueError(f"{option}: {key!r} matches no target; {nearest(key, known)}")
        if clash := next((c for c in copies if _inside(c, set(names) - {c})), None):
            raise ValueError(
                f"{clash!r} in modules_to_save is inside a target; exclude one of them"
            )
        built: dict[str, Adapter] = dict(copies)
        parts: dict[str, Adapter] = {
            name: expert_lora(self, name, modules[name], own) for name, own in some.items() if own
        }
        _add(built, parts, "a target")
        rest = [name for name in names if name not in parts]
        _add(built, offer(self, ((name, modules[name]) for name in rest)), "a target")
        if self.trainable_token_indices is not None:
            rows = token_rows(model, self.trainable_token_indices)
            _add(built, rows, "tied to (or named in) trainable_token_indices")
        if self.bias == "all":
            built |= self._biases(modules, built)
        return {name: built[name] for name in modules if name in built}

    def _selected(self, model: nn.Module) -> list[str]:
        """The modules that `targets` and `exclude` mean."""
        return select_modules(
            model,
            self.targets,
            kind=_takes_pairs,
            linear=lambda module: _is_linear(module) or has_experts(module),
            exclude=self.exclude,
        )

    def _left_out(self, model: nn.Module) -> list[str]:
        """The modules that `exclude` means."""
        if not self.exclude:
            return []
        return select_modules(model, self.exclude, kind=_takes_pairs, option="exclude")

    def _copies(self, model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Adapter]:
        if not self.modules_to_save:
            return {}
        option = "modules_to_save"
        names = select_modules(model, self.modules_to_save, kind=lambda _: True, option=option)
        if nested := [name for name in names if _inside(name, set(names) - {name})]:
            raise ValueError(f"{option}: {nested[0]!r} is inside another module named there")
        return {name: FullCopy(modules[name]) for name in names}

    def _biases(
        self, modules: dict[str, nn.Module], built: dict[str, Adapter]
    ) -> dict[str, Adapter]:
        copies = [name for name, adapter in built.items() if isinstance(adapter, FullCopy)]
        seen = {id(modules[name]) for name in built}
        found: dict[str, Adapter] = {}
        for name, module in modules.items():
            if not name or id(module) in seen or _inside(name, copies):
                continue
            seen.add(id(module))
            known = bias_site(module)
            if known is None and "bias" in module._parameters:
                raise ValueError(
                    f"bias='all': {name!r} is a {type(module).__name__}, and where its bias enters "
                    "its output is not known; train it whole with modules_to_save"
                )
            if known:
                found[name] = TrainedBias(module)
        return found

    def check(self, built: dict[str, Adapter]) -> None:
        """Refuse a new pair whose rank is above its layer's, or DoRA on a layer of zeros.

        Raises:
            ValueError: names the layer.
        """
        for name, pair in built.items():
            if isinstance(pair, ExpertLoRA):
                pair.check_ranks(name)
            if not isinstance(pair, LoRA):
                continue
            rows, columns = pair.form.out_features, pair.form.in_features * pair.form.groups
            if pair.r > min(columns, *(pair.parts or (rows,))):
                part = f", in parts of {list(pair.parts)}" if pair.parts else ""
                raise ValueError(
                    f"r = {pair.r} is above the size of {name!r}, {rows} × {columns}{part}: "
                    "lower it with rank_pattern, or exclude the layer"
                )
            if isinstance(pair, DoRA) and not bool(pair.magnitude.any()):
                raise ValueError(
                    f"use_dora: the weight of {name!r} is all zeros, which have no direction to "
                    "train; exclude the layer"
                )

    def host(self, module: nn.Module) -> Adapted:
        """Return a LoRALinear around a linear-like module, the plain host around any other."""
        return LoRALinear.around(module) if is_linear(module) else Adapted(module)


def _takes_pairs(module: nn.Module) -> bool:
    return form_of(module) is not None or has_experts(module)


def _is_linear(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(form_of(module), TransposedForm)


def _inside(name: str, others: Sequence[str] | set[str] | dict[str, Adapter]) -> bool:
    """Whether a name is one of the others, or of a module in one."""
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _add(built: dict[str, Adapter], more: dict[str, Adapter], what: str) -> None:
    """Add adapters at sites that have none; ValueError where they meet."""
    copies = [name for name, adapter in built.items() if isinstance(adapter, FullCopy)]
    for name in more:
        if _inside(name, copies):
            raise ValueError(f"{name!r} is both {what} and in modules_to_save; exclude it from one")
        if name in built:
            raise ValueError(f"{name!r} is both a target and {what}; exclude it from the targets")
    built |= more


def _check_patterns(option: str, patterns: object) -> None:
    if not isinstance(patterns, dict) or not all(isinstance(key, str) for key in patterns):
        raise TypeError(f"{option} must be a dict of {{pattern: value}}, got {patterns!r}")
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{option}: {key!r} is no regular expression: {error}") from None


def config_of_ranks(ranks: Mapping[str, int], **options: Any) -> LoRAConfig:
    """Make the configuration of pairs whose scaling is 1.

    Args:
        ranks: {module name: rank}, at least one.
        **options: further fields of LoRAConfig.

    Returns:
        The configuration, its targets these modules.
    """
    r = max(ranks.values())
    fewer = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != r}
    return LoRAConfig(
        r=r,
        alpha=r,
        targets=list(ranks),
        rank_pattern=fewer,
        alpha_pattern=dict(fewer),
        **options,
    )
