"""AdamW in float32 on lists of tensors, in one pass: the arithmetic that the optimizers share.

On a CPU and on CUDA it is torch's fused kernel, the one `torch.optim.AdamW(fused=True)` calls: each
number is read and written once. Elsewhere it is the same formulas by torch's `foreach` functions,
seven passes.

The numbers of steps stay on the host, one a parameter: the kernel is told them by tensors that are
made where the parameters are, so that nothing is copied and nothing is waited for.

Ref: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FUSED",
    "ClosureOptimizer",
    "check_numbers",
    "check_parameters",
    "fused_adamw_",
    "load_as_saved",
]

FUSED = ("cpu", "cuda")  # device types with torch's fused kernel; only the CPU's was run here


def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: Sequence[int],
    group: Mapping[str, Any],
) -> None:
    """Update parameters and moments in place.

    Args:
        params: float32, on one device.
        grads: of their shapes.
        means: m, likewise.
        squares: v, likewise.
        steps: the number of this step for each parameter, from 1.
        group: an optimizer's group: lr, betas, eps, weight_decay.
    """
    if not params:
        return
    device = params[0].device
    beta1, beta2 = group["betas"]
    if device.type in FUSED:
        told = {n: torch.full((), float(n), device=device) for n in set(steps)}
        torch._fused_adamw_(
            *(params, grads, means, squares, []),
            [told[n] for n in steps],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        return
    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    roots = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(roots, [math.sqrt(1 - beta2**n) for n in steps])
    torch._foreach_add_(roots, group["eps"])
    rates = [-group["lr"] / (1 - beta1**n) for n in steps]
    torch._foreach_addcdiv_(params, means, roots, rates)


class ClosureOptimizer(torch.optim.Optimizer):
    """An optimizer that says in `update` what a step does once the gradients are there."""

    def update(self) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients; or None.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss


def check_numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse settings of AdamW that are out of range; ValueError names the one that is."""
    rules = [
        ("lr", lr, lr >= 0, "0 or more"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        ("eps", eps, eps >= 0, "0 or more"),
        ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
    ]
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} must be {rule}; got {value!r}")


def check_parameters(params: Sequence[Tensor], name: str) -> None:
    """Refuse what the operators cannot update where it lies.

    Args:
        params: of one group.
        name: the optimizer's, for the message.

    Raises:
        TypeError: a parameter that is not float32.
        ValueError: one that is not contiguous, or split over processes.
    """
    for p in params:
        if p.dtype != torch.float32:
            raise TypeError(f"{name} trains float32 parameters; got one of {p.dtype}")
        if hasattr(p, "to_local"):
            raise ValueError(
                f"{name} keeps its state whole, so it cannot train weights that FSDP split: use "
                "the optimizer adamw there"
            )
        if not p.is_contiguous():
            raise ValueError(
                f"{name} trains contiguous parameters; got {tuple(p.shape)} with strides "
                f"{p.stride()}: call .contiguous() on it before"
            )


def load_as_saved(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    fresh: Callable[[Tensor], Mapping[str, Any]],
    device: torch.device | None = None,
) -> dict[Tensor, dict[str, Any]]:
    """Load groups, and state tensors in their own dtypes: torch casts them to the parameter's.

    Args:
        optimizer: to load into.
        state_dict: as `optimizer.state_dict()` gives it.
        fresh: parameter -> its state before the first step, to compare with; is given a parameter
            without memory.
        device: where to put state; None: where the parameter is.

    Returns:
        Parameter -> its state, copied, which is the optimizer's state from now on.

    Raises:
        ValueError: state of another kind, or of other shapes.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(numbers) == len(params):  # else torch says what is wrong
        for number, p in zip(numbers, params, strict=True):
            wanted = fresh(torch.empty_like(p, device="meta"))
            _check_kind(state_dict["state"].get(number), wanted, number, optimizer)
    torch.optim.Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    loaded = {}
    for number, p in zip(numbers, params, strict=True):
        if number in state_dict["state"]:
            saved = state_dict["state"][number]
            loaded[p] = {
                name: value.detach().to(device or p.device, copy=True)
                if isinstance(value, Tensor)
                else value
                for name, value in saved.items()
            }
    optimizer.state.update(loaded)
    return loaded


def _check_kind(
    saved: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    number: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse a parameter's state that is not of the kind the optimizer makes."""

    def kind(state: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: f"{str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}"
            if isinstance(v, Tensor)
            else "number"
            for name, v in sorted(state.items())
        }

    if saved is not None and kind(saved) != kind(wanted):
        raise ValueError(
            f"the saved state of parameter {number} is {kind(saved)}, but "
            f"{type(optimizer).__name__} keeps {kind(wanted)}: load the state into the optimizer, "
            "and for the parameters, that it was saved with"
        )
