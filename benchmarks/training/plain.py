"""The library without its savings: what each of them is worth, by undoing it.

Each entry puts the plain PyTorch that an operator stands for in its place, as autograd would have
had it. All undone at once is the plain loop.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["SAVINGS", "without"]


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


SAVINGS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "loss without whole logits": _whole_logits,
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
