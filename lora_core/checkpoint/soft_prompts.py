"""Soft prompts on disk: PEFT's flat form, and beside it what training needs to go on.

PEFT keeps a prompt in the two files of every adapter: `adapter_config.json`, and the one tensor
`prompt_embeddings` in `adapter_model.safetensors`,

    PROMPT_TUNING, P_TUNING   (P, C), the virtual tokens
    PREFIX_TUNING             (P, L · 2 · Hkv · D): layer by layer keys, then values

which is what a forward needs; a network that made them is not in it, so PEFT refuses to train on.
Here that network goes to a third file, `reparametrization.safetensors`, which PEFT passes over:

    P_TUNING        inputs (P, C), lstm.*, mlp.*
    PREFIX_TUNING   inputs (P, C), hidden.weight (h, C), hidden.bias (h),
                    up.weight (L · 2 · Hkv · D, h), up.bias: the layers' last matrices in a column

`load_adapter(trainable=True)` takes the network where the file is there; everything else is loaded
flat, which costs less to run. A network that does not give the prompt beside it (another program
has rewritten the two files) is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.config import build_all
from lora_core.adapters.prefix import Prefix, PrefixTokens, PrefixTuningConfig
from lora_core.adapters.prompt import Prompt, PromptTuningConfig
from lora_core.checkpoint.adapter_files import AdapterFormat, check_tensors
from lora_core.checkpoint.safetensors_folder import read_header
from lora_core.checkpoint.safetensors_writing import Pending, write_safetensors
from lora_core.checkpoint.soft_prompt_config import (
    KINDS,
    SoftPromptConfig,
    config_of,
    record_of,
)
from lora_core.files import atomic_write

__all__ = [
    "FURTHER",
    "KINDS",
    "SOFT_PROMPT",
    "flat_tensors",
    "read_soft_prompt",
    "write_further",
]

KEY = "prompt_embeddings"
FURTHER = "reparametrization.safetensors"
# float32 sums in another order, as on another machine; anything else is another prompt
_SAME = 1e-3


# --- tensors ---


@torch.no_grad()
def flat_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The flat form of one soft prompt.

    Args:
        adapters: its adapters by site, in module order.

    Returns:
        {"prompt_embeddings": (P, C) or (P, L · 2 · Hkv · D)}, float32, as evaluation uses it.
    """
    first, layers = _parts(adapters)
    modes = [(module, module.training) for module in first.modules()]
    first.eval()
    try:
        if isinstance(first, PrefixTokens):
            states = [s.flatten(1) for layer in layers for s in layer.states()]
            return {KEY: torch.cat([s.to(states[0].device) for s in states], 1)}
        return {KEY: first.embeddings().detach()}
    finally:
        for module, mode in modes:
            module.training = mode


def _parts(adapters: Mapping[str, Adapter]) -> tuple[Any, list[Prefix]]:
    """The site at the embedding, and those at the attention modules."""
    layers = [adapter for adapter in adapters.values() if isinstance(adapter, Prefix)]
    (first,) = (adapter for adapter in adapters.values() if not isinstance(adapter, Prefix))
    return first, layers


