"""Whole models to and from Hugging Face folders, tensor by tensor.

Loading: config.json is checked, the model is built on the meta device (shapes, no memory), every
header is compared with it (names, shapes, dtypes), and only then are weights read, one at a time
from the mapped file, converted or quantized, and put in place. So a wrong folder fails before any
work, and beyond the finished model there is never more than one tensor and what quantizing it
takes. Whether the quantized weights were finite is noted where they are and asked once, at the end:
a GPU goes on quantizing while the next tensor is read. Measured by `python -m benchmarks.loading`.

Saving: weights are written aside inside the target folder, synced, and moved; config.json is taken
away first and put back last, so a folder that a crash left half done has none and is refused when
loaded, instead of being a mixture that loads. Layers that hold no plain weight (4-bit ones) are
written dense, one at a time.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_core.checkpoint.bnb import (
    Packed,
    names_of,
    packed_layers,
    quantization_config,
    read_layer,
)
from lora_core.checkpoint.bnb import pending as bnb_pending
from lora_core.checkpoint.safetensors_folder import (
    DTYPES,
    INDEX,
    SINGLE,
    Pending,
    SafetensorsFolder,
    read_json_object,
    write_safetensors,
)
from lora_core.files import sync
from lora_core.models.config import DTYPES as MODEL_DTYPES
from lora_core.models.config import ModelConfig
from lora_core.models.decoder import CausalLM
from lora_core.quant import NF4Linear, quantize_4bit

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_CODES = ("nf4", "fp4", "int4")
_FLOATS = ("F64", "F32", "F16", "BF16")
# what makes up a model folder besides configuration and weights
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def load_model(
    directory: str | os.PathLike[str],
    quantize: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> CausalLM:
    """Build the model of a Hugging Face folder and read its weights.

    Args:
        directory: config.json and `model.safetensors`, or shards with their index.
        quantize: "nf4", "fp4" or "int4" makes every linear layer but the head 4-bit, from the
            values on disk, in blocks of 64 with double quantization; None keeps them as they are.
        dtype: floating dtype of the other weights, as torch's or by name; None: config.json's, or
            the weights' own where that says nothing.
        device: where the model goes; None: the CPU.

    Returns:
        The model in evaluation mode, weights not shared with the file.

    Raises:
        FileNotFoundError: config.json, the weights or a shard are missing.
        ValueError: anything else wrong with the folder, in one line that names file or tensor.
    """
    if quantize is not None and quantize not in _CODES:
        raise ValueError(f"quantize must be one of {', '.join(_CODES)}, or None; got {quantize!r}")
    directory = Path(directory)
    config = ModelConfig.from_folder(directory)
    is_packed = _is_packed(directory / "config.json", quantize)
    with torch.device("meta"):
        model = CausalLM(config)
    with SafetensorsFolder(directory) as folder:
        packed = packed_layers(folder.entries) if is_packed else {}
        names = _check_tensors(model, folder, packed)
        if dtype is None:
            dtype = config.dtype or DTYPES[folder.entries[_EMBEDDING].dtype]
        wanted = _dtype_of(dtype)
        model.config = dataclasses.replace(config, dtype=_name_of(wanted))
        place = torch.device(device or "cpu")
        _fill(model, folder, names, quantize, wanted, place)
        for name, layer in packed.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)  # `_check_tensors` has seen to it
            shape = (linear.out_features, linear.in_features)
            model.set_submodule(name, read_layer(folder, layer, shape, linear.bias, place))
    model.tie_weights()
    return model.eval()


def _is_packed(config_json: Path, quantize: str | None) -> bool:
    """Whether the folder says that its weights are bitsandbytes' 4-bit ones.

    Raises:
        ValueError: another quantization, or one on top of it is asked for.
    """
    told = read_json_object(config_json).get("quantization_config")
    if told is None:
        return False
    method = told.get("quant_method") if isinstance(told, dict) else told
    if method != "bitsandbytes" or not told.get("load_in_4bit"):
        raise ValueError(
            f"{config_json}: quantization_config names {method!r}; known is bitsandbytes in 4 bits "
            "alone, so load the 16-bit original, with quantize="
        )
    if quantize is not None:
        raise ValueError(
            f"{config_json} says that the weights are already quantized (quantization_config): "
            "leave quantize out, or load the 16-bit original"
        )
    return True


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    name = _name_of(dtype)
    if name not in MODEL_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(MODEL_DTYPES)}, or None; got {dtype!r}")
    return MODEL_DTYPES[name]


def _name_of(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensors(
    model: CausalLM, folder: SafetensorsFolder, packed: Mapping[str, Packed]
) -> list[str]:
    """Compare all headers with the model; returns the names of the dense tensors to read."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    elsewhere = {name for layer in packed.values() for name in names_of(layer)}
    # old files carry the rotary frequencies, which follow from the configuration
    found = {n: e for n, e in folder.entries.items() if not n.endswith("rotary_emb.inv_freq")}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in packed:
        if name not in linears or expected.pop(f"{name}.weight", None) is None:
            raise ValueError(
                f"{folder.directory} holds a 4-bit {name}, which config.json has no place for"
            )
    found = {name: entry for name, entry in found.items() if name not in elsewhere}
    where = folder.directory
    if missing := [name for name in expected if name not in found]:
        hint = "; a tied head needs tie_word_embeddings in config.json" if _HEAD in missing else ""
        raise ValueError(f"{where} lacks {_some(missing)}, which config.json calls for{hint}")
    tied = model.config.tie_word_embeddings
    if tied and _HEAD in found:
        expected[_HEAD] = expected[_EMBEDDING]
    if extra := [name for name in found if name not in expected]:
        raise ValueError(f"{where} holds {_some(extra)}, which config.json has no place for")
    for name, entry in found.items():
        if entry.shape != expected[name]:
            raise ValueError(
                f"{where / entry.file}: tensor {name} has shape {entry.shape}; config.json calls "
                f"for {expected[name]}"
            )
        if entry.dtype not in _FLOATS:
            raise ValueError(
                f"{where / entry.file}: tensor {name} has dtype {entry.dtype}; "
                f"weights must be one of {', '.join(_FLOATS)}"
            )
    if tied and _HEAD in found and not torch.equal(folder.tensor(_HEAD), folder.tensor(_EMBEDDING)):
        raise ValueError(
            f"{where}: config.json ties the head to the embedding, but {_HEAD} differs from "
            f"{_EMBEDDING}; set tie_word_embeddings to false to use both"
        )
    return [name for name in expected if not (tied and name == _HEAD)]


