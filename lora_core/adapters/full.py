"""Full copies of chosen modules, trained whole beside the adapter (`modules_to_save`).

A new classification head, a norm, an embedding: small or new modules that are better trained
themselves than through a low-rank update. The host calls the copy in the base's place; the base
stays as it was, for other adapters and for disabling. The copy's parameters are float32 and are
cast to the base's dtype when it is called, so that a bfloat16 model computes in bfloat16 while the
optimizer adds to float32 (PEFT keeps the copy in the base's dtype, where a step of 1e-5 is lost).
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.host import Adapted

__all__ = ["FullCopy"]


class FullCopy(Adapter):
    """A trained copy of a module, called in its place.

    Args:
        module: what to copy: floating-point parameters, no adapters inside.

    Attributes:
        copy: the module; float32.

    Raises:
        ValueError: no floating-point parameter, 4-bit weights, or adapters inside.
    """

    replaces = True
    alone = True
    mixes = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        kind = type(module).__name__
        dtypes = {p.dtype for p in module.parameters()}
        if not dtypes or not all(dtype.is_floating_point for dtype in dtypes):
            raise ValueError(
                f"{kind} cannot be copied for training: it holds {_told(dtypes)}, and a trained "
                "copy needs floating-point parameters"
            )
        if any(isinstance(part, Adapted) for part in module.modules()):
            raise ValueError(f"{kind} cannot be copied for training: adapters are inside it")
        self.copy = copy.deepcopy(module).requires_grad_(True)
        for parameter in self.copy.parameters():  # before what was saved is copied in
            parameter.data = parameter.data.float()
        self.training = module.training  # its parts keep their modes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves; buffers, such as running means, follow changes of dtype as the base's."""
        before = [
            (part, key, buffer)
            for part in self.copy.modules()
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        super()._apply(fn, recurse)
        for part, key, buffer in before:
            part._buffers[key] = fn(buffer)
        return self

    def replace(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the copy, its parameters cast to the base's dtypes."""
        theirs = dict(base.named_parameters())
        cast = {
            name: own.to(theirs[name].dtype)
            for name, own in self.copy.named_parameters()
            if name in theirs and theirs[name].dtype != own.dtype
        }
        return (
            functional_call(self.copy, cast, args, kwargs) if cast else self.copy(*args, **kwargs)
        )

    def forward(self, x: Any, y: Any, base: nn.Module) -> Any:
        """Return y: the copy was called already."""
        return y

    def merged_module(self, base: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return a frozen copy with parameters in `dtype`."""
        return copy.deepcopy(self.copy).to(dtype).requires_grad_(False).train(base.training)

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's state under its own names, as PEFT does."""
        return dict(self.copy.state_dict(keep_vars=True))


def _told(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype) for dtype in dtypes)) or "no parameters"
