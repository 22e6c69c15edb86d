"""The host: holds a module and its adapters, and stands where the module stood.

A host (`Adapted`) takes the place of a module in the model. It keeps the module untouched under
`.base` and any number of adapters under `.adapters`; its forward is

    y = base(x);    for each active adapter:  y = adapter(x, y, base)

PEFT makes one class per (method x layer type x quantization) and looks adapters up by names that
start with `lora_`. Here adapters are found by type, the base may be anything that can be called,
and only merging asks it for more: a dense weight (`dense_weight()`, or `.weight`).

A merged host holds a second, dense module beside the base and calls that one. The base never
changes, so unmerging is bit-exact by construction, disabling works while merged, and
`state_dict()` is the same merged and not. The price is the memory of one more weight while merged;
`keep_base=False` (merge.py) trades unmerging for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.layers import precision_of
from lora_core.targets import sites

__all__ = ["Adapted", "Merged", "Mixture", "adapted_modules", "check_name", "spelt"]


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
        return self.apply_adapters(rest, args, kwargs, module)

    def apply_adapters(
        self,
        names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        module: nn.Module | None = None,
    ) -> Any:
        """Return the output of the base under some of the adapters.

        Args:
            names: which, in order; of those that replace the base each is called in the place of
                what was before it.
            args: what the base is called with.
            kwargs: likewise.
            module: what is called as the base; None: the base.

        Returns:
            The output.
        """
        base: Callable[..., Any] = self.base if module is None else module
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
