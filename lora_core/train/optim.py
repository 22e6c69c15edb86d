"""The optimizer of a run: AdamW on the trained parameters, decay on matrices alone.

Vectors (norms' gains, biases, IA3's scales) are not decayed: pulling a gain towards 0 is not a
prior anyone holds. Parameters have to be float32: a bfloat16 weight of 0.02 has neighbours 1.2e-4
apart, so updates of 2e-5 round to nothing and the weight never moves.
"""

from collections.abc import Iterable

import torch
from torch import nn

from lora_core.train.config import TrainConfig


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
        The optimizer.
    """
    if config.optimizer != "adamw" or config.lora_plus != 1:
        raise ValueError(f"optimizer {config.optimizer} is not built yet")
    return make_adamw(parameters, config)


def make_adamw(
    parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig
) -> torch.optim.AdamW:
    """AdamW with decay on parameters of two dimensions or more.

    Args:
        parameters: (name, parameter) pairs.
        config: its lr, betas, eps and weight_decay are used.

    Returns:
        The optimizer; one fused pass over each tensor, deterministic.

    Ref:
        Loshchilov & Hutter 2019, algorithm 2.
    """
    named = list(parameters)
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda") for _, p in named),
    )
