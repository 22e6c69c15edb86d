r"""Prefix tuning: in every self-attention P trained keys and values before those of the text.

    attention([P_K; K], [P_V; V])        P_K, P_V (P, Hkv, D) in each of L layers

Every position sees the whole prefix. The keys and values come out of a network that all layers
share but for its last matrix,

    [P_K; P_V]_l = W_l tanh(W e + b) + b_l        e (P, C), W (h, C), W_l (2 Hkv D, h)

in all P C + hC + h + L · 2 Hkv D (h + 1) numbers. It is there to make training steady and can be
dropped afterwards: the file that PEFT reads holds the flat form, a further one the network
(checkpoint/soft_prompts). Flat from the start (`projection=False`) the keys and values are the
parameters, P · L · 2 Hkv D numbers, which want a learning rate some hundred times as high
(docs/soft-prompts.md has figures). With grouped-query attention key/value heads are counted.

A prefix is an adapter at each attention module, called in its place: it calls the module with a
cache that puts the prefix in front of whatever the module would have used, this call's keys or the
real cache's, and with a mask that is P columns wider. So the real cache holds the text alone, and
activation checkpointing needs nothing: the prefix is made inside the layer that is recomputed. PEFT
makes a cache for the whole model out of the prefix, which is why it refuses checkpointing. A
passive site at the embedding (`PrefixTokens`) holds what layers share and moves positions on by P
(soft_call.py), as a cache of P tokens would; keys of the prefix are not rotated, again as PEFT's.

The trade-off: keys and values are copied once per layer and call to stand behind the prefix, also
when one token looks back at a long cache. In a model with sliding windows the prefix stays visible
where PEFT's slides out.

Ref: Li and Liang 2021, arXiv:2101.00190, section 4.2 (equation 3) and 4.3 (the network); He et al.
2021, arXiv:2110.04366, section 3.1 (prefixes as an update beside attention).
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import register_adapter
from lora_core.adapters.ptuning import check_width
from lora_core.adapters.soft import SoftPrompt, check_positions, check_tokens, embedding_size
from lora_core.adapters.soft_call import CACHES, hook, unhook
from lora_core.targets import sites, unwrap
from lora_kernels import Documents

__all__ = ["Prefix", "PrefixTokens", "PrefixTuningConfig", "attention_modules"]

STARTS = ("normal", "zeros")
MASKS = ("mask", "attention_mask")
IMPLEMENTATIONS = (None, "sdpa", "eager")  # of transformers' attention, those with a dense mask


class Heads(NamedTuple):
    """What an attention module keeps of each token: key/value heads, and their size."""

    number: int
    size: int


@dataclass(frozen=True)
class Call:
    """How an attention module is called."""

    names: tuple[str, ...]
    """its forward's parameters, the hidden states first"""
    mask: str
    """the one that takes the mask"""
    cache: str
    """the one that takes the cache"""
    causal: bool
    """whether no mask means causal attention"""
    config: Any
    """transformers' configuration, which names the implementation; None: this library's"""

    @classmethod
    def of(cls, module: nn.Module) -> "Call | None":
        """What a module takes, or None if that is not a mask and a cache."""
        names = tuple(inspect.signature(module.forward).parameters)
        mask = next((name for name in MASKS if name in names), None)
        cache = next((name for name in CACHES if name in names), None)
        if mask is None or cache is None:
            return None
        causal = bool(getattr(module, "is_causal", True))
        return cls(names, mask, cache, causal, getattr(module, "config", None))

    def check(self, mask: object) -> None:
        """Refuse implementations of attention whose mask cannot be made wider."""
        kind = getattr(self.config, "_attn_implementation", None)
        if kind not in IMPLEMENTATIONS or not (mask is None or isinstance(mask, Tensor)):
            raise ValueError(
                f"a prefix needs attention with a dense mask, not {kind!r}: call "
                'model.set_attn_implementation("sdpa")'
            )


class PrefixTokens(SoftPrompt):
    """The prefix's site at the embedding: it says how long the prefix is.

    Args:
        tokens: P.
        size: C, the model's embedding size.
        hidden: h, width of the shared network; None: the prefix is flat.

    Attributes:
        inputs: e, (P, C), N(0, 1); with a network.
        hidden: W and b.
    """

    prepended = False

    def __init__(self, tokens: int, size: int, hidden: int | None = None) -> None:
        super().__init__(tokens)
        self.hidden = None
        if hidden is not None:
            self.inputs = nn.Parameter(torch.randn(tokens, size, device="cpu"))
            self.hidden = nn.Linear(size, hidden, device="cpu", dtype=torch.float32)

    def features(self) -> Tensor:
        """tanh(W e + b), (P, h) float32."""
        assert self.hidden is not None
        out: Tensor = torch.tanh(self.hidden(self.inputs))
        return out


