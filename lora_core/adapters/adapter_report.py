"""What an adapter is in a model: where, how many parameters, and what share is trained."""

from dataclasses import dataclass

import torch
from torch import nn

from lora_core.adapters.config import kind_of
from lora_core.adapters.host import adapted_modules
from lora_core.adapters.switch import check_known

__all__ = ["AdapterReport", "adapter_report", "parameter_counts"]


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter is in a model; `print` it.

    Attributes:
        name: the adapter's name.
        kind: its registered kind, or its configuration's (without one, its own) class name.
        sites: the modules it is at.
        parameters: its own parameters.
        trainable: parameters of the whole model that are trained now.
        total: parameters of the whole model, a 4-bit weight counted by its elements.
    """

    name: str
    kind: str
    sites: tuple[str, ...]
    parameters: int
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / self.total

    def __str__(self) -> str:
        ends: dict[str, int] = {}
        for site in self.sites:
            ends[site.rsplit(".", 1)[-1]] = ends.get(site.rsplit(".", 1)[-1], 0) + 1
        where = ", ".join(f"{end} ×{count}" for end, count in ends.items())
        return (
            f"adapter {self.name!r} ({self.kind}): {self.parameters:,} parameters "
            f"at {len(self.sites)} modules ({where})\n"
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.share:.3%})"
        )


def adapter_report(model: nn.Module, name: str = "default") -> AdapterReport:
    """Describe an adapter that is in the model.

    Args:
        model: the model.
        name: which adapter.

    Returns:
        Where it is and how large.

    Raises:
        ValueError: an unknown name.
    """
    check_known(model, [name])
    at = {
        site: host.adapter(name) for site, host in adapted_modules(model) if name in host.adapters
    }
    first = next(iter(at.values()))
    what = first if first.config is None else first.config
    own = {id(p): p.numel() for adapter in at.values() for p in adapter.parameters()}
    trainable, total = parameter_counts(model)
    return AdapterReport(
        name=name,
        kind=kind_of(what) or type(what).__name__,
        sites=tuple(at),
        parameters=sum(own.values()),
        trainable=trainable,
        total=total,
    )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count a model's parameters, a tied one once and a 4-bit weight by its elements.

    Args:
        model: any module.

    Returns:
        (those that are trained, all).
    """
    every = list(model.parameters())
    # two 4-bit codes lie in one byte
    sizes = [p.numel() * 2 if p.dtype == torch.uint8 else p.numel() for p in every]
    return sum(p.numel() for p in every if p.requires_grad), sum(sizes)
