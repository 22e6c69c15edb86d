"""Copies of base weights that PEFT puts into an adapter's file.

    <site>.base_layer.weight            an embedding or head that is a target, or was resized
    <site>.weight                       the other of the two, where one was resized
    <site>.original_module.bias, <site>.modules_to_save.bias, <module>.bias       bias="all"
    <site>.original_module.<part>.bias, <site>.modules_to_save.<adapter>.<part>.bias     likewise

They say nothing that the model does not hold, and are left out where they equal its own; where they
differ, the adapter belongs to another base.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lora_core.checkpoint.lora_options import PEFT_PREFIX
from lora_core.targets import sites, unwrap

__all__ = ["without_base_copies"]

# what PEFT's wrappers put between a module's name and its parameter's
_WRAPPERS = (".token_adapter.base_layer", ".base_layer")
_ORIGINAL = ".original_module."
_TWICE = ".modules_to_save."  # bias="all": the bias of a copied module, there already without this


def without_base_copies(
    model: nn.Module, tensors: Mapping[str, Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    """Leave out copies of the model's own weights.

    Args:
        model: the base model.
        tensors: a file's.
        wanted: keys that the adapter needs, which are no copies.

    Returns:
        The rest.

    Raises:
        ValueError: a copy differs from the model's own.
    """
    modules = dict(sites(model))
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if _is_double(key, tensor, tensors):
            continue
        name = None if key in wanted else _parameter_name(key)
        site, _, parameter = (name or "").rpartition(".")
        own = getattr(unwrap(modules[site]), parameter, None) if site in modules else None
        if name is None or not isinstance(own, Tensor):
            rest[key] = tensor
        elif own.shape != tensor.shape or not _same(own.cpu(), tensor):
            raise ValueError(
                f"{key!r} is not the {parameter} that {site!r} has: the adapter belongs to another "
                "base, or to one whose vocabulary was changed; if the file's rows are meant, copy "
                "them into the model first"
            )
    return rest


def _parameter_name(key: str) -> str | None:
    """Name of the base parameter that a key may be a copy of."""
    plain = key.removeprefix(PEFT_PREFIX).replace(_ORIGINAL, ".", 1)
    site, _, parameter = plain.rpartition(".")
    for wrapper in _WRAPPERS:
        site = site.removesuffix(wrapper)
    return f"{site}.{parameter}" if site and parameter in ("weight", "bias") else None


def _same(own: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors are equal, where one is the other rounded to fewer bits."""
    return torch.equal(own, tensor.to(own.dtype)) or torch.equal(own.to(tensor.dtype), tensor)


def _is_double(key: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    site, twice, inner = key.partition(_TWICE)
    names = (inner, inner.partition(".")[2])  # the adapter's name may come first
    others = (f"{site}.{name}" for name in names)
    return bool(twice) and any(o in tensors and torch.equal(tensors[o], tensor) for o in others)
