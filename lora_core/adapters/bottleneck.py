r"""Bottleneck adapters: two small matrices and a non-linearity, beside or after a sub-layer.

    f(x) = up(act(down(x)))        down (m, d), up (d, m), m = d / reduction, each with a bias

Where they stand (h is a sub-layer's output before the residual sum, x its input):

* "houlsby"   h <- h + f(h)      after the attention's output projection and after the feed-forward
* "pfeiffer"  h <- h + f(h)      after the feed-forward alone
* "parallel"  h <- h + s f(x)    beside the feed-forward

`up` and both biases start at zero, so a new adapter is the identity, to the bit. AdapterHub's
default start is N(0, 0.02) for both matrices. Houlsby et al. also train the layer norms and the
head; here they stay frozen, so that disabling an adapter gives the base model back.

All three are hosts on named modules, no model is subclassed. h is the output of a sub-layer's last
linear layer: `mlp.down_proj` in Llama, `output.dense` in BERT, whose `output` holds dropout, sum
and LayerNorm as well (in training its dropout thus comes after the adapter; Houlsby et al. put it
before). A norm behind the sub-layer (Gemma 2, OLMo 2) or a factor (Granite) comes after the
adapter; `feed_forward=["post_feedforward_layernorm"]` puts it behind that norm. x is the input of
the first linear layer, normalized where the model does so before a sub-layer. No module of BERT has
that input and the output before the sum, so a parallel adapter has two sites: a tap, which keeps
the input, and the place of the sum, which takes it.

Ref: Houlsby et al. 2019, arXiv:1902.00751, section 2 (houlsby); Pfeiffer et al. 2020,
arXiv:2005.00247 (pfeiffer); He et al. 2021, arXiv:2110.04366, table 1 (parallel, s).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import register_adapter
from lora_core.adapters.layers import compute_dtype
from lora_core.targets import Targets, nearest, select_modules, sites, unwrap

__all__ = ["BottleneckAdapter", "BottleneckConfig"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


class Family(NamedTuple):
    """Where the models of a family have their sub-layers: regular expressions on module names."""

    attention: str
    feed_forward: str
    feed_forward_input: str


FAMILIES = {
    "Llama": Family(
        r"(.*\.)?self_attn\.o_proj",
        r"(.*\.)?mlp\.down_proj",
        r"(.*\.)?mlp\.(gate_proj|gate_up_proj)",
    ),
    "BERT": Family(
        r"(.*\.)?attention\.output\.dense",
        r"(.*\.)?layer\.\d+\.output\.dense",
        r"(.*\.)?layer\.\d+\.intermediate\.dense",
    ),
    "GPT-2": Family(r"(.*\.)?attn\.c_proj", r"(.*\.)?mlp\.c_proj", r"(.*\.)?mlp\.c_fc"),
    "OPT": Family(
        r"(.*\.)?layers\.\d+\.self_attn\.out_proj",
        r"(.*\.)?layers\.\d+\.fc2",
        r"(.*\.)?layers\.\d+\.fc1",
    ),
}


class BottleneckAdapter(Adapter):
    """The adapter: `x + s up(act(down(x)))`, the identity at the start.

    Args:
        dim: d, the size of the vectors it changes.
        reduction: m = floor(d / reduction) units in the middle.
        activation: a key of `ACTIVATIONS`: "gelu", "relu", "silu", "tanh", …
        scaling: s.

    Attributes:
        down: linear d to m; uniform in ±1/sqrt(d) (Kaiming, as LoRA's A), bias 0.
        up: linear m to d; 0, bias 0.

    Raises:
        ValueError: an unknown activation, or no unit is left in the middle.
    """

    unmergeable = (
        "a bottleneck adapter has a non-linearity between its two matrices, so no single weight "
        "does the same"
    )

    def __init__(
        self, dim: int, reduction: float = 16, activation: str = "gelu", scaling: float = 1.0
    ) -> None:
        super().__init__()
        _check(reduction, activation, scaling)
        width = self.width(dim, reduction)
        if width < 1:
            raise ValueError(f"reduction = {reduction:g} leaves no unit of dim = {dim}; lower it")
        self.activation, self.scaling = activation, scaling
        self.down = nn.Linear(dim, width, device="cpu", dtype=torch.float32)
        self.up = nn.Linear(width, dim, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    @staticmethod
    def width(dim: int, reduction: float) -> int:
        """Return m, the units in the middle."""
        return int(dim / reduction)

    def change(self, x: Tensor) -> Tensor:
        """Return `s up(act(down(x)))`.

        Args:
            x: (…, d), any floating dtype; the weights are cast to it, or to autocast's.

        Returns:
            (…, d).
        """
        dtype = compute_dtype(x)
        h = F.linear(x.to(dtype), self.down.weight.to(dtype), self.down.bias.to(dtype))  # (…, m)
        weight, bias = self.up.weight * self.scaling, self.up.bias * self.scaling
        return F.linear(ACTIVATIONS[self.activation](h), weight.to(dtype), bias.to(dtype))

    def forward(self, x: Any, y: Any = None, base: nn.Module | None = None) -> Any:
        """Return `x + change(x)`; at a site it is the output y that is changed.

        Args:
            x: (…, d); at a site, the module's input, not used.
            y: at a site, the module's output: (…, d), or a tuple that begins with it.
            base: at a site, the module (not needed here).

        Returns:
            Like x, or like y at a site.
        """
        return changed(x if y is None else y, self.change)

    def extra_repr(self) -> str:
        """Say activation and scaling."""
        return f"activation={self.activation}, scaling={self.scaling:g}"


class Wire:
    """Carries a sub-layer's input from where it enters to where the change is added."""

    def __init__(self) -> None:
        self.x: Tensor | None = None

    def take(self) -> Tensor:
        x, self.x = self.x, None
        if x is None:
            raise ValueError(
                "a parallel adapter's output module ran without its input module: "
                "feed_forward_input must name modules that run before those of feed_forward"
            )
        return x


class Tap(Adapter):
    """Leaves the output as it is and puts the input on the wire."""

    unmergeable = BottleneckAdapter.unmergeable

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self.wire = wire

    def forward(self, x: Any, y: Any, base: nn.Module) -> Any:
        """Keep x, return y."""
        self.wire.x = x
        return y


class ParallelBottleneck(BottleneckAdapter):
    """The adapter beside a sub-layer: `y + s up(act(down(x)))`.

    x is the module's own input, or, with a wire, that of the tap at its other end.
    """

    wire: Wire | None = None

    def forward(self, x: Any, y: Any = None, base: nn.Module | None = None) -> Any:
        """Return `y + change(x)`."""
        source = x if self.wire is None else self.wire.take()
        return changed(y, lambda _: self.change(source))


def changed(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Add the change to y, or to the first of a tuple."""
    if isinstance(y, tuple):
        return (changed(y[0], change), *y[1:])
    # y - (0 - change), not y + change: -0 stays -0, so that a change of 0 leaves every bit
    return y - (0.0 - change(y).to(y.dtype))


def _check(reduction: float, activation: str, scaling: float) -> None:
    if not isinstance(reduction, int | float) or not reduction > 0:
        raise ValueError(f"reduction must be a number above 0, got {reduction!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    if not isinstance(scaling, int | float) or not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling must be a finite number other than 0, got {scaling!r}")


@register_adapter("BOTTLENECK")
@dataclass(frozen=True)
class BottleneckConfig:
    """Bottleneck adapters at the sub-layers of a model.

    The patterns have the forms of LoRAConfig.targets. Where they are None, the model must be of a
    family in `FAMILIES`, told by its names: this library's decoder and transformers' Llama-, BERT-,
    GPT-2- and OPT-like models are.

    Raises:
        ValueError: a value out of range, or a pattern that the placement has no use for.
    """

    reduction: float = 16
    """The adapter's middle has floor(d / reduction) units."""
    activation: str = "gelu"
    """Non-linearity: "gelu" (exact), "gelu_tanh", "relu", "leaky_relu", "silu" or "tanh"."""
    placement: str = "pfeiffer"
    """Where: "houlsby" (two a layer), "pfeiffer" (after the feed-forward), "parallel" (beside)."""
    scaling: float = 1.0
    """Factor s on what the adapter adds; He et al. use 4 in the parallel placement."""
    attention: Targets | None = None
    """Modules whose output an attention sub-layer adds to the residual (houlsby)."""
    feed_forward: Targets | None = None
    """Modules whose output a feed-forward sub-layer adds to the residual."""
    feed_forward_input: Targets | None = None
    """Modules whose input is the sub-layer's, one each (parallel); None: feed_forward's input."""
    exclude: Targets | None = None
    """Modules to leave out of all that the patterns above match."""

    def __post_init__(self) -> None:
        _check(self.reduction, self.activation, self.scaling)
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, "
                f"got {self.placement!r}"
            )
        for option, placement in (("attention", "houlsby"), ("feed_forward_input", "parallel")):
            if getattr(self, option) is not None and self.placement != placement:
                raise ValueError(
                    f"{option} belongs to placement={placement!r}; this is {self.placement!r}"
                )
        if self.feed_forward_input is not None and self.feed_forward is None:
            raise ValueError("feed_forward_input needs feed_forward beside it")

    def build(self, name: str, module: nn.Module) -> Adapter:
        """Return the adapter for one module whose output it changes.

        Args:
            name: the module's name, for messages.
            module: one with a known output size.

        Returns:
            The adapter.

        Raises:
            ValueError: the output size cannot be told.
        """
        kind = ParallelBottleneck if self.placement == "parallel" else BottleneckAdapter
        return kind(_out_features(name, module), self.reduction, self.activation, self.scaling)

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the adapters of all sites; see `add_adapter`."""
        modules = {name: unwrap(module) for name, module in sites(model)}
        ends = self._select(model, "feed_forward")
        starts = self._starts(model, ends)
        if self.placement == "houlsby":
            ends = ends + self._select(model, "attention")
        left_out = set(self._select(model, "exclude")) if self.exclude is not None else set()
        built: dict[str, Adapter] = {}
        for i, end in enumerate(ends):
            start = starts[i] if starts else end
            if left_out & {start, end}:
                continue
            adapter = built[end] = self.build(end, modules[end])
            if start != end and isinstance(adapter, ParallelBottleneck):
                adapter.wire = Wire()
                built[start] = Tap(adapter.wire)
        return {name: built[name] for name in modules if name in built}

    def _starts(self, model: nn.Module, ends: list[str]) -> list[str]:
        """Where the inputs of parallel adapters are, one for each end; none: at the ends."""
        if self.placement != "parallel":
            return []
        if self.feed_forward is not None and self.feed_forward_input is None:
            return []
        starts = self._select(model, "feed_forward_input")
        if len(starts) != len(ends):
            raise ValueError(
                f"feed_forward_input matches {len(starts)} modules and feed_forward {len(ends)}: "
                "every sub-layer needs both"
            )
        return starts

    def _select(self, model: nn.Module, option: str) -> list[str]:
        """Names of the modules that an option means, the family's where it is None."""
        pattern: Targets | None = getattr(self, option)
        if pattern is None:
            pattern = cast(str, getattr(_family(model), option))
        return select_modules(model, pattern, kind=lambda module: True, option=option)


def _family(model: nn.Module) -> Family:
    """The family that the model's names belong to."""
    names = [name for name, _ in sites(model) if name]
    for family in FAMILIES.values():
        if any(re.fullmatch(family.feed_forward, name) for name in names):
            return family
    known = ", ".join(FAMILIES)
    raise ValueError(
        f"the model's names are of no known family ({known}): name the modules that end its "
        f"feed-forward sub-layers with feed_forward=[…]; {nearest('down_proj', names)}"
    )


def _out_features(name: str, module: nn.Module) -> int:
    """Size of a module's output vectors: its own (a norm's is its weight's), or the last inside."""
    weight = getattr(module, "weight", None)
    own = getattr(module, "out_features", None)
    own = len(weight) if isinstance(weight, Tensor) and weight.dim() == 1 else own
    # transformers' Conv1D calls it nf
    inside = [getattr(part, "out_features", getattr(part, "nf", None)) for part in module.modules()]
    found = [size for size in (*inside, own) if isinstance(size, int)]
    if not found:
        raise ValueError(
            f"{name!r} ({type(module).__name__}) does not say how large its output is: "
            "name a module with out_features"
        )
    return found[-1]
