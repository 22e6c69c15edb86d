"""The library without its savings: what each of them is worth, by undoing it.

Each entry puts the plain PyTorch that an operator stands for in its place, as autograd would have
had it. All undone at once is the plain loop.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SAVINGS", "without"]

_Undone = contextlib.AbstractContextManager[object]


@contextlib.contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes (owner, name, value) are others within the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _whole_logits() -> _Undone:
    """Logits of every position, in float32, and their softmax for backward."""
    from lora_core.models import CausalLM

    return _replaced((CausalLM, "grades", False))


def _plain_lora() -> _Undone:
    """Base and update as separate products; x A^T and the casts of A and B are kept."""
    from lora_core.adapters.lora import LoRA
    from lora_core.adapters.lora_linear import LoRALinear

    def update(self: Any, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return y + F.linear(F.linear(x, self.A), self.B) * self.scaling

    return _replaced((LoRALinear, "_taken_by_base", lambda self: None), (LoRA, "forward", update))


def _plain_elementwise() -> _Undone:
    """RMS norm, gate and rotation as expressions: every step of them is kept."""
    from lora_core.models import gating, norm, rope

    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool, wide: bool) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def swiglu(gate: Tensor, up: Tensor, _: str) -> Tensor:
        return F.silu(gate) * up

    def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return _replaced(
        (norm, "rms_norm", rms_norm), (gating, "swiglu", swiglu), (rope, "rotary", rotary)
    )


SAVINGS: dict[str, Callable[[], _Undone]] = {
    "loss without whole logits": _whole_logits,
    "LoRA keeps x alone": _plain_lora,
    "norm, gate, rotation keep inputs": _plain_elementwise,
}


@contextlib.contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Within the block the named savings are undone.

    Args:
        names: of SAVINGS.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(SAVINGS[name]())
        yield
