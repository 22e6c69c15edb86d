"""What soft prompts share: a site at the input embedding of a language model.

A soft prompt's parameters live in hosts like any adapter's; this is the one that every kind has, so
a forward can ask the embedding which prompts are active. What it then does with them is
soft_call.py's.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.host import Adapted
from lora_core.adapters.tokens import module_name
from lora_core.targets import sites, unwrap

__all__ = [
    "Hook",
    "SoftPrompt",
    "active_prompts",
    "check_positions",
    "check_tokens",
    "embedding_size",
    "language_model",
    "parameter_names",
]


class Hook:
    """A hook of soft prompts on a model, told by its class."""


class SoftPrompt(Adapter):
    """A soft prompt's site at the input embedding, whose output it leaves as it is.

    Args:
        tokens: P, virtual tokens.

    Attributes:
        tokens: P.
        prepended: whether the virtual tokens are inputs of the model, in front of the text's; if
            not (a prefix), only the positions of the text move on by P.
    """

    unmergeable = "virtual tokens are inputs of the model: no weight gives the same"
    mixes = None
    prepended = True

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Any, y: Any, base: nn.Module) -> Any:
        """Return y."""
        return y

    def embeddings(self) -> Tensor:
        """The virtual tokens, (P, C) float32, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} has no embeddings()")


def check_tokens(tokens: object) -> None:
    """Refuse a number of virtual tokens that is none; ValueError says why."""
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"num_virtual_tokens must be a whole number, 1 or more; got {tokens!r}")


def language_model(model: nn.Module) -> tuple[nn.Module, str]:
    """The part of a model that soft prompts hook: the first that has an input embedding.

    Args:
        model: a language model, or a module that contains one.

    Returns:
        (that part, name of its embedding in `model`).

    Raises:
        ValueError: no part has `get_input_embeddings()` and takes `inputs_embeds`.
    """
    for _, site in sites(model):
        part = unwrap(site)
        embedding = _embedding(part)
        if embedding is None:
            continue
        if "decoder_input_ids" in parameter_names(part):
            raise ValueError(
                f"soft prompts need one sequence; {type(part).__name__} has an encoder and a "
                "decoder, and generate() goes past the prompt: use LoRAConfig or BottleneckConfig"
            )
        missing = {"inputs_embeds", "attention_mask"} - set(parameter_names(part))
        if missing:
            raise ValueError(
                f"soft prompts need a model that takes inputs_embeds and attention_mask; "
                f"{type(part).__name__}.forward has no {min(missing)}"
            )
        return part, module_name(model, embedding)
    raise ValueError(
        f"soft prompts need a language model with get_input_embeddings(); {type(model).__name__} "
        "has none"
    )


def check_positions(model: nn.Module) -> None:
    """Refuse a language model whose positions a prefix could not move; ValueError says why."""
    part, _ = language_model(model)
    if "position_ids" not in parameter_names(part):
        raise ValueError(
            f"a prefix moves the text's positions on; {type(part).__name__}.forward takes no "
            "position_ids: use PromptTuningConfig"
        )


def _embedding(part: nn.Module) -> nn.Module | None:
    ask = getattr(part, "get_input_embeddings", None)
    try:
        found = ask() if callable(ask) else None
    except NotImplementedError:  # transformers' way of saying that there is none
        return None
    return found if isinstance(found, nn.Module) else None


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's forward's parameters, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def embedding_size(model: nn.Module) -> tuple[str, Tensor]:
    """Name and weight (V, C) of a model's input embedding; ValueError if no prompt can go there."""
    part, name = language_model(model)
    host = part.get_input_embeddings()  # type: ignore[operator]  # language_model asked
    _refuse_other_hooks(part, host)
    embedding = unwrap(host)
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"soft prompts need an embedding with a floating-point weight (V, C); {name!r} "
            f"({type(embedding).__name__}) has none"
        )
    return name, weight


def _refuse_other_hooks(part: nn.Module, host: nn.Module) -> None:
    """Refuse a model whose soft prompts came in through another: both would put them in."""
    hooked = any(isinstance(known, Hook) for known in part._forward_pre_hooks.values())
    while isinstance(host, Adapted):
        if not hooked and any(isinstance(known, SoftPrompt) for known in host.adapters.values()):
            raise ValueError(
                f"{type(part).__name__} shares its embedding with a model around it or inside it, "
                "which has soft prompts already: add this one through the same model"
            )
        host = host.base


def active_prompts(model: nn.Module) -> list[SoftPrompt]:
    """The soft prompts that a forward of the model applies now, in order.

    Args:
        model: one with `get_input_embeddings()`.

    Returns:
        Those active at its embedding; none inside `disable_adapters` or `adapter_rows`.
    """
    found: list[SoftPrompt] = []
    host = _embedding(model)
    while isinstance(host, Adapted):
        if host.enabled and host.mixture is None:
            at = [host.adapters[name] for name in host.active]
            found += [adapter for adapter in at if isinstance(adapter, SoftPrompt)]
        host = host.base
    return found