def _some(names: list[str]) -> str:
    """`tensor a`, or `5 tensors (a, b, c, …)`."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _fill(
    model: CausalLM,
    folder: SafetensorsFolder,
    names: list[str],
    quantize: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every module its weights, one module at a time, in the order of the names."""
    owners: dict[str, list[str]] = {}  # module's name -> its parameters' names
    for name in names:
        owner, _, parameter = name.rpartition(".")
        owners.setdefault(owner, []).append(parameter)
    flags: dict[str, Tensor] = {}  # tensor's name -> 1 if 4 bits cannot hold it
    for owner, parameters in owners.items():
        module = model.get_submodule(owner)
        quantized = quantize is not None and isinstance(module, nn.Linear) and owner != "lm_head"
        for parameter in parameters:
            tensor = folder.read(f"{owner}.{parameter}")
            # what becomes 4-bit is quantized from the values on disk
            kept = None if quantized and parameter == "weight" else dtype
            setattr(module, parameter, nn.Parameter(tensor.to(device, kept)))
            del tensor
        if quantized:
            assert isinstance(module, nn.Linear)
            flag = flags[owner] = torch.zeros(1, dtype=torch.int32, device=device)
            weight = quantize_4bit(module.weight, str(quantize), 64, True, flag=flag)
            model.set_submodule(owner, NF4Linear.from_tensor(weight, module.bias))
            del module, weight  # before the next one is read
    bad = torch.cat(list(flags.values())).tolist() if flags else []
    for owner, is_bad in zip(flags, bad, strict=True):
        if is_bad:
            _explain(owner, folder.tensor(f"{owner}.weight").to(device), str(quantize))


def _explain(owner: str, weight: Tensor, code: str) -> NoReturn:
    """Quantize once more, to say what is wrong and where."""
    reason = "its values are not finite"
    try:
        quantize_4bit(weight, code, 64, True, name="weight")
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"cannot quantize {owner}: {reason}")


