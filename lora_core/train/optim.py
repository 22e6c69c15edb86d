"""The optimizer of a run: AdamW on the trained parameters, decay on matrices alone.

Vectors (norms' gains, biases, IA3's scales) are not decayed: pulling a gain towards 0 is not a
prior anyone holds. LoRA's B may have a rate of their own (LoRA+, adapters/groups.py). The state is
8 bytes a parameter in float32, 2.03 in 8 bits (adamw8.py), or in the host's memory (paged.py).

Decay is decoupled and follows each group's rate: with LoRA+ B decays `lora_plus` times as much, as
AdamW has it. Parameters have to be float32: a bfloat16 weight of 0.02 has neighbours 1.2e-4
apart, so updates of 2e-5 round to nothing and the weight never moves.
"""

from collections.abc import Iterable
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
    model: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer a configuration describes.

    Args:
        model: that holds the parameters; LoRA's B are found in it by type.
        parameters: (name, parameter) pairs.
        config: `optimizer` says how the state is kept; lr, lora_plus, betas, eps, weight_decay.

    Returns:
        The optimizer. Its first group has `config.lr`, unless nothing but LoRA's B is trained.

    Raises:
        ValueError: `lora_plus` without a trained B.
    """
    named = list(parameters)
    apart: set[nn.Parameter] = set()
    if config.lora_plus != 1:
        apart = second_factors(model) & {p for _, p in named}
        if not apart:
            raise ValueError(
                f"lora_plus is {config.lora_plus:g}, the rate of LoRA's B over the others', but no "
                "B is trained: leave it at 1"
            )
    groups = make_groups(named, config, apart)
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
        make_groups(named, config, set()),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused={p.device.type for _, p in named} <= set(FUSED),
    )


def make_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig, apart: set[nn.Parameter]
) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices, which decay, then vectors, then LoRA's B.

    Args:
        named: (name, parameter) pairs.
        config: its lr, lora_plus and weight_decay are used.
        apart: the parameters whose learning rate is lr · lora_plus.

    Returns:
        Groups that are not empty, the usual rate first: it is the one that is reported.
    """
    usual = [p for _, p in named if p not in apart]
    fast = [p for _, p in named if p in apart]
    decay, rate = config.weight_decay, config.lr * config.lora_plus
    groups: list[dict[str, Any]] = [
        {"params": [p for p in usual if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in usual if p.ndim < 2], "weight_decay": 0.0},
        {"params": fast, "weight_decay": decay, "lr": rate},
    ]
    return [group for group in groups if group["params"]]