class Prefix(Adapter):
    """The prefix's keys and values at one attention module.

    Args:
        heads: key/value heads and their size.
        call: how the attention module is called.
        shared: the site at the embedding.
        std: deviation of flat keys and values at the start.

    Attributes:
        key: (P, Hkv, D) float32, flat; with a network it is not there.
        value: likewise.
        up: W_l and b_l, with a network.
    """

    unmergeable = "a prefix adds keys and values to attention: no weight gives the same"
    mixes = None
    replaces = True

    def __init__(self, heads: Heads, call: Call, shared: PrefixTokens, std: float = 0.0) -> None:
        super().__init__()
        self.heads, self.call = heads, call
        self.shared = (shared,)  # not registered: its parameters are counted and saved at its site
        self.up = None
        if shared.hidden is not None:
            wide = 2 * heads.number * heads.size
            hidden = shared.hidden.out_features
            self.up = nn.Linear(hidden, wide, device="cpu", dtype=torch.float32)
        else:
            shape = (shared.tokens, *heads)
            self.key = nn.Parameter(torch.randn(shape, device="cpu") * std)
            self.value = nn.Parameter(torch.randn(shape, device="cpu") * std)

    def states(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (P, Hkv, D) float32 each, differentiable."""
        if self.up is None:
            return self.key, self.value
        weight = self.up.weight
        with torch.autocast(weight.device.type, enabled=False):
            both = self.up(self.shared[0].features().to(weight.device))  # (P, 2 Hkv D)
        key, value = both.view(len(both), 2, *self.heads).unbind(1)
        return key, value

    def replace(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the attention module with the prefix in front of its keys and values."""
        how = self.call
        call = {**dict(zip(how.names, args, strict=False)), **kwargs}
        mask, tokens = call.get(how.mask), call[how.names[0]].shape[1]
        if isinstance(mask, Documents):  # a GPU's kernels have no columns for a prefix
            mask = mask.dense()
        how.check(mask)
        key, value = (state.transpose(0, 1)[None] for state in self.states())  # (1, Hkv, P, D)
        causal = tokens if mask is None and tokens > 1 and how.causal else None
        call[how.cache] = _InFront(call.get(how.cache), key, value, causal)
        call[how.mask] = _wider(mask, key.shape[2], causal, key.device)
        return base(**call)


class _InFront:
    """What an attention module gets for a cache: the real one, or none, behind a prefix.

    Args:
        cache: the real one, or None.
        key: (1, Hkv, P, D).
        value: likewise.
        tokens: this call's tokens, where attention is causal without a mask: keys beyond them (the
            unused part of a cache of fixed size) are left out. None: all keys are kept.
    """

    def __init__(self, cache: Any, key: Tensor, value: Tensor, tokens: int | None) -> None:
        self.cache, self.prefix, self.tokens = cache, (key, value), tokens

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the real cache; return the prefix and all it holds, (B, Hkv, P + S, D)."""
        if self.cache is None:
            key, value = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:2]
        else:
            key, value = self.cache.update(*args, **kwargs)
        return self._behind(0, key), self._behind(1, value)

    def _behind(self, which: int, states: Tensor) -> Tensor:
        if self.tokens is not None:
            states = states[:, :, : self.tokens]
        front = self.prefix[which].to(states.device, states.dtype)
        return torch.cat([front.expand(len(states), -1, -1, -1), states], 2)

    def __getattr__(self, name: str) -> Any:
        """Anything else a module asks of a cache is the real one's."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.cache, name)


def _wider(
    mask: Tensor | None, count: int, causal: int | None, device: torch.device
) -> Tensor | None:
    """A mask (…, T, S) with `count` columns in front that everyone sees.

    Without a mask the operator's own causal path would count from the prefix's start; a mask that
    counts from the text's is made in its place, (1, 1, T, P + T).
    """
    if causal is not None:
        seen = torch.ones(causal, count + causal, dtype=torch.bool, device=device)
        return seen.tril(count)[None, None]
    if mask is None:
        return None
    # True, 1 or, added to scores, 0: all of them "look"
    visible = 0 if mask.is_floating_point() else 1
    return torch.cat([mask.new_full((*mask.shape[:-1], count), visible), mask], -1)


def attention_modules(model: nn.Module) -> dict[str, tuple[Heads, Call]]:
    """The self-attention modules of a model that a prefix can stand before, told by what they take.

    Args:
        model: any module.

    Returns:
        {name: (heads, how it is called)} of the modules with a `head_dim` whose forward takes a
        mask and a cache, in order.
    """
    found: dict[str, tuple[Heads, Call]] = {}
    seen: set[int] = set()
    for name, site in sites(model):
        module = unwrap(site)
        size = getattr(module, "head_dim", None)
        if id(module) in seen or not name or type(size) is not int:
            continue
        seen.add(id(module))
        call, count = Call.of(module), _kv_heads(module, size)
        if call and count is not None and not getattr(module, "is_cross_attention", False):
            found[name] = Heads(count, size), call
    return found


def _kv_heads(module: nn.Module, size: int) -> int | None:
    """Key/value heads: by the key projection's output, else by the configuration."""
    projections = [getattr(module, name, None) for name in ("k_proj", "v_proj")]
    sizes = {getattr(projection, "out_features", None) for projection in projections}
    if len(sizes) == 1 and type(wide := sizes.pop()) is int:
        return wide // size
    config = getattr(module, "config", None)
    for name in ("num_key_value_heads", "num_attention_heads"):
        if type(count := getattr(config, name, None)) is int and not any(projections):
            return count
    return None


@register_adapter("PREFIX_TUNING")
@dataclass(frozen=True)
class PrefixTuningConfig:
    """Trained keys and values before those of the text, in every self-attention of a model.

    Raises:
        ValueError: a value out of range.
    """

    num_virtual_tokens: int = 20
    """P, keys and values in front of the text's."""
    projection: bool = True
    """Make them by a network that is shared by all layers but for its last matrix; else flat."""
    hidden: int | None = None
    """That network's width h; None: 512."""
    init: str = "normal"
    """Start: "normal", or "zeros" (of the network, its last matrix)."""
    std: float = 0.02
    """Standard deviation of a flat prefix's normal start."""

    def __post_init__(self) -> None:
        check_tokens(self.num_virtual_tokens)
        check_width(self.hidden)
        if self.init not in STARTS:
            raise ValueError(
                f"init must be one of {', '.join(map(repr, STARTS))}, got {self.init!r}"
            )
        if self.hidden is not None and not self.projection:
            raise ValueError("hidden is the network's width: a flat prefix has none")
        if (
            not isinstance(self.std, int | float)
            or not math.isfinite(self.std)
            or not self.std >= 0
        ):
            raise ValueError(f"std must be a finite number, 0 or more; got {self.std!r}")

    def build(self, name: str, module: nn.Module) -> Adapter | None:
        """Return None: a prefix is made for all layers at once (`build_all`)."""
        return None

    def build_all(self, model: nn.Module) -> dict[str, Adapter]:
        """Return the site at the embedding and one at each self-attention; see `add_adapter`."""
        embedding, weight = embedding_size(model)
        found = attention_modules(model)
        if not found:
            raise ValueError(
                f"a prefix needs self-attention modules with a head_dim whose forward takes a mask "
                f"and a cache (past_key_values); {type(model).__name__} has none"
            )
        shapes = dict.fromkeys(heads for heads, _ in found.values())
        if len(shapes) > 1:
            kinds = ", ".join(f"{number} × {size}" for number, size in shapes)
            raise ValueError(
                f"a prefix needs the same key/value heads in every layer; this model has {kinds}"
            )
        check_positions(model)
        hidden = (self.hidden or 512) if self.projection else None
        shared = PrefixTokens(self.num_virtual_tokens, weight.shape[1], hidden)
        std = self.std if self.init == "normal" else 0.0
        layers = {name: Prefix(*attention, shared, std) for name, attention in found.items()}
        if self.init == "zeros":
            for layer in layers.values():
                if layer.up is not None:
                    nn.init.zeros_(layer.up.weight)
                    nn.init.zeros_(layer.up.bias)
        return {embedding: shared, **layers}

    def installed(self, model: nn.Module) -> None:
        """Hook the model; `add_adapter` calls this last."""
        hook(model)

    def removed(self, model: nn.Module) -> None:
        """Take the hooks away with the last soft prompt."""
        unhook(model)