def further_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The network behind a prompt, by its names on disk; {} for a flat one."""
    first, layers = _parts(adapters)
    if isinstance(first, Prompt) or (isinstance(first, PrefixTokens) and first.hidden is None):
        return {}
    own = {key: parameter.detach() for key, parameter in first.named_parameters()}
    ups = [layer.up for layer in layers if layer.up is not None]
    for key in ("weight", "bias") if ups else ():
        own[f"up.{key}"] = torch.cat([getattr(up, key).detach().cpu() for up in ups])
    return own


def write_further(folder: Path, adapters: Mapping[str, Adapter]) -> None:
    """Write the network beside the flat form, or take an old one away; for `save_adapter`.

    Args:
        folder: the adapter's.
        adapters: its adapters by site; of another kind than a soft prompt: nothing is done.
    """
    if not isinstance(next(iter(adapters.values())).config, SoftPromptConfig):
        return
    tensors = further_tensors(adapters)
    if not tensors:
        (folder / FURTHER).unlink(missing_ok=True)
        return
    pending = [
        Pending(key, tuple(tensor.shape), tensor.dtype, lambda t=tensor: t)  # type: ignore[misc]
        for key, tensor in sorted(tensors.items())
    ]
    atomic_write(folder / FURTHER, lambda aside: write_safetensors(aside, pending))


@torch.no_grad()
def _take_further(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
    first, layers = _parts(adapters)
    for key, parameter in first.named_parameters():
        parameter.copy_(tensors[key])
    for key in ("weight", "bias") if layers else ():
        rows = tensors[f"up.{key}"].chunk(len(layers))
        for layer, own in zip(layers, rows, strict=True):
            getattr(layer.up, key).copy_(own)


@torch.no_grad()
def _take_flat(adapters: Mapping[str, Adapter], prompt: Tensor) -> None:
    first, layers = _parts(adapters)
    if not layers:
        first.prompt.copy_(prompt)
        return
    heads = layers[0].heads
    states = prompt.view(len(prompt), len(layers), 2, *heads)  # (P, L, 2, Hkv, D)
    for i, layer in enumerate(layers):
        layer.key.copy_(states[:, i, 0])
        layer.value.copy_(states[:, i, 1])


# --- reading ---


def read_soft_prompt(
    model: nn.Module,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
    trainable: bool,
) -> tuple[SoftPromptConfig, dict[str, Adapter]]:
    """Build the adapters that a folder describes, filled; the model is not changed.

    Args:
        model: the base model.
        raw: `adapter_config.json`.
        tensors: `adapter_model.safetensors`.
        folder: where both were.
        trainable: take the network behind the prompt, where the folder has it.

    Returns:
        (configuration, adapters by site), for `attach_built`.

    Raises:
        ValueError: an option without counterpart, a missing or unexpected key, another shape, or a
            network that does not give the prompt beside it.
    """
    config = config_of(raw)
    prompt = _checked_flat(tensors, config.num_virtual_tokens)
    flat = not trainable or isinstance(config, PromptTuningConfig)
    if flat or not (folder / FURTHER).is_file():
        built = _flat(config, model, prompt)
        _take_flat(built, prompt)
        return config, built
    built = build_all(config, model)
    network = _network(folder / FURTHER)
    try:
        check_tensors(further_tensors(built), network)
    except ValueError as error:
        raise ValueError(f"{FURTHER}: {error}") from None
    _take_further(built, network)
    made = flat_tensors(built)[KEY].cpu()
    near = made.shape == prompt.shape and (
        (made - prompt).abs().max() <= _SAME * prompt.abs().max()  # never where there is a NaN
    )
    if not near:
        raise ValueError(
            f"{FURTHER} does not give the prompt in adapter_model.safetensors, which "
            f"another program has written: remove {FURTHER} to train on from the flat prompt"
        )
    return config, built


def _checked_flat(tensors: Mapping[str, Tensor], tokens: int) -> Tensor:
    if set(tensors) != {KEY}:
        odd = sorted(set(tensors) ^ {KEY})
        raise ValueError(f"a soft prompt has the one key {KEY!r}; it and the file differ by {odd}")
    prompt = tensors[KEY]
    if prompt.dim() != 2 or len(prompt) != tokens or not prompt.is_floating_point():
        raise ValueError(
            f"{KEY!r} must hold {tokens} rows of floating-point numbers (num_virtual_tokens); "
            f"it is {tuple(prompt.shape)}, {prompt.dtype}"
        )
    return prompt.float()


def _flat(config: SoftPromptConfig, model: nn.Module, prompt: Tensor) -> dict[str, Adapter]:
    """Adapters of the flat form, without a start of their own."""
    plain: SoftPromptConfig = PromptTuningConfig(config.num_virtual_tokens, "random")
    if isinstance(config, PrefixTuningConfig):
        plain = PrefixTuningConfig(config.num_virtual_tokens, projection=False)
    built = build_all(plain, model)
    needed = tuple(flat_tensors(built)[KEY].shape)
    if needed != tuple(prompt.shape):
        raise ValueError(
            f"{KEY!r} has shape {tuple(prompt.shape)}, the model needs {needed}: the adapter "
            "belongs to another base"
        )
    return built


def _network(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    entries = read_header(file)
    with safe_open(file, framework="pt", device="cpu") as handle:
        return {key: handle.get_tensor(key) for key in entries}


def _record(
    model: nn.Module, config: Any, adapters: Mapping[str, Adapter], base_model: str | None
) -> dict[str, Any]:
    first, layers = _parts(adapters)
    return record_of(model, config, first, layers[0].heads if layers else None, base_model)


SOFT_PROMPT = AdapterFormat(
    SoftPromptConfig,
    flat_tensors,
    _record,
    read_soft_prompt,
    lambda model, folder, adapters: write_further(folder, adapters),
)
