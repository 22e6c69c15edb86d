"""4-bit layers on disk in bitsandbytes' format, which transformers, vLLM and PEFT load.

In memory a 4-bit layer is `codes`, `scales`, `scale_absmax`, `scale_offset` (lora_core/quant). On
disk the same bytes have bitsandbytes' names. For a layer `X` with a weight (N, K) of n = N·K
elements, in blocks of `blocksize`:

    X.weight                                uint8 (ceil(n / 2), 1)    codes, first in high nibble
    X.weight.absmax                         float32 (blocks,), or uint8 (blocks,) if nested
    X.weight.quant_map                      float32 (16,)             value of each code
    X.weight.nested_absmax                  float32 (ceil(blocks / 256),)      if nested
    X.weight.nested_quant_map               float32 (256,)                     if nested
    X.weight.quant_state.bitsandbytes__nf4  uint8, JSON: quant_type, blocksize, dtype, shape and, if
                                            nested, nested_blocksize, nested_dtype, nested_offset

and config.json has a `quantization_config`. No code is computed again in either direction, so the
packed codes are byte-identical. The scale's offset travels as a decimal number in the JSON, which
Python prints so that it reads back to the same float32.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_core.checkpoint.safetensors_folder import Entry, SafetensorsFolder
from lora_core.checkpoint.safetensors_writing import Pending
from lora_core.quant import NF4Linear, NF4Tensor
from lora_core.quant.codebook import codebook
from lora_core.quant.double_quant import dynamic_map
from lora_kernels.blockwise4 import SCALE_GROUP, check_block_size

TYPES = ("nf4", "fp4")
_PART = re.compile(
    r"(?P<layer>.+)\.weight\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|"
    r"quant_state\.bitsandbytes__(?:nf4|fp4))"
)


@dataclass
class Packed:
    """The entries of one 4-bit layer in a file."""

    layer: str
    """Name of the layer."""
    state: str = ""
    """Name of the entry that holds the JSON."""
    parts: set[str] = field(default_factory=set)
    """What there is besides the codes and the JSON."""


def quantization_config(
    code: str, double_quant: bool, dtype: str, dense: Sequence[str] = ("lm_head",)
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        code: "nf4" or "fp4".
        double_quant: whether the scales are nested.
        dtype: what the layers compute in, "bfloat16" for example.
        dense: names of the linear layers that are not in 4 bits.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": code,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }


def pending(name: str, layer: NF4Linear, dtype: torch.dtype) -> Iterator[Pending]:
    """The entries of one layer's weight (its bias is an ordinary tensor).

    Args:
        name: of the layer.
        layer: "nf4" or "fp4".
        dtype: that bitsandbytes expands the weight to.

    Raises:
        ValueError: a code that bitsandbytes does not have.
    """
    if layer.code not in TYPES:
        raise ValueError(
            f"{name} is quantized with {layer.code!r}; bitsandbytes' format holds only "
            f"{' and '.join(TYPES)}"
        )
    numel = layer.in_features * layer.out_features
    weight = f"{name}.weight"
    state: dict[str, Any] = {
        "quant_type": layer.code,
        "blocksize": layer.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    tensors = {
        "": layer.codes.detach().reshape((numel + 1) // 2, 1),
        ".absmax": layer.scales,
        ".quant_map": layer.codebook.table(),
    }
    if layer.scale_absmax is not None and layer.scale_offset is not None:
        tensors[".nested_absmax"] = layer.scale_absmax
        tensors[".nested_quant_map"] = dynamic_map()
        state |= {"nested_blocksize": SCALE_GROUP, "nested_dtype": "float32"}
        state["nested_offset"] = layer.scale_offset.item()
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f".quant_state.bitsandbytes__{layer.code}"] = text
    for suffix, tensor in tensors.items():
        yield Pending(weight + suffix, tuple(tensor.shape), tensor.dtype, partial(_itself, tensor))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def packed_layers(entries: Mapping[str, Entry]) -> dict[str, Packed]:
    """The 4-bit layers among a folder's entries, by the layer's name.

    Raises:
        ValueError: parts of a 4-bit layer without the rest of it.
    """
    found: dict[str, Packed] = {}
    for name in entries:
        if match := _PART.fullmatch(name):
            layer, part = match["layer"], match["part"]
            packed = found.setdefault(layer, Packed(layer))
            if part.startswith("quant_state."):
                packed.state = name
            else:
                packed.parts.add(part)
    for layer, packed in found.items():
        nested = {"nested_absmax", "nested_quant_map"} & packed.parts
        wanted = {"absmax", "quant_map"}
        wanted |= {"nested_absmax", "nested_quant_map"} if nested else set()
        lacking = sorted(wanted - packed.parts)
        lacking += [] if packed.state else ["quant_state"]
        lacking += [] if f"{layer}.weight" in entries else ["the codes"]
        if lacking:
            raise ValueError(f"the 4-bit weight of {layer} is incomplete: no {', '.join(lacking)}")
    return found


def names_of(packed: Packed) -> list[str]:
    """Every entry that makes up the layer's weight."""
    weight = f"{packed.layer}.weight"
    return [weight, packed.state, *(f"{weight}.{part}" for part in sorted(packed.parts))]


