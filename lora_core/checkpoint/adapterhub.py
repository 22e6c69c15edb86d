"""Bottleneck adapters of the `adapters` library (AdapterHub), read and written.

A folder of theirs has `adapter_config.json` (the name that PEFT uses too, for another schema) and
`adapter.safetensors`, or by default `pytorch_adapter.bin`, a pickle, which is refused here. The
keys are those of their modules:

    bert.encoder.layer.0.attention.output.adapters.<name>.adapter_down.0.weight
    model.layers.0.output_adapters.adapters.<name>.adapter_up.bias

The weights say little: which sums they belong to is in the configuration, and one and the same pair
of matrices gives other outputs under `original_ln_before`. So a file is read into an
`AdapterHubConfig`, which computes what their library computes (adapters/adapterhub.py has the
table), or it is refused with the option that stands in the way. Their loader, as PEFT's, passes
over keys that are missing or left over; here both are errors. docs/formats.md lists keys and
options.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.adapter_report import AdapterReport
from lora_core.adapters.adapterhub import LAYOUTS, AdapterHubConfig, Layout, Place, layout_of
from lora_core.adapters.bottleneck import BottleneckAdapter, BottleneckConfig, Tap
from lora_core.adapters.host import adapted_modules
from lora_core.adapters.inject import attach_built
from lora_core.adapters.switch import adapter_names
from lora_core.checkpoint.adapter_files import check_tensors, write_adapter
from lora_core.checkpoint.adapterhub_config import config_from, config_to
from lora_core.checkpoint.safetensors_folder import (
    read_header,
    read_json_object,
)
from lora_core.targets import nearest

__all__ = ["load_adapterhub", "save_adapterhub"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
VERSION = "adapters.1.3.0"  # whose files these are

# their names of a bottleneck's tensors, and ours
TENSORS = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
    "scaling": "gain",
}
# before version 3 a module's adapters were in one of these
LEGACY = re.compile(r"(?:attention|layer)_text_(?:task|lang)_adapters")


def load_adapterhub(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
) -> AdapterReport:
    """Put a bottleneck adapter that the `adapters` library saved into a model.

    It alone is active afterwards. The rest of the model is frozen; other adapters keep their
    `requires_grad` unless `trainable`.

    Args:
        model: the base model: BERT, RoBERTa, XLM-R, ELECTRA, Llama, Mistral, Qwen 2 or 3, GPT-2 of
            transformers, or this library's decoder; with or without a head.
        directory: the adapter's folder, saved with `use_safetensors=True`.
        name: name to give it, new to the model.
        trainable: whether it is trained further.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: malformed files or a pickle; an adapter of another kind or model; an option
            under which their library computes what is not computed here; missing or unexpected
            keys, another shape; whatever `add_adapter` refuses. The model is then as it was.
    """
    folder = Path(directory)
    record, tensors = _read(folder)
    try:
        layout, layers = layout_of(model)
        _check_model(model, layout, record)
        config = config_from(record, layout.post_norm, tensors)
        built = config.build_all(model)
        given = {_short(key, record["name"], layout): tensor for key, tensor in tensors.items()}
        if len(given) < len(tensors):
            raise ValueError("two keys mean the same tensor: it is no file of one adapter")
        ready = _assigned(built, _wanted(layers, layout, config, built), given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    for site, own in ready.items():
        built[site].load(own)
    report = attach_built(model, config, name, built, trainable=trainable)
    if head := next((head for head in HEADS if (folder / head).is_file()), None):
        warnings.warn(f"{folder / head} was not read: the model keeps its own head", stacklevel=2)
    return report


def save_adapterhub(
    model: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model: str | None = None,
) -> None:
    """Write a bottleneck adapter so that the `adapters` library loads it, with equal outputs.

    There: `model.load_adapter(directory, use_safetensors=True)`.

    Args:
        model: a model with the adapter, of a kind that `load_adapterhub` takes.
        directory: where; made if it is not there, other files in it stay.
        name: which adapter; it has this name there.
        base_model: what to record as `model_name`; None: what the model says it was loaded from.

    Raises:
        ValueError: an unknown name; a kind, placement or model that their library has nothing equal
            to; a folder that holds an adapter in PEFT's format.
    """
    folder = Path(directory)
    if (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds an adapter in PEFT's format, whose {CONFIG} would be overwritten: "
            "choose another folder"
        )
    layout, layers = layout_of(model)
    kind = _model_type(model)
    if kind is not None and kind not in layout.types:
        raise ValueError(_unknown_type(kind))
    config, places = _places(model, name, layout, layers)
    parts = {(number, place is layout.attention): part for (number, place), part in places.items()}
    own = {our: their for their, our in TENSORS.items()}
    tensors = {
        f"{layers[number]}.{place.key}.{name}.{own[key]}": tensor.detach()
        for (number, place), adapter in places.items()
        for key, tensor in adapter.tensors().items()
    }
    if base_model is None:
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None)
    record = {
        "config": config_to(config, parts, list(layers)),
        "hidden_size": next(iter(places.values())).down.in_features,
        "model_class": type(model).__name__,
        "model_name": base_model or "",
        "model_type": kind or layout.types[0],
        "name": name,
        "version": VERSION,
    }
    write_adapter(folder, record, tensors, weights=WEIGHTS)


# --- reading ---


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration as it stands in the file, and the tensors by key."""
    from safetensors import safe_open

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is no adapter folder")
    record = read_json_object(folder / CONFIG)
    if "peft_type" in record:
        raise ValueError(f"{folder} holds an adapter in PEFT's format: use load_adapter")
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("name"), str):
        raise ValueError(f"{folder / CONFIG} has no config and name: it is not AdapterHub's")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise ValueError(
                f"{folder} holds its weights as pickle ({PICKLE}), which can run code when it is "
                "read: refused; save it with the adapters library under use_safetensors=True, or "
                f"torch.load it with weights_only=True and write {WEIGHTS} with safetensors"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: it is no adapter of AdapterHub")
    entries = read_header(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt", device="cpu") as handle:
        return record, {key: handle.get_tensor(key) for key in entries}


def _check_model(model: nn.Module, layout: Layout, record: Mapping[str, Any]) -> None:
    """Refuse a file for a model of another kind or size."""
    theirs, own = record.get("model_type"), _model_type(model)
    if own is not None and theirs != own:
        raise ValueError(f"the adapter belongs to a model of type {theirs!r}, this is {own!r}")
    if theirs not in layout.types:
        raise ValueError(_unknown_type(theirs))


def _wanted(
    layers: Mapping[int, str],
    layout: Layout,
    config: AdapterHubConfig,
    built: Mapping[str, Adapter],
) -> dict[str, tuple[str, str]]:
    """(site, tensor's name) by AdapterHub's key without its prefix and name."""
    return {
        f"{number}.{place.key}.{their}": (site, our)
        for number, layer in layers.items()
        for place in config.places(layout)
        if (site := f"{layer}.{config.site(place)}") in built
        for their, our in TENSORS.items()
        if our in built[site].tensors()
    }


def _short(key: str, name: str, layout: Layout) -> str:
    """A key without what depends on the model's head and the adapter's name; others as they are."""
    places = "|".join(re.escape(place.key) for place in (layout.attention, layout.feed_forward))
    form = rf"{layout.layer}\.({places})\.{re.escape(name)}\.(.+)"
    match = re.fullmatch(form, LEGACY.sub("adapters", key))
    return key if match is None else ".".join(match.groups()[1:])


def _assigned(
    built: Mapping[str, Adapter], wanted: Mapping[str, tuple[str, str]], given: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by site and name, every key and shape accounted for."""
    own = {key: built[site].tensors()[name] for key, (site, name) in wanted.items()}
    check_tensors(own, {key: given[key] for key in own if key in given} | dict(given))
    ready: dict[str, dict[str, Tensor]] = {}
    for key, (site, name) in wanted.items():
        ready.setdefault(site, {})[name] = given[key]
    return ready


# --- writing ---


Places = dict[tuple[int, Place], BottleneckAdapter]


def _places(
    model: nn.Module, name: str, layout: Layout, layers: Mapping[int, str]
) -> tuple[Any, Places]:
    """The configuration of an adapter in the model, and its bottlenecks by layer and place."""
    found = {
        site: host.adapter(name) for site, host in adapted_modules(model) if name in host.adapters
    }
    if not found:
        raise ValueError(f"no adapter {name!r} in the model; {nearest(name, adapter_names(model))}")
    config = next(iter(found.values())).config
    if not isinstance(config, AdapterHubConfig | BottleneckConfig):
        kind = type(next(iter(found.values()))).__name__
        raise ValueError(f"{name!r} is no bottleneck adapter ({kind}): save_adapter writes it")
    known = {
        f"{layer}.{config.site(place) if isinstance(config, AdapterHubConfig) else place.last}": (
            number,
            place,
        )
        for number, layer in layers.items()
        for place in (layout.attention, layout.feed_forward)
    }
    places: Places = {}
    for site, adapter in found.items():
        if isinstance(adapter, BottleneckAdapter):
            if site not in known:
                raise ValueError(f"AdapterHub has no place for the adapter at {site!r}")
            places[known[site]] = adapter
    if isinstance(config, BottleneckConfig) and config.placement == "parallel":
        _check_parallel(found, layout, layers, places)
    return config, places


def _check_parallel(
    found: Mapping[str, Adapter], layout: Layout, layers: Mapping[int, str], places: Places
) -> None:
    """Refuse a parallel adapter that does not see the residual itself."""
    if not layout.post_norm:
        raise ValueError(
            "placement='parallel' sees the normalized input of the sub-layer here, AdapterHub's "
            "par_bn the residual before the norm: no file of theirs has the same outputs"
        )
    for number, place in places:
        taps = (f"{layers[number]}.{place.start}", f"{layers[number]}.{place.start}.dense")
        if not any(isinstance(found.get(tap), Tap) for tap in taps):
            raise ValueError(
                f"the parallel adapter in {layers[number]!r} does not see the input of "
                f"{place.start!r}, which AdapterHub's does"
            )


def _model_type(model: nn.Module) -> str | None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind if isinstance(kind, str) else None


def _unknown_type(kind: object) -> str:
    types = ", ".join(kind for layout in LAYOUTS.values() for kind in layout.types)
    return f"adapters of models of type {kind!r} are not supported; those of {types} are"
