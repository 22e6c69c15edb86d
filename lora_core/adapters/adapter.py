"""The contract of an adapter: what a kind has to say of itself, and what it gets for nothing.

An adapter sees the input of a module, its output so far and the module, which is enough for LoRA
(adds to y), for scalings (multiply y), for bottlenecks (run y through themselves) and for replaced
rows. Where it stands is the host's business (host.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Adapter"]


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