def save_model(
    model: CausalLM,
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
        model: a `CausalLM` without adapters (merge and unload them first).
        directory: the folder; it is made.
        source: folder to copy tokenizer, chat template and generation_config.json from; keys of its
            config.json that this library does not know are kept as well.
        dtype: floating dtype of the weights on disk; None: each as it is, 4-bit layers in the
            embedding's.
        quantized: write 4-bit layers as they are, in bitsandbytes' format (checkpoint/bnb.py),
            instead of dense.
        max_shard_size: bytes; more are split over several files with an index.

    Raises:
        TypeError: the model is no `CausalLM`.
        ValueError: the model has adapters or other parts that config.json does not describe.
        FileNotFoundError: `source` is no folder.
        FileExistsError: `directory` is a file.
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"save_model writes this library's CausalLM; got {type(model).__name__}")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1; got {max_shard_size}")
    tensors = _pending(model, None if dtype is None else _dtype_of(dtype), quantized)
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
        _write_weights(aside, tensors, max_shard_size)
        config = dataclasses.replace(model.config, dtype=_name_of(tensors[0].dtype))
        text = json.dumps(raw | config.to_dict() | packing, indent=2)
        (aside / "config.json").write_text(text + "\n", encoding="utf-8")
        _move_in(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _packing(model: CausalLM, dtype: torch.dtype) -> dict[str, Any]:
    """The entry of config.json for a model with 4-bit layers."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    if not layers:
        raise ValueError("the model has no 4-bit layer to write: load it with quantize=")
    kinds = {(layer.code, layer.double_quant) for layer in layers}
    if len(kinds) > 1:
        raise ValueError(f"config.json can name one kind of 4-bit layer; there are {len(kinds)}")
    code, double_quant = kinds.pop()
    return {"quantization_config": quantization_config(code, double_quant, _name_of(dtype))}


def _pending(model: CausalLM, dtype: torch.dtype | None, quantized: bool) -> list[Pending]:
    """Every tensor that the configuration calls for: plain, made dense, or 4-bit."""
    with torch.device("meta"):
        plan = CausalLM(model.config)
    known = dict(plan.named_modules())
    if extra := [name for name, _ in model.named_modules() if name not in known]:
        raise ValueError(
            f"the model has parts that config.json does not describe ({extra[0]}): merge and "
            "unload adapters before saving a model folder"
        )
    if model.config.tie_word_embeddings and not _is_tied(model):
        raise ValueError(
            "config.tie_word_embeddings says that the head is the embedding, but it has a weight "
            "of its own, which would be lost: set it to False in model.config, or call "
            "model.tie_weights() to drop the head's"
        )
    tensors: list[Pending] = []
    for name, parameter in plan.named_parameters():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if quantized and attribute == "weight" and isinstance(module, NF4Linear):
            wanted = dtype or model.model.embed_tokens.weight.dtype
            tensors += bnb_pending(owner, module, wanted)
        else:
            tensors.append(_one(model, name, tuple(parameter.shape), dtype))
    return tensors


def _is_tied(model: CausalLM) -> bool:
    head = getattr(model.lm_head, "weight", None)
    embedding = model.model.embed_tokens.weight
    return head is embedding or (isinstance(head, Tensor) and torch.equal(head, embedding))


def _one(model: CausalLM, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Pending:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    value, dense = getattr(module, attribute, None), getattr(module, "dense_weight", None)
    if not isinstance(value, Tensor) and attribute == "weight" and callable(dense):
        wanted = dtype or model.model.embed_tokens.weight.dtype
        return Pending(name, shape, wanted, lambda: dense().to(wanted))
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        raise ValueError(f"{name} should be a tensor of shape {shape}; got {_told(value)}")
    kept = dtype or value.dtype
    return Pending(name, shape, kept, lambda: value.to(kept))


def _told(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _write_weights(folder: Path, tensors: list[Pending], max_shard_size: int) -> None:
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
    for key in ("quantization_config", "rope_scaling", "torch_dtype"):
        raw.pop(key, None)  # no longer true, or said by the newer key
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
