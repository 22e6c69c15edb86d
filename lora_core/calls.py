"""Which modules may be passed by: computed from what they hold, without being called.

A LoRA pair, the layer under it or an output head is cheaper as a part of one operator. But a hook,
a forward that was replaced, or a class that overrides it counts on the call.
"""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["offers", "watched"]


def offers(module: nn.Module, method: str) -> bool:
    """Whether a module's class has a method, and no forward of a later class beside it.

    Asked of the class: a host would pass the question on to its base, past its own adapters.

    Args:
        module: any.
        method: its name.
    """
    for kind in type(module).__mro__:
        if method in vars(kind):
            return True
        if "forward" in vars(kind) or "__call__" in vars(kind):
            return False
    return False


def watched(module: nn.Module) -> bool:
    """Whether something would notice that a module is not called.

    Args:
        module: any.
    """
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(map(len, hooks)) or "forward" in vars(module) or bool(_has_any_global_hook())  # type: ignore[no-untyped-call]
