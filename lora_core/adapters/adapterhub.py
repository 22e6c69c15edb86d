r"""Bottleneck adapters where the `adapters` library (AdapterHub) has them: at the residual sum.

With h a sub-layer's output (after its dropout), r the residual it is added to, f the bottleneck
s·up(act(down(·))) and LN the norm that a post-norm model (BERT) puts after the sum, a layer goes on
with

    sees          AdapterHub's name      post-norm (BERT)         pre-norm (Llama, GPT-2)
    "output"      double_seq_bn          LN(h + f(h) + r)         h + f(h) + r
    "sum"         seq_bn                 LN(h + f(LN(h + r)) + r) h + f(h + r) + r
    "residual"    par_bn                 LN(h + f(r) + r)         h + f(r) + r
    "normed"      (AdapterPlus)          u + f(u), u = LN(h + r)  -

in its feed-forward sub-layer, its attention sub-layer, or both. BottleneckConfig's placements are
those of the papers, and only some of them are in this table:

* "houlsby" is "output" in both sub-layers. In training BERT's dropout is here before the adapter.
* "pfeiffer" is "output" after the feed-forward. seq_bn, which bears Pfeiffer's name there, is
  "sum": the same weights give other outputs.
* "parallel" is "residual" in BERT alone: in a pre-norm model its x is the normalized input of the
  feed-forward, and r is not normalized.

No forward is replaced. The site is the module that ends the sub-layer, and r comes by a wire
(bottleneck.py): in a pre-norm model it is the input of the norm before the sub-layer. For "sum" in
BERT the adapter calls LN itself, once more than the model does.

The library's own start (both matrices N(0, 0.02)) changes the model at once; here `up` starts at
zero, as its "mam_adapter" does.

Ref: Pfeiffer et al. 2020, arXiv:2005.00247; Houlsby et al. 2019, arXiv:1902.00751; He et al. 2021,
arXiv:2110.04366; the table is that of `adapters` 1.3, methods/modeling.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.bottleneck import (
    BottleneckAdapter,
    Tap,
    Wire,
    changed,
)
from lora_core.adapters.config import register_adapter
from lora_core.targets import sites, unwrap

__all__ = ["LAYOUTS", "AdapterHubConfig", "HubBottleneck", "Layout", "Place", "layout_of"]

SEES = ("output", "sum", "residual", "normed")
GAINS = ("learned", "channel")


class Place(NamedTuple):
    """Modules of one sub-layer, by their names within a layer.

    Attributes:
        end: its output is h.
        last: the last linear layer before the end, where BottleneckConfig's adapters are.
        start: its input is r.
        norm: a module with a weight of the hidden size; in a post-norm model LN.
        key: what AdapterHub calls the place, for keys on disk.
    """

    end: str
    last: str
    start: str
    norm: str
    key: str


class Layout(NamedTuple):
    """Where a family of models has what the adapters need.

    Attributes:
        layer: regular expression for a layer's name; its last group is the number.
        post_norm: whether the norm comes after the sum.
        attention: of the attention sub-layer.
        feed_forward: of the feed-forward sub-layer.
        without: names within a layer that tell of another wiring.
        types: `model_type` of the models that AdapterHub wires in this way.
    """

    layer: str
    post_norm: bool
    attention: Place
    feed_forward: Place
    without: tuple[str, ...]
    types: tuple[str, ...]


LAYOUTS = {
    "BERT": Layout(
        r"(.*\.)?layer\.(\d+)",
        True,
        Place(
            "attention.output.dropout",
            "attention.output.dense",
            "attention.self",
            "attention.output.LayerNorm",
            "attention.output.adapters",
        ),
        Place(
            "output.dropout", "output.dense", "intermediate", "output.LayerNorm", "output.adapters"
        ),
        ("crossattention",),
        ("bert", "electra", "roberta", "xlm-roberta"),
    ),
    "Llama": Layout(
        r"(.*\.)?layers\.(\d+)",
        False,
        Place(
            "self_attn",
            "self_attn.o_proj",
            "input_layernorm",
            "input_layernorm",
            "attention_adapters.adapters",
        ),
        Place(
            "mlp",
            "mlp.down_proj",
            "post_attention_layernorm",
            "post_attention_layernorm",
            "output_adapters.adapters",
        ),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm", "crossattention"),
        ("llama", "mistral", "qwen2", "qwen3"),
    ),
    "GPT-2": Layout(
        r"(.*\.)?h\.(\d+)",
        False,
        Place("attn", "attn.c_proj", "ln_1", "ln_1", "attention_adapters.adapters"),
        Place("mlp", "mlp.c_proj", "ln_2", "ln_2", "output_adapters.adapters"),
        ("crossattention",),
        ("gpt2",),
    ),
}


class HubBottleneck(BottleneckAdapter):
    """The bottleneck with AdapterHub's width, learned scalings, dropout and inputs.

    Args:
        dim: d.
        reduction: m = d // reduction units in the middle, one at least.
        activation: a key of `ACTIVATIONS`.
        scaling: a number, "learned" (one trained factor, from 1) or "channel" (one per element).
        dropout: probability of dropping an element of what is added, in training.

    Attributes:
        gain: (1,) or (d,) float32 where the scaling is learned, else None.
        wire: where r comes from; None: the adapter sees h alone.
        with_output: whether it sees h + r and not r.
        norm: (module, name) of the norm that h + r goes through; looked up at every call, so that
            it may be adapted itself.
    """

    wire: Wire | None = None
    with_output = False
    norm: tuple[nn.Module, str] | None = None

    def __init__(
        self,
        dim: int,
        reduction: float,
        activation: str,
        scaling: float | str,
        dropout: float = 0.0,
    ) -> None:
        learned = isinstance(scaling, str)
        super().__init__(dim, reduction, activation, 1.0 if isinstance(scaling, str) else scaling)
        gain = torch.ones(dim if scaling == "channel" else 1, dtype=torch.float32, device="cpu")
        self.gain = nn.Parameter(gain) if learned else None
        self.dropout = dropout

    @staticmethod
    def width(dim: int, reduction: float) -> int:
        """Return m = max(1, dim // reduction)."""
        return max(1, int(dim // reduction))

    def change(self, x: Tensor) -> Tensor:
        """Return `s up(act(down(x)))`, (…, d)."""
        out = super().change(x)
        if self.gain is not None:
            out = out * self.gain.to(out.dtype)
        return F.dropout(out, self.dropout, self.training) if self.dropout else out

    def forward(self, x: Any, y: Any = None, base: nn.Module | None = None) -> Any:
        """Return h + f(what it sees).

        Args:
            x: the site's input, not used.
            y: h, (…, d), or a tuple that begins with it.
            base: the module (not needed here).

        Returns:
            Like y.
        """
        return changed(y, lambda h: self.change(self._seen(h)))

    def _seen(self, h: Tensor) -> Tensor:
        if self.wire is None:
            return h
        r = self.wire.take()
        if not self.with_output:
            return r
        return h + r if self.norm is None else getattr(*self.norm)(h + r)


@register_adapter("ADAPTERHUB")
@dataclass(frozen=True)
class AdapterHubConfig:
    """Bottleneck adapters at the residual sums of a BERT-, Llama- or GPT-2-like model.

    Raises:
        ValueError: a value out of range.
    """

    reduction: float | dict[str, float] = 16
    """The middle has d // reduction units; or {layer's number or "default": reduction}."""
    activation: str = "relu"
    """Non-linearity: "gelu" (exact), "gelu_tanh", "relu", "leaky_relu", "silu" or "tanh"."""
    sees: str = "sum"
    """What the adapter sees: "output" h, "sum" h + r, "residual" r, or "normed" LN(h + r)."""
    attention: bool = False
    """Whether attention sub-layers have one."""
    feed_forward: bool = True
    """Whether feed-forward sub-layers have one."""
    scaling: float | str = 1.0
    """Factor s on what is added, "learned" (one trained factor) or "channel" (one per element)."""
    dropout: float = 0.0
    """Probability of dropping an element of what is added, in training."""
    leave_out: list[int] = field(default_factory=list)
    """Numbers of the layers without adapters, from 0."""

    def __post_init__(self) -> None:
        if self.sees not in SEES:
            raise ValueError(f"sees must be one of {', '.join(map(repr, SEES))}, got {self.sees!r}")
        if isinstance(self.scaling, str) and self.scaling not in GAINS:
            raise ValueError(
                f"scaling must be a number, 'learned' or 'channel', got {self.scaling!r}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if not (self.attention or self.feed_forward):
            raise ValueError("attention and feed_forward are both False: no adapter is left")

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        """Raise: the place of an adapter is told by the whole model (`build_all`)."""
        raise TypeError("AdapterHubConfig needs the whole model: use add_adapter(model, config)")

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the adapters of all sites; see `add_adapter`."""
        layout, layers = layout_of(model)
        if unknown := sorted(set(self.leave_out) - layers.keys()):
            raise ValueError(
                f"leave_out: the model has no layer {unknown[0]}, only 0 … {max(layers)}"
            )
        modules = {name: unwrap(module) for name, module in sites(model)}
        built: dict[str, Adapter] = {}
        for number, layer in layers.items():
            for place in self.places(layout):
                if number not in self.leave_out:
                    built |= self._at(layout, modules, number, layer, place)
        return {name: built[name] for name in modules if name in built}

    def places(self, layout: Layout) -> list[Place]:
        """The sub-layers that have an adapter."""
        wanted = ((layout.attention, self.attention), (layout.feed_forward, self.feed_forward))
        return [place for place, there in wanted if there]

    def site(self, place: Place) -> str:
        """Name, within a layer, of the module that the adapter of a place is at."""
        return place.norm if self.sees == "normed" else place.end

    def _at(
        self,
        layout: Layout,
        modules: Mapping[str, nn.Module],
        number: int,
        layer: str,
        place: Place,
    ) -> dict[str, Adapter]:
        """The adapter of one sub-layer, and its tap where it has one, by site."""
        if self.sees == "normed" and not layout.post_norm:
            raise ValueError('sees="normed" is for models with the norm after the sum, as BERT')
        weight: Any = modules[f"{layer}.{place.norm}"].weight  # (d,)
        adapter = HubBottleneck(
            len(weight), self._reduction(number), self.activation, self.scaling, self.dropout
        )
        site = f"{layer}.{self.site(place)}"
        if self.sees in ("output", "normed"):
            return {site: adapter}
        adapter.wire, adapter.with_output = Wire(), self.sees == "sum"
        if layout.post_norm and adapter.with_output:
            parent, name = f"{layer}.{place.norm}".rsplit(".", 1)
            adapter.norm = (modules[parent], name)
        return {f"{layer}.{place.start}": Tap(adapter.wire), site: adapter}

    def _reduction(self, number: int) -> float:
        if not isinstance(self.reduction, Mapping):
            return self.reduction
        found = self.reduction.get(str(number), self.reduction.get("default"))
        if found is None:
            raise ValueError(f"reduction says nothing of layer {number}: add a 'default'")
        return found


def layout_of(model: nn.Module) -> tuple[Layout, dict[int, str]]:
    """Tell a model's layout by the names of its modules.

    Args:
        model: any.

    Returns:
        (its layout, {number: name of the layer}).

    Raises:
        ValueError: the names are of no known layout, or of two stacks of layers.
    """
    names = {name for name, _ in sites(model)}
    for layout in LAYOUTS.values():
        layers: dict[int, str] = {}
        for name in sorted(names):
            match = re.fullmatch(layout.layer, name)
            if match is None or not _complete(layout, name, names):
                continue
            if int(match[2]) in layers:
                raise ValueError(
                    f"the model has two stacks of layers, at {name!r} too: not supported"
                )
            layers[int(match[2])] = name
        if layers:
            return layout, dict(sorted(layers.items()))
    raise ValueError(
        "the model's layers are wired like none of " + ", ".join(LAYOUTS) + ": AdapterHub's "
        "adapters have no place in it; BottleneckConfig(feed_forward=[…]) takes any names"
    )


def _complete(layout: Layout, layer: str, names: set[str]) -> bool:
    parts = {part for place in (layout.attention, layout.feed_forward) for part in place[:-1]}
    return all(f"{layer}.{part}" in names for part in parts) and not any(
        f"{layer}.{part}" in names for part in layout.without
    )
