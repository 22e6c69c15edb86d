"""What can become 4-bit: plain linear layers, and modules of stacked matrices, such as experts.

A module of many matrices is asked for by what it can do, not by its class, which lives with the
models: `matrices()` gives the matrices by name, `with_4bit(parts)` the module that holds them in 4
bits, whose `dense_module(dtype)` is the way back.
"""

from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from lora_core.quant.linear import NF4Linear
from lora_core.quant.nf4 import NF4Tensor, quantize_4bit

__all__ = ["Packable", "Unpackable", "can_be_4bit", "is_4bit", "made_4bit", "made_dense", "weights"]


@runtime_checkable
class Packable(Protocol):
    """A module of dense matrices that has a 4-bit form."""

    def matrices(self) -> dict[str, Tensor]:
        """Each matrix by its name in the module; they may share memory with its parameters."""

    def with_4bit(self, parts: dict[str, NF4Tensor]) -> nn.Module:
        """The module that takes this one's place, of these matrices in 4 bits."""


@runtime_checkable
class Unpackable(Protocol):
    """Its 4-bit form."""

    def dense_module(self, dtype: torch.dtype) -> nn.Module:
        """A frozen module of the dense matrices that the codes stand for."""


def can_be_4bit(module: nn.Module) -> TypeGuard[nn.Module]:
    """Whether a module is of the very class nn.Linear, or has a 4-bit form of its own."""
    return type(module) is nn.Linear or isinstance(module, Packable)


def is_4bit(module: nn.Module) -> bool:
    """Whether a module holds its matrices in 4 bits and knows its dense form."""
    return isinstance(module, NF4Linear) or (
        isinstance(module, Unpackable) and not isinstance(module, Packable)
    )


def weights(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors that would be quantized, by their names for messages."""
    own = [key for key in module._parameters if key != "bias"]
    return {f"{name}.{key}": module.get_parameter(key) for key in own}


def made_4bit(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    """The 4-bit module of a dense one, whose values were checked before.

    Args:
        module: a linear layer, or one with a 4-bit form.
        options: of `quantize_4bit`.
    """
    if isinstance(module, Packable):
        parts = {
            name: quantize_4bit(matrix, **options, check_finite=False)
            for name, matrix in module.matrices().items()
        }
        return module.with_4bit(parts)
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    packed = quantize_4bit(weight, **options, check_finite=False)
    return NF4Linear.from_tensor(packed, bias).train(module.training)


def made_dense(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The dense, frozen module of a 4-bit one.

    Args:
        module: 4-bit.
        dtype: of its weights; None: the bias's, and float32 without one.
    """
    if isinstance(module, Unpackable):
        return module.dense_module(dtype or torch.float32)
    assert isinstance(module, NF4Linear)
    own = torch.float32 if module.bias is None else module.bias.dtype
    size = (module.in_features, module.out_features)
    linear = nn.Linear(*size, bias=module.bias is not None, device="meta")
    weight = module.dense_weight(dtype or own)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
    return linear.train(module.training)