def is_packed(raw: Mapping[str, Any], where: object, quantize: str | None) -> bool:
    """Whether config.json says that the weights are bitsandbytes' 4-bit ones.

    Args:
        raw: content of config.json.
        where: the file, for messages.
        quantize: what the caller asks for on top, or None.

    Raises:
        ValueError: another quantization, or one on top of it is asked for.
    """
    told = raw.get("quantization_config")
    if told is None:
        return False
    method = told.get("quant_method") if isinstance(told, dict) else told
    if not isinstance(told, dict) or method != "bitsandbytes" or not told.get("load_in_4bit"):
        raise ValueError(
            f"{where}: quantization_config names {method!r}; known is bitsandbytes in 4 bits "
            "alone, so load the 16-bit original, with quantize="
        )
    if quantize is not None:
        raise ValueError(
            f"{where} says that the weights are already quantized (quantization_config): "
            "leave quantize out, or load the 16-bit original"
        )
    return True


def read_layer(
    folder: SafetensorsFolder,
    packed: Packed,
    shape: tuple[int, int],
    bias: Tensor | None,
    device: torch.device,
) -> NF4Linear:
    """Make a 4-bit layer of its entries in a folder; arguments as `read_weight`'s, and the bias."""
    entries = {name: folder.read(name) for name in names_of(packed)}
    return NF4Linear.from_tensor(
        read_weight(entries, packed, shape, folder.directory, device), bias
    )


def read_weight(
    entries: Mapping[str, Tensor],
    packed: Packed,
    shape: tuple[int, int],
    directory: object,
    device: torch.device,
) -> NF4Tensor:
    """Make a 4-bit weight of its entries: codes and scales are taken over as they are.

    Args:
        entries: what `names_of` lists, on the CPU; on a CPU they become the weight's memory.
        packed: what `packed_layers` found.
        shape: (N, K), as config.json calls for.
        directory: the folder, for messages.
        device: where the weight goes.

    Raises:
        ValueError: entries that do not fit the shape or each other.
    """
    name = packed.layer
    where = f"{directory}: the 4-bit weight of {name}"
    nested = "nested_absmax" in packed.parts
    block_size, offset = _read_state(entries[packed.state], where, shape, nested)

    def part(suffix: str, size: int, dtype: torch.dtype) -> Tensor:
        tensor = entries[f"{name}.weight{suffix}"]
        if suffix == "":  # stored under any dtype, the bytes are the codes
            tensor = tensor.reshape(-1).view(torch.uint8)
        if tensor.dtype != dtype or tensor.numel() != size:
            raise ValueError(
                f"{where}: {suffix.removeprefix('.') or 'codes'} should be {size} of {dtype}; got "
                f"{tensor.numel()} of {tensor.dtype}"
            )
        return tensor.reshape(-1).to(device)

    numel = math.prod(shape)
    blocks = -(-numel // block_size)
    table = part(".quant_map", 16, torch.float32).cpu()
    kind = packed.state.rpartition("__")[2]
    book = codebook(kind)
    if not torch.equal(table, book.table()):
        raise ValueError(f"{where}: its quant_map is not the {kind} table")
    scale_absmax = scale_offset = None
    if nested:
        if not torch.equal(part(".nested_quant_map", 256, torch.float32).cpu(), dynamic_map()):
            raise ValueError(f"{where}: its nested_quant_map is not the signed dynamic map")
        scale_absmax = part(".nested_absmax", -(-blocks // SCALE_GROUP), torch.float32)
        scale_offset = torch.tensor(offset, dtype=torch.float32, device=device)
    return NF4Tensor(
        part("", (numel + 1) // 2, torch.uint8),
        part(".absmax", blocks, torch.uint8 if nested else torch.float32),
        torch.Size(shape),
        torch.float32,
        book,
        block_size,
        scale_absmax,
        scale_offset,
    )


def _read_state(
    text: Tensor, where: str, shape: tuple[int, int], nested: bool
) -> tuple[int, float]:
    """Block size and offset of the scales (0 if they are not nested) from a layer's JSON."""
    try:
        if text.dtype != torch.uint8 or text.dim() != 1:
            raise TypeError(f"text of {text.dtype} {tuple(text.shape)}")
        state = json.loads(bytes(text.tolist()).decode())
        told, block_size = tuple(state["shape"]), int(state["blocksize"])
        group = state["nested_blocksize"] if nested else SCALE_GROUP
        offset = float(state["nested_offset"]) if nested else 0.0
        check_block_size(block_size)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} has an unreadable quant_state: {error!r}") from None
    if told != shape:
        raise ValueError(f"{where} says it is {told}; config.json calls for {shape}")
    if group != SCALE_GROUP:
        raise ValueError(f"{where}: nested_blocksize is {group}; only {SCALE_GROUP} is known")
    if not math.isfinite(offset):
        raise ValueError(f"{where}: nested_offset is {offset}; the scales need a finite one")
    return block_size, offset
