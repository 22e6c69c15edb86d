"""A model from a Hugging Face folder, tensor by tensor.

config.json is checked, its sizes are held against the files' headers, the model is built on the
meta device (shapes, no memory), every header is compared with it (layout.py: names, shapes,
dtypes), and only then are weights read, one at a time, converted or quantized, and put in place
(filling.py). So a wrong folder fails before any work, and beyond the finished model there is never
more than one tensor, what quantizing it takes, and the next one, which is being read meanwhile.
Measured by `python -m benchmarks.loading`.

transformers with bitsandbytes makes every module first and quantizes in a second pass over what it
has loaded. Decoders and encoders load by the same call here; what is written back is in saving.py.
"""

import dataclasses
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from lora_core.checkpoint.bnb import is_packed
from lora_core.checkpoint.filling import Filler
from lora_core.checkpoint.layout import build_empty, check_sizes, embedding, lay_out, some
from lora_core.checkpoint.names import Naming
from lora_core.checkpoint.safetensors_folder import DTYPES, SafetensorsFolder, read_json_object
from lora_core.checkpoint.saving import dtype_name, dtype_of, save_model
from lora_core.models.build import build_model, read_config
from lora_core.models.decoder import CausalLM

__all__ = ["load_model", "save_model"]

_CODES = ("nf4", "fp4", "int4")


def load_model(
    directory: str | os.PathLike[str],
    quantize: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    head: str | None = None,
    num_labels: int | None = None,
) -> CausalLM:
    """Build the model of a Hugging Face folder and read its weights.

    What is left out (the vision part of a multimodal model, another head of an encoder) and what is
    made anew (a head that was asked for) is told by one warning each.

    Args:
        directory: config.json and `model.safetensors`, or shards with their index.
        quantize: "nf4", "fp4" or "int4" makes every linear layer but the head 4-bit, from the
            values on disk, in blocks of 64 with double quantization; None keeps them as they are.
        dtype: floating dtype of the other weights, as torch's or by name; None: config.json's, or
            the weights' own where that says nothing.
        device: where the model goes; None: the CPU.
        head: of an encoder, as `build_model`'s; None: config.json's.
        num_labels: of an encoder's head, as `build_model`'s.

    Returns:
        The model in evaluation mode, weights not shared with the file. It is typed as the decoder
        that nearly all folders hold; an encoder's folder gives an encoder.

    Raises:
        FileNotFoundError: config.json, the weights or a shard are missing.
        ValueError: anything else wrong with the folder, in one line that names file or tensor.
    """
    if quantize is not None and quantize not in _CODES:
        raise ValueError(f"quantize must be one of {', '.join(_CODES)}, or None; got {quantize!r}")
    directory = Path(directory)
    config = read_config(directory)
    path = directory / "config.json"
    raw = read_json_object(path)
    packed = is_packed(raw, path, quantize)
    with SafetensorsFolder(directory) as folder:
        check_sizes(config, folder)
        build = partial(build_model, head=head, num_labels=num_labels)
        model: Any = build_empty(build, config, path)
        layout, names = lay_out(model, folder, raw, packed)
        wanted = _dtype(model, folder, dtype)
        model.config = dataclasses.replace(model.config, dtype=dtype_name(wanted))
        Filler(model, folder, quantize, wanted, torch.device(device or "cpu")).fill(layout)
    model.tie_weights()
    _tell(directory, names, layout.fresh)
    return cast(CausalLM, model.eval())


def _dtype(model: Any, folder: SafetensorsFolder, asked: torch.dtype | str | None) -> torch.dtype:
    """The dtype of the dense weights: as asked, or as config.json or else the embedding has it."""
    told = asked if asked is not None else model.config.dtype
    if told is not None:
        return dtype_of(told)
    table = next(name for name, p in model.named_parameters() if p is embedding(model))
    found = DTYPES[folder.entries[table].dtype]
    try:
        return dtype_of(found)
    except ValueError:
        raise ValueError(
            f"{folder.directory} holds weights of {dtype_name(found)}, and config.json names no "
            "dtype to have them in: give dtype="
        ) from None


def _tell(directory: Path, names: Naming, fresh: list[str]) -> None:
    """Warn of what was not read and of what is new."""
    if names.left_out:
        parts = dict.fromkeys(name.removeprefix("model.").split(".")[0] for name in names.left_out)
        warnings.warn(
            f"{directory}: {some(list(names.left_out))} left out ({', '.join(parts)}): no part of "
            "the model that was loaded",
            stacklevel=3,
        )
    if fresh:
        warnings.warn(
            f"{directory} lacks {some(fresh)}: made anew, to be trained before use", stacklevel=3
        )
