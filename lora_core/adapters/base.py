"""The contract between an adapter, the module it changes, and the host that holds both.

A host (`Adapted`) takes the place of a module in the model. It keeps the module untouched under
`.base` and any number of adapters under `.adapters`; its forward is

    y = base(x);    for each active adapter:  y = adapter(x, y, base)

so an adapter sees the input, the output so far and the module, which is enough for LoRA (adds to
y), for scalings (multiply y), for bottlenecks (run y through themselves) and for replaced rows.

PEFT makes one class per (method x layer type x quantization) and looks adapters up by names that
start with `lora_`. Here adapters are found by type, the base may be anything that can be called,
and only merging asks it for more: a dense weight (`dense_weight()`, or `.weight`).

A merged host holds a second, dense module beside the base and calls that one. The base never
changes, so unmerging is bit-exact by construction, disabling works while merged, and
`state_dict()` is the same merged and not. The price is the memory of one more weight while merged;
`keep_base=False` (merge.py) trades unmerging for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from lora_core.targets import sites

__all__ = [
    "Adapted",
    "Adapter",
    "Merged",
    "adapted_modules",
    "check_name",
    "compute_dtype",
    "dense_weight",
    "is_linear",
    "linear_features",
    "precision_of",
    "spelt",
]


class Adapter(nn.Module):
    """One kind of adapter at one site; its parameters are what is trained.

    Parameters are float32 and stay so through `model.to(dtype)`, `.half()` and the like: an
    optimizer that adds 1e-5 to a bfloat16 weight of 1.0 adds nothing. They are cast at use.

    Attributes:
        unmergeable: why this kind cannot be folded into a weight, or None when it can
            (then `merged` is there).
        additive: whether it adds to y something that depends on x alone, so that the order of
            adapters does not matter.
        keeps_ties: whether it is built to treat all holders of a tied weight alike; any other
            adapter that could be merged is refused on a tied weight.
        replaces: whether it is called in the base's place (`replace`) instead of after it.
        alone: whether no other adapter may be active at its module: it is defined on the base.
        mixes: how rows of one batch may name it (`adapter_rows`): "grouped" for a kind whose rows
            are computed together, "loop" for one that is run on its own rows, None for neither.
        trained: names of the parameters that are trained (set when it is attached): those that
            required gradients when it was built.
        trained_on: precision of the base that it was trained on (`precision_of`); set when it is
            attached, or read from disk.
        config: the configuration that built it; set by `add_adapter`, written by `save_adapter`.
    """

    unmergeable: str | None = None
    additive: bool = False
    keeps_ties: bool = False
    replaces: bool = False
    alone: bool = False
    mixes: str | None = "loop"
    trained: tuple[str, ...] = ()
    trained_on: str | None = None
    config: Any = None

    def forward(self, x: Any, y: Any, base: nn.Module) -> Any:
        """Return the changed output.

        Args:
            x: the base's first input.
            y: the output so far: the base's, or that of the adapter before.
            base: the wrapped module.

        Returns:
            The output, of y's shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, y, base)")

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias with which the base alone gives the adapted output.

        Args:
            weight: the base's dense weight, float32 (float64 if the base is), not to be changed.
            bias: its bias in the same dtype, or None.

        Returns:
            (weight, bias), in the same dtype; rounding to the target dtype is the caller's.
        """
        raise NotImplementedError(f"{type(self).__name__} has no merged(weight, bias)")

    def rebase(self, base: nn.Module) -> None:
        """Take anew what was derived from the base's weight: `load_state_dict` changed it."""

    def replace(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output in the base's place; for a kind that `replaces`.

        Args:
            base: the wrapped module.
            args: all that it was called with.
            kwargs: likewise.

        Returns:
            What the base would have returned.
        """
        raise NotImplementedError(f"{type(self).__name__} has no replace(base, args, kwargs)")

    def merged_module(self, base: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """Return a module that does the same, for a kind whose merge is no weight and bias.

        Args:
            base: the wrapped module, not to be changed.
            dtype: of the new module's floating-point parameters.

        Returns:
            The module, or None: `merged` makes its weight.
        """
        return None

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, by the name it has on disk (default: the parameters)."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what was saved.

        Args:
            tensors: by the names of `tensors`, all of them, in their shapes. This copies into the
                tensors that `tensors` returns; a kind that saves others overrides it.
        """
        for key, own in self.tensors().items():
            own.copy_(tensors[key])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, not changes of dtype."""

        def keep_dtype(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype != t.dtype else out

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # torch's


def spelt(site: str) -> str:
    """A module's name for a message; the model itself, which has none, is "this layer"."""
    return repr(site) if site else "this layer"


def check_name(name: str) -> None:
    """Refuse an adapter name that could not be a key of `.adapters`; ValueError says why."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name an adapter: it must be text without dots, and none of "
            "nn.ModuleDict's own names ('keys', 'type', 'train', …)"
        )


def _rebase(host: nn.Module, _: object) -> None:
    for adapter in cast("Adapted", host).adapters.values():
        cast(Adapter, adapter).rebase(cast("Adapted", host).base)


Mixture: TypeAlias = Callable[["Adapted", tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Merged:
    """What a merged host holds.

    Attributes:
        names: the adapters that are in the weight.
        module: what is called instead of the base; None when the base itself was replaced by it
            (`keep_base=False`), after which there is no way back.
    """

    names: tuple[str, ...]
    module: nn.Module | None

    @property
    def way_back(self) -> str:
        """What to call before the adapters can be changed, for messages."""
        if self.module is not None:
            return "call unmerge_adapters"
        return "the base was not kept, so call unload_adapters"


def _instead(adapter: Adapter, base: Any, *args: Any, **kwargs: Any) -> Any:
    return adapter.replace(base, args, kwargs)


class Adapted(nn.Module):
    """Host: stands where its base stood and applies the active adapters to the base's output.

    Attributes the host lacks (`in_features`, `weight`, …) are looked up on the base.

    Args:
        base: any module whose first input is what the adapters see; kept as it is.

    Attributes:
        base: the wrapped module.
        adapters: all adapters at this site by name.
        active: the names that are applied, in order.
        enabled: False inside `disable_adapters`.
        merged: what is merged, or None.
        mixture: inside `adapter_rows` what runs the rows of a batch, (host, args, kwargs) -> y.
        stacks: what `adapter_rows` keeps of the adapters for the next batch, or None.
    """

    wraps = "base"
    base: nn.Module
    adapters: nn.ModuleDict

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.enabled = True
        self.merged: Merged | None = None
        self.mixture: Mixture | None = None
        self.stacks: object = None
        # not `train(mode)`, which would set the parts of a base whose modes differ
        self.training = self.adapters.training = base.training
        self.register_load_state_dict_post_hook(_rebase)  # type: ignore[no-untyped-call]  # torch's

    def attach(self, name: str, adapter: Adapter) -> None:
        """Add an adapter (inactive): float32 and on the base's device from here on.

        Args:
            name: its name; free at this host, without dots, and none that nn.ModuleDict uses.
            adapter: the adapter.

        Raises:
            ValueError: a name that cannot be used, or is taken.
        """
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"the adapter name {name!r} is taken here")
        tensor = next((t for t in (*self.base.parameters(), *self.base.buffers())), None)
        for parameter in adapter.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if tensor is not None:
            adapter.to(tensor.device)
        adapter.trained = tuple(k for k, p in adapter.named_parameters() if p.requires_grad)
        adapter.trained_on = adapter.trained_on or precision_of(self.base)
        if adapter.training != self.training:
            adapter.train(self.training)
        self.adapters[name] = adapter

    def adapter(self, name: str) -> Adapter:
        """Return one of the adapters, typed."""
        return cast(Adapter, self.adapters[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base (or what it was merged into), then every active adapter in order."""
        if not self.enabled:
            return self.base(*args, **kwargs)
        if self.mixture is not None:
            return self.mixture(self, args, kwargs)
        merged = self.merged
        if merged is None:
            return self.apply_adapters(self.active, args, kwargs)
        module = merged.module or self.base
        rest = [name for name in self.active if name not in merged.names]
        return self._after(module(*args, **kwargs), rest, args, kwargs)

    def apply_adapters(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the output of the base under some of the adapters.

        Args:
            names: which, in order; of those that replace the base each is called in the place of
                what was before it.
            args: what the base is called with.
            kwargs: likewise.

        Returns:
            The output.
        """
        base: Callable[..., Any] = self.base
        rest: list[str] = []
        for name in names:
            if (adapter := self.adapter(name)).replaces:
                base = partial(_instead, adapter, base)
            else:
                rest.append(name)
        return self._after(base(*args, **kwargs), rest, args, kwargs)

    def _after(
        self, y: Any, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run adapters on an output."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        for name in names:
            y = self.adapters[name](x, y, self.base)
        return y

    def merge(
        self, dtype: torch.dtype | None = None, requantize: bool = False, keep_base: bool = True
    ) -> Any:
        """Merge the active adapters of this host: `merge_adapters(self, …)`, its report."""
        from lora_core.adapters.merge import merge_adapters

        return merge_adapters(self, None, dtype, requantize, keep_base)

    def unmerge(self) -> None:
        """Drop what `merge` made: `unmerge_adapters(self)`."""
        from lora_core.adapters.merge import unmerge_adapters

        unmerge_adapters(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but what can be made again."""
        return {**self.__dict__, "stacks": None}

    def __getattr__(self, name: str) -> Any:
        """Look up on the base what the host lacks; never special methods."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base"), name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the merged module too: it is no child, so that `state_dict` does not show it."""
        if recurse and self.merged is not None and self.merged.module is not None:
            self.merged.module._apply(fn)  # type: ignore[no-untyped-call]  # torch's
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Refuse new weights under a merged one, which would not see them."""
        if self.merged is not None:
            prefix, errors = args[1], args[6]
            errors.append(f"{spelt(prefix[:-1])} is merged: {self.merged.way_back} first")
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Say what is active, and what is merged."""
        merged = f", merged={list(self.merged.names)}" if self.merged is not None else ""
        return f"active={self.active}{merged}"


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every host in the model under the name of the module it stands for.

    Args:
        model: any module.

    Yields:
        (name in the original model, host), each host once; a nested host follows its outer one.
    """
    seen: set[int] = set()
    for name, module in sites(model):
        while isinstance(module, Adapted) and id(module) not in seen:
            seen.add(id(module))
            yield name, module
            module = module.base  # noqa: PLW2901


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear-like: an nn.Linear, or the contract of four.

    The contract: `in_features`, `out_features`, `forward` (x W^T + b), and `dense_weight()`, which
    returns the weight as float32 (out_features, in_features). NF4Linear fulfils it.
    """
    return isinstance(module, nn.Linear) or (
        callable(getattr(module, "dense_weight", None))
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear-like module."""
    return int(getattr(module, "in_features")), int(getattr(module, "out_features"))  # noqa: B009


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of a module as a dense tensor in float32, or float64 if it is stored so.

    Args:
        module: one with `dense_weight()` or with a floating `.weight`.

    Returns:
        The weight, detached; may share memory with the module's.

    Raises:
        TypeError: the module has neither.
    """
    expand = getattr(module, "dense_weight", None)
    if callable(expand):
        return expand()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(
            f"{type(module).__name__} has no dense weight: it needs dense_weight() or a "
            "floating-point .weight"
        )
    return weight.detach().to(torch.promote_types(torch.float32, weight.dtype))


def precision_of(module: nn.Module) -> str | None:
    """In what precision a module holds its weight: what it says itself, else its dtype.

    Args:
        module: any; NF4Linear says "nf4, block 64, double quantization".

    Returns:
        Such as "bfloat16", or None for a module without a floating-point parameter.
    """
    own = getattr(module, "precision", None)
    if isinstance(own, str):
        return own
    dtypes = (p.dtype for p in module.parameters() if p.is_floating_point())
    first = next(dtypes, None)
    return None if first is None else str(first).removeprefix("torch.")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a linear layer computes on x: autocast's where active, else x's."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
