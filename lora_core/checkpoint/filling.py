"""Weights from a folder into an empty model, one module at a time, quantized on the way.

Tensors come in the order of the files, the next ones being read while one is quantized
(`SafetensorsFolder.read_ahead`). A weight that becomes 4-bit is quantized from the values on disk,
in their own dtype: no copy in float32 is made, and the dense one goes before the next comes. What
is in 4 bits on disk is read into the memory that it stays in, without any arithmetic.

Whether the quantized weights were finite is noted where they are and asked once, at the end: a GPU
goes on quantizing while the next tensor is read.

Experts that are one stacked parameter in memory are filled region by region. In 4 bits they are
matrices of their own, as on disk: the module's method `with_4bit` gets them all by name and returns
the module that takes its place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_core.checkpoint.bnb import Packed, names_of, read_weight
from lora_core.checkpoint.layout import Layout, kept_dense
from lora_core.checkpoint.names import STACKED, Piece, pieces
from lora_core.checkpoint.safetensors_folder import SafetensorsFolder
from lora_core.quant import NF4Linear, NF4Tensor, quantize_4bit

BLOCK_SIZE = 64


@dataclass
class _Job:
    """What one module gets."""

    dense: dict[str, list[Piece]] = field(default_factory=dict)
    """{parameter's own name: the tensors that make it up}."""
    packed: list[Packed] = field(default_factory=list)
    """Weights in 4 bits on disk."""

    @property
    def names(self) -> list[str]:
        """What is read for it, in order."""
        dense = [piece.name for parts in self.dense.values() for piece in parts]
        return dense + [name for packed in self.packed for name in names_of(packed)]


@dataclass
class _Noted:
    """Whether 4 bits can hold a weight, not yet looked at."""

    name: str
    """The tensor it was."""
    where: tuple[int | slice, ...]
    """Its part of that tensor."""
    flag: Tensor
    """int32 (1,), on the weight's device: 1 if not."""


class Filler:
    """Fills an empty model from a folder.

    Args:
        model: on the meta device.
        folder: open, with the model's names.
        quantize: "nf4", "fp4", "int4" or None.
        dtype: of the dense weights.
        device: where the model goes.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: SafetensorsFolder,
        quantize: str | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.folder = model, folder
        self.quantize, self.dtype, self.device = quantize, dtype, device
        self._kept = kept_dense(model)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._sizes = {
            part.layer: part.shape for name in self._shapes for part in self._matrices(name)
        }
        self._flags: dict[str, _Noted] = {}

    def fill(self, layout: Layout) -> None:
        """Give every module its weights.

        Raises:
            ValueError: a weight that 4 bits cannot hold, or 4-bit entries that do not fit.
        """
        jobs = self._jobs(layout)
        tensors = self.folder.read_ahead(name for job in jobs.values() for name in job.names)
        for owner, job in jobs.items():
            self._place(owner, job, tensors)
        self._make_fresh(layout.fresh)
        flags = [noted.flag for noted in self._flags.values()]
        bad = torch.cat(flags).tolist() if flags else []
        for (layer, noted), is_bad in zip(self._flags.items(), bad, strict=True):
            if is_bad:
                self._explain(layer, noted)

    def _matrices(self, name: str) -> list[Piece]:
        return pieces(name, self._shapes[name])

    def _jobs(self, layout: Layout) -> dict[str, _Job]:
        """{module: what it gets}, modules in the order in which their first tensor lies on disk."""
        modules = {name for name, _ in self.model.named_modules()}
        jobs: dict[str, _Job] = {}
        for parameter, parts in layout.dense.items():
            owner, _, attribute = parameter.rpartition(".")
            jobs.setdefault(owner, _Job()).dense[attribute] = parts
        for layer, packed in layout.packed.items():
            owner = layer
            while owner not in modules:  # one of stacked experts: theirs
                owner = owner.rpartition(".")[0]
            jobs.setdefault(owner, _Job()).packed.append(packed)
        return jobs

    def _place(self, owner: str, job: _Job, tensors: Iterator[Tensor]) -> None:
        """Read one module's tensors, and put a 4-bit module in its place if it becomes one."""
        module = self.model.get_submodule(owner)
        four_bit: dict[str, NF4Tensor] = {}
        for attribute, parts in job.dense.items():
            name = f"{owner}.{attribute}"
            if self._becomes_4bit(owner, module, attribute):
                four_bit |= self._quantized(name, parts, tensors)
            else:
                setattr(module, attribute, nn.Parameter(self._dense(name, parts, tensors)))
        for packed in job.packed:
            entries = {name: next(tensors) for name in names_of(packed)}
            n, k = self._sizes[packed.layer]
            where = self.folder.directory
            four_bit[packed.layer] = read_weight(entries, packed, (n, k), where, self.device)
        if four_bit:
            self.model.set_submodule(owner, self._module_of(owner, module, four_bit))

    def _becomes_4bit(self, owner: str, module: nn.Module, attribute: str) -> bool:
        if self.quantize is None or owner in self._kept:
            return False
        if isinstance(module, nn.Linear):
            return attribute == "weight"
        stacked = attribute in STACKED and len(self._shapes[f"{owner}.{attribute}"]) == 3
        if stacked and not hasattr(module, "with_4bit"):
            raise ValueError(f"cannot quantize {owner}: the model's experts have no 4-bit form")
        return stacked

    def _dense(self, name: str, parts: list[Piece], tensors: Iterator[Tensor]) -> Tensor:
        if parts[0].name == name:
            return next(tensors).to(self.device, self.dtype)
        whole = torch.empty(self._shapes[name], dtype=self.dtype, device=self.device)
        for piece in parts:
            whole[piece.where] = next(tensors).to(self.device)
        return whole

    def _quantized(
        self, name: str, parts: list[Piece], tensors: Iterator[Tensor]
    ) -> dict[str, NF4Tensor]:
        """{layer: its weight}: the parameter itself, or each expert's matrices."""
        made: dict[str, NF4Tensor] = {}
        whole = parts[0].name == name  # on disk: a linear layer's weight, or stacked experts
        for part in parts:
            tensor = next(tensors).to(self.device)
            for matrix in self._matrices(name) if whole else [part]:
                where = matrix.where if whole else ()
                flag = torch.zeros(1, dtype=torch.int32, device=self.device)
                code = str(self.quantize)
                made[matrix.layer] = quantize_4bit(tensor[where], code, BLOCK_SIZE, flag=flag)
                self._flags[matrix.layer] = _Noted(part.name, where, flag)
            del tensor  # before the next one is read
        return made

    def _module_of(
        self, owner: str, module: nn.Module, four_bit: dict[str, NF4Tensor]
    ) -> nn.Module:
        if isinstance(module, nn.Linear):
            return NF4Linear.from_tensor(four_bit[owner], module.bias)
        replace: Any = getattr(module, "with_4bit", None)
        stacked = [n for n in self._shapes if n.rpartition(".")[0] == owner]
        lacking = [p.layer for n in stacked for p in self._matrices(n) if p.layer not in four_bit]
        if replace is None or lacking:
            reason = f"{lacking[0]} is not" if lacking else "the model has no 4-bit form of them"
            raise ValueError(
                f"{self.folder.directory} holds experts of {owner} in 4 bits, but {reason}"
            )
        made = replace({layer.removeprefix(f"{owner}."): w for layer, w in four_bit.items()})
        assert isinstance(made, nn.Module)
        return made

    def _make_fresh(self, names: list[str]) -> None:
        """Parameters that no file has: memory for them, and the model's own start."""
        for name in names:
            owner, _, attribute = name.rpartition(".")
            empty = torch.empty(self._shapes[name], dtype=self.dtype, device=self.device)
            setattr(self.model.get_submodule(owner), attribute, nn.Parameter(empty))
        if names:
            model: Any = self.model
            model.init_fresh(names)

    def _explain(self, layer: str, noted: _Noted) -> NoReturn:
        """Quantize once more, to say what is wrong and where."""
        weight = self.folder.tensor(noted.name)[noted.where].to(self.device)
        reason = "its values are not finite"
        try:
            quantize_4bit(weight, str(self.quantize), BLOCK_SIZE, name="weight")
        except ValueError as error:
            reason = str(error)
        raise ValueError(f"cannot quantize {layer}: {reason}")
