"""AdamW with its state in 8 bits: 2.03 bytes a parameter instead of 8.

The arithmetic and the format are `lora_kernels.adamw8`'s; this is the optimizer around them. A step
is one operator call for each group of parameters, however many there are, and nothing waits for the
device: numbers of steps are kept on the host.

Parameters of fewer than 4096 elements keep float32 moments, as in bitsandbytes: norms and biases
are the ones in which neighbours differ most, and their state is nothing beside the rest.

Differences from bitsandbytes: it launches a kernel a parameter and waits for each; its codes index
tables; saved state holds those tables for each parameter. torch's own `load_state_dict` casts state
to the parameter's dtype, which would turn codes into float32 numbers: here it arrives as it was.

The price: a step of four square roots and a hash an element (kernels/lora_kernels/cpu/adamw8.c)
and moments known to a few percent.

Ref: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_core.train.fused_adamw import (
    ClosureOptimizer,
    check_numbers,
    check_parameters,
    fused_adamw_,
    load_as_saved,
)
from lora_kernels.adamw8 import Moments8, adamw8_, no_moments

__all__ = ["AdamW8bit"]

_PLAIN = ("mean", "square")


class AdamW8bit(ClosureOptimizer):
    """AdamW whose moments are 8-bit codes in blocks of 256.

    A group may have its own `lr`, `betas`, `eps` and `weight_decay`. State of a parameter of n
    elements: `step` (int) and `mean` int8 (n,), `mean_unit` float32 (ceil(n / 256),), `root` uint8
    (n,), `root_unit` float32; of a small one `mean` and `square`, float32 in its shape.

    Args:
        params: parameters or groups; float32 and contiguous.
        lr: learning rate.
        betas: decay of the mean and of the mean square, in [0, 1).
        eps: added to the root of the mean square.
        weight_decay: decoupled, a step and unit of lr.
        min_8bit_size: elements from which on a parameter's moments are codes.

    Raises:
        ValueError: a number out of range.
        TypeError: a parameter that is not float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
    ) -> None:
        check_numbers(lr, betas, eps, weight_decay)
        self.min_8bit_size = min_8bit_size
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters have to be float32."""
        super().add_param_group(param_group)
        check_parameters(self.param_groups[-1]["params"], type(self).__name__)

    def update(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for (steps, _, coded), params in self._alike(group).items():
                run = _step_codes if coded else _step_plain
                run(params, [self.state[p] for p in params], steps, group)

    def _alike(self, group: dict[str, Any]) -> dict[tuple[int, torch.device, bool], list[Tensor]]:
        """A group's parameters by what one call has to share, their steps counted."""
        alike: dict[tuple[int, torch.device, bool], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(self._fresh(p))
            state["step"] += 1
            alike.setdefault((state["step"], p.device, "root" in state), []).append(p)
        return alike

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        """A parameter's state before its first step."""
        if p.numel() >= self.min_8bit_size:
            return {"step": 0, **no_moments(p)._asdict()}
        return {"step": 0, **{name: torch.zeros_like(p) for name in _PLAIN}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over groups and state, in the dtypes in which they were saved.

        Args:
            state_dict: of an `AdamW8bit` over parameters of the same shapes.

        Raises:
            ValueError: it is another optimizer's, or of other parameters.
        """
        load_as_saved(self, state_dict, self._fresh)


def _step_codes(
    params: list[Tensor], states: list[dict[str, Any]], step: int, group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    adamw8_(
        params,
        [p.grad for p in params if p.grad is not None],
        [Moments8(*(state[name] for name in Moments8._fields)) for state in states],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        step=step,
    )


def _step_plain(
    params: list[Tensor], states: list[dict[str, Any]], step: int, group: dict[str, Any]
) -> None:
    means, squares = ([state[name] for state in states] for name in _PLAIN)
    grads = [p.grad for p in params if p.grad is not None]
    fused_adamw_(params, grads, means, squares, [step] * len(params), group)
