"""The savings one at a time: what each is worth, by undoing it.

A rung's name is what is undone: the library's operator gives way to the plain PyTorch that it
stands for, as autograd would have had it. All undone at once is the plain loop.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["RUNGS", "without"]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _whole_logits() -> contextlib.AbstractContextManager[None]:
    """Logits of every position, in float32, and their softmax kept for backward."""
    from lora_core.models import CausalLM

    return _replaced(CausalLM, "grades", False)


RUNGS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "linear_cross_entropy": _whole_logits,
}


@contextlib.contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Within the block the named savings are undone.

    Args:
        names: of RUNGS.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(RUNGS[name]())
        yield
