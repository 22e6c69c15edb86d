"""Second derivatives of operators whose gradient is an operator too.

A gradient in C or Triton can be differentiated by nothing. Where somebody asks for it (penalties on
a gradient, influence functions), the same formula is gone through again in plain PyTorch, which
autograd can follow to any order. A training step never comes here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["through"]


def through(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradient of `function(*inputs)`, itself differentiable where gradients are recorded.

    Args:
        function: plain PyTorch, of as many tensors as there are inputs.
        inputs: may depend on each other: only what `function` does is differentiated.
        grads: of what it returns, in order.

    Returns:
        One gradient for each input; None where the function does not depend on it.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # views of their own: a path from one input to another is not the function's
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        outputs = function(*own)
        return torch.autograd.grad(outputs, own, grads, create_graph=recorded, allow_unused=True)
