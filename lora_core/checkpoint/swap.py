"""Hot swap: another adapter's weights, from a folder or a state, in the tensors that are there.

What is read is checked as `load_adapter` checks it; adapters/swap.py pads and copies.
"""

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.lora import LoRA
from lora_core.adapters.swap import swap_adapters
from lora_core.checkpoint.adapter_files import check_tensors
from lora_core.checkpoint.conv_groups import as_written, from_disk
from lora_core.checkpoint.lora_files import LORA
from lora_core.checkpoint.lora_options import PEFT_PREFIX
from lora_core.checkpoint.peft import adapters_named, built_from, format_of
from lora_core.targets import targets_for, uncompiled

__all__ = ["swap_adapter"]


def swap_adapter(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    name: str = "default",
) -> None:
    """Replace an adapter's weights in place; a compiled model goes on without compiling again.

    A smaller rank is padded with zeros, and the scaling follows the folder's configuration. Where
    the new adapter has no pair, the layer becomes the base's. What is active, what is trained, and
    names stay.

    Args:
        model: a model with the adapter, compiled or not.
        source: an adapter's folder, written here or by PEFT; or what `adapter_state_dict` returns,
            for which the scalings stay as they are.
        name: the adapter whose weights are replaced.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown name, a merged model, malformed or missing tensors, another kind, a
            rank above the adapter's, a layer where it is not. The adapter is then as it was.
    """
    model = uncompiled(model)
    own = adapters_named(model, name)
    if isinstance(source, Mapping):
        new = _from_state(model, own, source)
    else:
        _, new = built_from(model, Path(source))
    swap_adapters(model, name, new)


def _from_state(
    model: nn.Module, own: dict[str, Adapter], state: Mapping[str, Tensor]
) -> dict[str, Adapter]:
    """Adapters filled with a state: copies of those in the model, or pairs of the state's ranks."""
    form = format_of(own)
    wanted, given = form.tensors(own), dict(state)
    if form is not LORA or all(k in given and given[k].shape == wanted[k].shape for k in wanted):
        check_tensors(wanted, given)
        prefix = PEFT_PREFIX if form is LORA else ""
        return {site: _filled(adapter, prefix + site, given) for site, adapter in own.items()}
    config = next(iter(own.values())).config
    raw = {**form.record(model, config, own, None), **_ranks(model, own, given)}
    return form.read(model, raw, given, Path(os.devnull), False)[1]  # nothing lies beside a state


def _filled(adapter: Adapter, site: str, state: Mapping[str, Tensor]) -> Adapter:
    """A copy of an adapter with its part of a state."""
    twin = copy.deepcopy(adapter, {id(adapter.config): adapter.config})
    first = f"{site}." if site else ""
    twin.load(from_disk(twin, {key: state[first + key] for key in as_written(twin)}))
    return twin


def _ranks(
    model: nn.Module, own: Mapping[str, Adapter], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """PEFT's options for pairs of the ranks that a state has, with the scalings of the own ones."""
    ranks: dict[str, int] = {}
    for site, pair in own.items():
        keys = [f"{PEFT_PREFIX}{site}.{name}" for name in ("lora_A.weight", "lora_embedding_A")]
        found = next((state[key] for key in keys if key in state), None)
        if isinstance(pair, LoRA) and found is not None:
            ranks[site] = len(found)
    scalings = {site: pair.scaling for site, pair in own.items() if isinstance(pair, LoRA)}
    return {
        "rank_pattern": {f"^{re.escape(site)}": rank for site, rank in ranks.items()},
        "alpha_pattern": {
            f"^{re.escape(site)}": rank * scalings[site] for site, rank in ranks.items()
        },
        "use_rslora": False,
        "target_modules": targets_for(model, ranks),
    }
