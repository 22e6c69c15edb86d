"""Learning rates by part: each head its own, the adapter another.

A head is new and small, an adapter starts at no change on weights that are good already, and a rate
that suits one is a tenth or ten times the other's. Rates are factors on the run's `lr`, given for
parts of the model by name; the schedule scales them all alike. They are one mechanism with LoRA+
(train/optim.py), whose factor they multiply, and weight decay stays on matrices alone.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from lora_core.adapters import adapted_modules
from lora_core.targets import nearest
from lora_core.train.config import TrainConfig
from lora_core.train.loop import OptimizerFactory
from lora_core.train.optim import make_optimizer

ADAPTERS = "adapters"
"""The part that is all adapters' parameters, wherever they are."""


def rate_factors(model: nn.Module, rates: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """The factor of each parameter that has one.

    Args:
        model: the model to train.
        rates: part -> factor on `lr`, above 0. A part is a task with a head (`model.heads[task]`),
            a module by its dotted name, or "adapters".

    Returns:
        Parameter -> factor. Of a parameter in several parts the last one's holds.

    Raises:
        ValueError: a part that is not in the model, or a factor that is not above 0 and finite.
    """
    heads = getattr(model, "heads", None)
    heads = heads if isinstance(heads, nn.ModuleDict) else nn.ModuleDict()
    factors: dict[nn.Parameter, float] = {}
    for part, factor in rates.items():
        if not 0 < factor < math.inf:
            raise ValueError(f"the rate of {part!r} must be above 0 and finite; got {factor}")
        modules = dict(model.named_modules())
        if part == ADAPTERS:
            found = [p for _, host in adapted_modules(model) for p in host.adapters.parameters()]
        elif part in heads:
            found = list(heads[part].parameters())
        elif part and part in modules:
            found = list(modules[part].parameters())
        else:
            known = [ADAPTERS, *heads, *filter(None, modules)]
            raise ValueError(f"rates: no head or module {part!r}; {nearest(part, known)}")
        if not found:
            raise ValueError(f"rates: {part!r} holds no parameter")
        factors |= dict.fromkeys(found, float(factor))
    return factors


def optimizer_with_rates(
    model: nn.Module, config: TrainConfig, rates: Mapping[str, float]
) -> OptimizerFactory:
    """The `optimizer` argument of `train`, with rates by part.

    Args:
        model: the model to train.
        config: of the run.
        rates: see `rate_factors`.

    Returns:
        (name, parameter) pairs -> the optimizer that `config` describes.

    Raises:
        ValueError: what `rate_factors` refuses, now.
    """
    factors = rate_factors(model, rates)

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return make_optimizer(model, named, config, factors)

    return make
