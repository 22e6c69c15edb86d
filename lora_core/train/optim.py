"""The optimizer of a run: AdamW on the trained parameters, decay on matrices alone.

Vectors (norms' gains, biases, IA3's scales) are not decayed: pulling a gain towards 0 is not a
prior anyone holds. The state is 8 bytes a parameter in float32, 2.03 in 8 bits (adamw8.py), or in
the host's memory (paged.py).

A parameter may have a rate of its own: a factor on `lr`, by parameter, never by a name's pattern.
LoRA+ is such a factor on every B (adapters/groups.py), a task's head and the embeddings may have
one (tasks/rates.py for one), and factors on the same parameter are multiplied. Parameters of one
factor are one group, so the schedule, which scales each group's own peak, keeps their ratio.

Decay is decoupled and follows each group's rate: with LoRA+ B decays `lora_plus` times as much, as
AdamW has it. Parameters have to be float32: a bfloat16 weight of 0.02 has neighbours 1.2e-4
apart, so updates of 2e-5 round to nothing and the weight never moves.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_core.adapters.groups import second_factors
from lora_core.train.adamw8 import AdamW8bit
from lora_core.train.config import TrainConfig
from lora_core.train.fused_adamw import FUSED
from lora_core.train.paged import PagedAdamW
from lora_core.train.report import say


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; a tied one once.

    Args:
        model: any module.

    Returns:
        Name -> parameter, in the module's order.

    Raises:
        ValueError: nothing is trainable.
        TypeError: a trainable parameter is narrower than float32.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("no parameter requires a gradient: add an adapter, or unfreeze the model")
    narrow = [name for name, p in found.items() if p.dtype in (torch.bfloat16, torch.float16)]
    if narrow:
        raise TypeError(
            f"{len(narrow)} of {len(found)} trained parameters are 16 bits wide ({narrow[0]}, …), "
            "where small updates round to nothing; load the model in float32 and let "
            'TrainConfig(dtype="bfloat16") narrow the computation'
        )
    return found


def make_optimizer(
    model: nn.Module,
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: TrainConfig,
    factors: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer a configuration describes.

    Args:
        model: that holds the parameters; LoRA's B are found in it by type.
        parameters: (name, parameter) pairs.
        config: `optimizer` says how the state is kept; lr, lora_plus, betas, eps, weight_decay.
        factors: learning rate over `config.lr` of the parameters that have a rate of their own.

    Returns:
        The optimizer. Its first group has `config.lr`, unless all that is trained has a factor.

    Raises:
        ValueError: `lora_plus` without a trained B, or a factor that is not above 0 and finite.
    """
    named = list(parameters)
    rates = dict(factors or {})
    for name, p in named:
        if not 0 < rates.get(p, 1.0) < math.inf:
            raise ValueError(
                f"the rate factor of {name} must be above 0 and finite; got {rates[p]} (to keep a "
                "parameter as it is, freeze it)"
            )
    if config.lora_plus != 1:
        apart = second_factors(model) & {p for _, p in named}
        rates |= {p: rates.get(p, 1.0) * config.lora_plus for p in apart}
        if not apart:
            raise ValueError(
                f"lora_plus is {config.lora_plus:g}, the rate of LoRA's B over the others', but no "
                "B is trained: leave it at 1"
            )
    groups = make_groups(named, config, rates)
    settings: dict[str, Any] = {"lr": config.lr, "eps": config.eps}
    settings["betas"] = (config.beta1, config.beta2)
    kinds = {p.device.type for _, p in named}
    if not kinds <= set(FUSED):
        say(
            f"AdamW has no fused kernel for {', '.join(sorted(kinds))}: it takes several passes "
            "over the state a step"
        )
    if config.optimizer == "adamw8bit":
        return AdamW8bit(groups, **settings)
    if config.optimizer == "adamw-paged":
        if kinds == {"cpu"}:
            say("optimizer adamw-paged: the model is in the host's memory, where paging only costs")
        return PagedAdamW(groups, **settings)
    return torch.optim.AdamW(groups, fused=kinds <= set(FUSED), **settings)


def make_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW in float32, with decay on parameters of two dimensions or more.

    Args:
        parameters: (name, parameter) pairs.
        config: its lr, betas, eps and weight_decay are used.

    Returns:
        The optimizer; one fused pass over each tensor, deterministic.

    Ref:
        Loshchilov & Hutter 2019, algorithm 2.
    """
    named = list(parameters)
    return torch.optim.AdamW(
        make_groups(named, config, {}),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused={p.device.type for _, p in named} <= set(FUSED),
    )


def make_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    config: TrainConfig,
    factors: Mapping[nn.Parameter, float],
) -> list[dict[str, Any]]:
    """Groups for an optimizer: of each rate the matrices, which decay, and the vectors.

    Args:
        named: (name, parameter) pairs.
        config: its lr and weight_decay are used.
        factors: learning rate over `config.lr`, of the parameters where it is not 1.

    Returns:
        Groups that are not empty, the usual rate first: it is the one that is reported. The others
        follow in the order in which their first parameter comes.
    """
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for _, p in named:
        parts.setdefault((factors.get(p, 1.0), p.ndim >= 2), []).append(p)
    groups: list[dict[str, Any]] = []
    for (factor, decays), members in parts.items():
        group = {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
        groups.append(group if factor == 1 else group | {"lr": config.lr * factor})
    return [group for group in groups if group["params"]]
