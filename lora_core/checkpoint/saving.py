"""A model to a Hugging Face folder that transformers and `load_model` load.

Weights are written aside inside the target folder, synced, and moved; config.json is taken away
first and put back last, so a folder that a crash left half done has none and is refused when
loaded, instead of being a mixture that loads. 4-bit layers are written dense, one at a time, or as
they are in bitsandbytes' format; stacked experts as the single matrices that they are on disk.

Which tensors there are follows from the configuration: a second model on the meta device lists
them. So a model with parts that config.json does not describe is refused, not cut down.

The text part of a multimodal model is written as the text model that it is here
(Gemma3ForCausalLM, not Gemma3ForConditionalGeneration).
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.checkpoint.bnb import pending as bnb_pending
from lora_core.checkpoint.bnb import quantization_config
from lora_core.checkpoint.layout import build_empty, embedding, tied_names
from lora_core.checkpoint.names import Piece, pieces
from lora_core.checkpoint.safetensors_folder import INDEX, SINGLE, read_json_object
from lora_core.checkpoint.safetensors_writing import Pending, write_safetensors
from lora_core.files import sync
from lora_core.models.build import build_model
from lora_core.models.config import DTYPES as MODEL_DTYPES
from lora_core.quant import NF4Linear, NF4Stack

# what makes up a model folder besides configuration and weights
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    quantized: bool = False,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder that transformers and `load_model` load.

    Other files of the folder stay; config.json and the weights of a model that was there are
    replaced.

    Args:
        model: a decoder or an encoder of this library, without adapters (merge and unload them
            first).
        directory: the folder; it is made.
        source: folder to copy tokenizer, chat template and generation_config.json from; keys of its
            config.json that this library does not know are kept as well.
        dtype: floating dtype of the weights on disk; None: each as it is, 4-bit layers in the
            embedding's.
        quantized: write 4-bit layers as they are, in bitsandbytes' format (checkpoint/bnb.py),
            instead of dense. A warning says that experts in 4 bits are read here alone.
        max_shard_size: bytes; more are split over several files with an index.

    Raises:
        TypeError: another model.
        ValueError: parts that config.json does not describe, or nothing in 4 bits to write so.
    """
    if not hasattr(getattr(model, "config", None), "to_dict") or not hasattr(model, "tie_weights"):
        raise TypeError(f"save_model writes this library's models; got {type(model).__name__}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1; got {max_shard_size}")
    tensors = list(_pending(model, None if dtype is None else dtype_of(dtype), quantized))
    packing = _packing(model, tensors[0].dtype) if quantized else {}
    directory = Path(directory)
    if source is not None and not Path(source).is_dir():
        raise FileNotFoundError(f"{source} is not a folder: nothing to copy a tokenizer from")
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; name a folder to write the model to")
    aside = directory / f".{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        raw = _copy_from(Path(source), aside) if source is not None else {}
        write_weights(aside, tensors, max_shard_size)
        own: Any = model.config
        config = dataclasses.replace(own, dtype=dtype_name(tensors[0].dtype))
        text = json.dumps(raw | config.to_dict() | packing, indent=2)
        (aside / "config.json").write_text(text + "\n", encoding="utf-8")
        _move_in(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """A model's floating dtype, by name or as torch's.

    Raises:
        ValueError: another.
    """
    name = dtype_name(dtype)
    if name not in MODEL_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, or None; got {dtype!r}")
    return MODEL_DTYPES[name]


def dtype_name(dtype: torch.dtype | str) -> str:
    """Its name, as in config.json."""
    return str(dtype).removeprefix("torch.")


def _packing(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The entry of config.json for a model with 4-bit layers."""
    named = list(model.named_modules())
    layers = [module for _, module in named if isinstance(module, NF4Linear | NF4Stack)]
    if not layers:
        raise ValueError("the model has no 4-bit layer to write: load it with quantize=")
    if any(isinstance(layer, NF4Stack) for layer in layers):
        warnings.warn(
            "experts are written in 4 bits, matrix by matrix: load_model reads them, transformers "
            "5 does not; for it save with quantized=False",
            stacklevel=3,
        )
    kinds = {(layer.codebook.name, layer.scale_absmax is not None) for layer in layers}
    if len(kinds) > 1:
        raise ValueError(f"config.json can name one kind of 4-bit layer; there are {len(kinds)}")
    code, double_quant = kinds.pop()
    dense = [name for name, module in named if isinstance(module, nn.Linear)]
    config = quantization_config(code, double_quant, dtype_name(dtype), dense or ["lm_head"])
    return {"quantization_config": config}


def _pending(model: nn.Module, dtype: torch.dtype | None, quantized: bool) -> Iterator[Pending]:
    """Every tensor that the configuration calls for: plain, made dense, or 4-bit."""
    plan = build_empty(build_model, model.config, "the model's config")
    wanted = {
        name: (tuple(p.shape), pieces(name, tuple(p.shape))) for name, p in plan.named_parameters()
    }
    _check_parts(model, plan, [part for _, parts in wanted.values() for part in parts])
    if lost := _untied(model, plan):
        raise ValueError(
            f"config.tie_word_embeddings says that the head is the embedding, but {lost} is a "
            "weight of its own, which would be lost: set it to False in model.config, or call "
            "model.tie_weights() to drop the head's"
        )
    for name, (shape, parts) in wanted.items():
        for part in parts:
            layer = _module(model, part.layer)
            if quantized and isinstance(layer, NF4Linear) and part.layer != part.name:
                yield from bnb_pending(part.layer, layer, dtype or embedding(model).dtype)
            else:
                yield _one(model, name, shape, part, dtype)


def _check_parts(model: nn.Module, plan: nn.Module, parts: list[Piece]) -> None:
    """Refuse modules that config.json does not describe."""
    known = {name for name, _ in plan.named_modules()}
    for part in parts:  # stacked experts in 4 bits are modules of their own
        layer = part.layer
        while layer and layer not in known:
            known.add(layer)
            layer = layer.rpartition(".")[0]
    for name, module in model.named_modules():
        if hasattr(module, "matrix_layer"):  # 4-bit experts: their parts are those matrices
            known |= {f"{name}.{part}" for part, _ in module.named_modules()}
    if extra := [name for name, _ in model.named_modules() if name not in known]:
        raise ValueError(
            f"the model has parts that config.json does not describe ({extra[0]}): merge and "
            "unload adapters before saving a model folder"
        )


def _untied(model: nn.Module, plan: nn.Module) -> str | None:
    """A parameter that the configuration ties to another, and that is neither it nor its copy."""
    for name, other in tied_names(plan).items():
        own, first = (_attribute(model, each) for each in (name, other))
        same = own is first or (
            isinstance(own, Tensor) and isinstance(first, Tensor) and torch.equal(own, first)
        )
        if not same:
            return name
    return None


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, or one of stacked experts' matrices as a layer, or None."""
    owner, rest = model, name.split(".") if name else []
    while rest and isinstance(part := getattr(owner, rest[0], None), nn.Module):
        owner, rest = part, rest[1:]
    if not rest:
        return owner
    layer = getattr(owner, "matrix_layer", None)
    return layer(".".join(rest)) if callable(layer) and rest[0].isdigit() else None


def _attribute(model: nn.Module, name: str) -> object:
    owner, _, attribute = name.rpartition(".")
    return getattr(_module(model, owner), attribute, None)


def _one(
    model: nn.Module, name: str, shape: tuple[int, ...], part: Piece, dtype: torch.dtype | None
) -> Pending:
    """One dense tensor: a parameter, its region, or a 4-bit layer expanded when its turn comes."""
    value = _attribute(model, name)
    if isinstance(value, Tensor) and tuple(value.shape) == shape:
        kept = dtype or value.dtype
        return Pending(part.name, part.shape, kept, lambda: value[part.where].to(kept))
    expand = getattr(_module(model, part.layer), "dense_weight", None)
    if not isinstance(value, Tensor) and part.name != part.layer and callable(expand):
        kept = dtype or embedding(model).dtype
        return Pending(part.name, part.shape, kept, lambda: expand().to(kept))
    raise ValueError(f"{name} should be a tensor of shape {shape}; got {_told(value)}")


def _told(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def write_weights(folder: Path, tensors: list[Pending], max_shard_size: int) -> None:
    """One file, or shards of at most `max_shard_size` bytes (one tensor at least) and an index."""
    shards: list[list[Pending]] = [[]]
    room = max_shard_size
    for item in tensors:
        if shards[-1] and item.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(item)
        room -= item.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= {item.name: file for item in shard}
    total = sum(item.nbytes for item in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_from(source: Path, target: Path) -> dict[str, Any]:
    """Copy the files around the weights; returns what config.json says beyond this library."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (source / "config.json").is_file():
        return {}
    raw = read_json_object(source / "config.json")
    if isinstance(raw.get("text_config"), dict):  # of a multimodal model the text part is written
        raw = raw["text_config"]
    # no longer true, said by the newer key, or the name of Python files that are not copied
    for key in ("quantization_config", "rope_scaling", "torch_dtype", "auto_map"):
        raw.pop(key, None)
    return raw


def _move_in(aside: Path, directory: Path) -> None:
    """Replace the model in `directory` by the one in `aside`; without config.json in between."""
    for file in aside.iterdir():
        sync(file)
    (directory / "config.json").unlink(missing_ok=True)
    sync(directory)
    stale = [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]
    for file in stale:
        file.unlink(missing_ok=True)
    # the configuration last: with it the folder becomes a model again
    for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, directory / file.name)
    sync(directory)
