"""Spectra of an adapter from its folder alone: without its model, and without building one.

Singular values need A and B and the scaling, which are all in the folder. |W| is read tensor by
tensor from the base's folder where there is one, dense or in bitsandbytes' 4 bits; a DoRA and a
full copy need the base's weight for their update too, and without it are left out.
`adapter_spectrum` (adapters/spectrum.py, which has the definitions) does the same on a model.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.adapters.spectrum import LayerSpectrum, SpectrumReport, layer_spectrum
from lora_core.adapters.update import Update, difference, low_rank, with_bias
from lora_core.checkpoint.adapter_files import CONFIG, read_adapter
from lora_core.checkpoint.bnb import packed_layers, read_layer
from lora_core.checkpoint.loaders import check_pair
from lora_core.checkpoint.lora_scaling import stated_scalings
from lora_core.checkpoint.safetensors_folder import SafetensorsFolder

__all__ = ["read_spectrum"]

_PREFIX = "base_model.model."
# what each key of a pair is called here, by the end of the key
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "lengths",
}
# starts that PEFT subtracts from the base, so that A and B are not the update
_SUBTRACTED = ("pissa", "olora", "corda", "loftq", "lora_ga")
NO_BASE = "its update needs the base's weight, which is not at hand: give the base's folder"


def read_spectrum(
    directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> SpectrumReport:
    """Look at a LoRA adapter in PEFT's format on disk.

    Args:
        directory: the adapter's folder, written here or by PEFT.
        base: folder of the base model, for |W|; None: without.

    Returns:
        Norms and singular values by layer; `base_norm` is None without a base.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: malformed files; another kind of adapter; A and B that are not the whole update
            (PEFT's PiSSA); a base whose weights have other sizes.
    """
    where = Path(directory)
    raw, tensors = read_adapter(where)
    _check_kind(where, raw)
    pairs, rest = _sorted(tensors)
    layers: list[LayerSpectrum] = []
    left_out: list[tuple[str, str]] = []
    with _Base(base) as weights:
        for site, parts in pairs.items():
            try:
                layers.append(_pair(site, parts, raw, weights))
            except LookupError as error:
                left_out.append((site, str(error.args[0])))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        for site, tensor in rest.items():
            try:
                layers.append(_copy(site, tensor, weights))
            except LookupError as error:
                left_out.append((site, str(error.args[0])))
    if not layers:
        told = f": {left_out[0][0]!r}: {left_out[0][1]}" if left_out else ""
        raise ValueError(f"{where} has no update of a weight to look at{told}")
    layers.sort(key=lambda layer: _by_number(layer.name))
    return SpectrumReport(where.name or str(where), tuple(layers), tuple(left_out))


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10, and so the layers in their order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _check_kind(where: Path, raw: Mapping[str, Any]) -> None:
    kind, start = raw["peft_type"], raw.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(
            f"{where} holds {kind}, not LoRA: load it into its model, where "
            "adapter_spectrum(model) looks at every kind that changes weights"
        )
    if isinstance(start, str) and start.lower().startswith(_SUBTRACTED):
        raise ValueError(
            f"{where / CONFIG} says init_lora_weights={start!r}: the base was changed too, so A "
            "and B are not the update; load it into its model and call adapter_spectrum(model)"
        )


def _sorted(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The pairs' tensors by site, and the others by key without prefix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        short = key.removeprefix(_PREFIX)
        end = next((end for end in _PARTS if short.endswith(end)), None)
        if end is None:
            rest[short] = tensor
        else:
            pairs.setdefault(short.removesuffix(end), {})[_PARTS[end]] = tensor
            if "embedding" in end:
                pairs[short.removesuffix(end)]["embedding"] = tensor
    return pairs, rest


def _pair(
    site: str, parts: Mapping[str, Tensor], raw: Mapping[str, Any], weights: "_Base"
) -> LayerSpectrum:
    """One layer's pair.

    Raises:
        LookupError: the base's weight is needed and not there.
        ValueError: tensors that do not fit.
    """
    if "down" not in parts or "up" not in parts:
        raise ValueError(f"{site!r} has only one of A and B")
    check_pair(site, parts["down"], parts["up"])
    down, up = parts["down"].flatten(1), parts["up"].flatten(1)
    rank = len(down)
    if up.shape[1] < rank:  # a grouped convolution: B block by block, A of all channels
        blocks = up.chunk(rank // up.shape[1])
        up = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]  # torch's
    scaling = stated_scalings(raw, {site: rank})[site]
    update = low_rank(down, up, scaling)
    found = weights.of(site, update.shape)
    if "lengths" in parts:
        update = _dora(update, parts, found, bool(raw.get("fan_in_fan_out")))
    if "bias" in parts:
        update = with_bias(update, parts["bias"].double() * scaling)
    norm = None if found is None else float(torch.linalg.vector_norm(found, dtype=torch.float64))
    return layer_spectrum(site, "DoRA" if "lengths" in parts else "LoRA", update, norm)


def _dora(
    update: Update, parts: Mapping[str, Tensor], weight: Tensor | None, transposed: bool
) -> Update:
    """m (W + s·B A) / |W + s·B A| - W, dense."""
    if weight is None:
        raise LookupError(NO_BASE)
    assert update.down is not None
    assert update.up is not None
    matrix = weight.double()
    if "embedding" in parts or (transposed and matrix.dim() == 2):
        matrix = matrix.t()
    matrix = matrix.flatten(1)
    if tuple(matrix.shape) != update.shape:  # a grouped convolution
        raise LookupError("a DoRA of a grouped convolution is looked at in its model only")
    whole = matrix + update.up @ update.down  # (N, K)
    norms = whole.norm(dim=1, keepdim=True)
    lengths = parts["lengths"].double().reshape(-1, 1)
    return difference(None, lengths * whole / torch.where(norms > 0, norms, 1.0), matrix)


def _copy(key: str, tensor: Tensor, weights: "_Base") -> LayerSpectrum:
    """A full copy of a weight; LookupError for anything else, and without a base."""
    site = key.removesuffix(".weight")
    if not key.endswith(".weight") or tensor.dim() < 2 or site.endswith(".base_layer"):
        raise LookupError("no pair and no copy of a weight matrix")
    found = weights.of(site, (len(tensor), tensor.numel() // len(tensor)))
    if found is None:
        raise LookupError(NO_BASE)
    norm = float(torch.linalg.vector_norm(found, dtype=torch.float64))
    return layer_spectrum(site, "FullCopy", difference(None, tensor, found), norm)


class _Base:
    """The weights of a base's folder, one at a time; of none, where there is no folder."""

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.folder = None if directory is None else SafetensorsFolder(directory)
        entries = {} if self.folder is None else self.folder.entries
        self.packed = packed_layers(entries)

    def __enter__(self) -> "_Base":
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder is not None:
            self.folder.__exit__(None, None, None)

    def of(self, site: str, shape: tuple[int, int]) -> Tensor | None:
        """A layer's weight.

        Args:
            site: its name in the model.
            shape: (N, K) of its matrix.

        Returns:
            The weight as it is stored, dequantized if in 4 bits, or None: it is not there.

        Raises:
            ValueError: it has another number of elements.
        """
        name = self._name(site)
        if self.folder is None or name is None:
            return None
        if (layer := name.removesuffix(".weight")) in self.packed:
            made = read_layer(self.folder, self.packed[layer], shape, None, torch.device("cpu"))
            return made.dense_weight()
        weight = self.folder.tensor(name)
        rows, columns = shape
        # of a grouped convolution the file's A has all channels, W those of a group
        if not weight.is_floating_point() or rows * columns % weight.numel():
            raise ValueError(
                f"the base's {name!r} is {weight.dtype} {tuple(weight.shape)}, the update "
                f"{rows} × {columns}: the adapter belongs to another base"
            )
        return weight

    def _name(self, site: str) -> str | None:
        """The entry of a layer's weight: with or without the prefix of a model with a head."""
        entries = {} if self.folder is None else self.folder.entries
        wanted = f"{site}.weight"
        if wanted in entries:
            return wanted
        near = [n for n in entries if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        return near[0] if len(near) == 1 else None
