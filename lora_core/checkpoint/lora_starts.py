"""Starts of a pair in files: those that are taken away beside the base, computed again for PEFT's.

PiSSA and OLoRA train y = (W - s·B0 A0) x + s·B A x. This library's files hold both pairs. PEFT's
hold A and B alone, with the start's name: whoever loads them computes B0 A0 from W again.
"""

import dataclasses

from torch import Tensor, nn

from lora_core.adapters.config import build_all
from lora_core.adapters.forms import EmbeddingForm
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.targets import sites, unwrap

__all__ = ["is_start", "is_subtracted", "repeated_starts"]

_SUBTRACTED = ("pissa", "olora")


def is_subtracted(init: str) -> bool:
    """Whether a start of this name is taken away beside the base."""
    return init.startswith(_SUBTRACTED)


def is_start(init: str) -> bool:
    """Whether a start of this name is computed from the weights."""
    return is_subtracted(init) or init == "loftq"


def repeated_starts(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs that PEFT took from the base before it trained the ones in the file.

    Args:
        model: the base, as it was before PEFT.
        config: with the start's name; any other start gives nothing.

    Returns:
        {site: (A0, B0)}; none for embeddings, for which PEFT has no such start.

    Raises:
        ValueError: a 4-bit layer, or what the start refuses.
    """
    if not is_subtracted(config.init):
        return {}
    modules = dict(sites(model))
    # what else the configuration trains plays no part
    alone = dataclasses.replace(
        config, modules_to_save=None, trainable_token_indices=None, bias="none"
    )
    starts = {}
    for site, pair in build_all(alone, model).items():
        if not isinstance(pair, LoRA) or isinstance(pair.form, EmbeddingForm):
            continue
        weight = getattr(unwrap(modules[site]), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"init_lora_weights={config.init!r} starts from the 16-bit weights, and {site!r} "
                "is in 4 bits here: load the model dense"
            )
        down, up = pair.A0, pair.B0
        assert down is not None
        assert up is not None
        starts[site] = (down, up)
    return starts
