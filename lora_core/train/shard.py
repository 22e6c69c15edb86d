"""Weights split over the processes of a run (FSDP2), for the time of the run.

Each layer's stored tensors are cut along their first dimension; the layer is gathered when its
forward or backward runs, and dropped after it. So a process holds 1 / world of the weights,
gradients and optimizer state, and one layer whole at a time (and what stands outside of the layers,
embedding and head, whole from forward to backward). What is gathered is what is stored: of a 4-bit
layer the codes (uint8) and the scales, 8-bit ones with their groups' scales, which are decoded on
arrival: half a byte a weight goes over the wire instead of two.

No tensor subclass is needed for that: since torch 2.12 `fully_shard` takes frozen parameters of any
dtype beside trained ones. bitsandbytes disguises its codes as floating-point parameters and keeps
the scales whole on every process; torchao has a tensor subclass of 1,200 lines.

There is no `MixedPrecisionPolicy(param_dtype=…)`: it would cast float32 scales and adapters to 16
bits with the rest. Gradients are summed in their own dtype, and not averaged (ranks.py).

Afterwards the model is as it was, plain and whole, where it was: a model in the host's memory is
trained on GPUs without ever being whole on one. FSDP2 has no way back of its own; what it changes
of a module is its class, its hooks and its parameters, and these are put back.

Ref: Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.quant import NF4Linear
from lora_core.train.parts import whole
from lora_core.train.ranks import Ranks
from lora_core.train.recompute import repeated_layers

NEEDED = (2, 12)


def can_shard(version: str = torch.__version__) -> bool:
    """Whether this torch splits frozen integer parameters."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= NEEDED


@contextlib.contextmanager
def sharded_model(
    model: nn.Module, ranks: Ranks, device: torch.device, on: bool = True
) -> Iterator[None]:
    """Within the block the model's weights are split over the processes.

    Args:
        model: whole and the same on every process, with its layers in an `nn.ModuleList`.
        ranks: the processes.
        device: where each process computes; the model may lie in the host's memory.
        on: False changes nothing.

    Yields:
        None. After the block the model is whole again, with what was trained. After an error in it
        its weights are gone: the other processes that hold them may be too.

    Raises:
        ValueError: there is one process only, or the model has no list of layers.
    """
    if on and ranks.world == 1:
        raise ValueError(
            "shard splits weights over processes and there is one: start with torchrun "
            "--nproc-per-node N -m lora_core …, or leave shard out"
        )
    if on and not can_shard():
        ranks.say(
            f"torch {torch.__version__} cannot split 4-bit weights, 2.12 can: each process holds "
            "the whole model"
        )
        model.to(device)
    if not on or not can_shard():
        yield
        return
    layers = repeated_layers(model, "shard")
    modules = [_Found.of(module) for module in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    homes = {name: tensor.device for name, tensor in tensors.items()}
    _split(model, layers, device, tensors)
    yield
    for name, part in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors:
            tensors[name].data = whole(part).data.to(homes[name])
    for found in modules:
        found.put_back()


def _split(
    model: nn.Module, layers: list[nn.Module], device: torch.device, tensors: dict[str, Tensor]
) -> None:
    """Split layer after layer, then the rest; each whole tensor is freed before the next is cut."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.shardable()
    for part in (*layers, model):
        prefix = names[id(part)]
        fully_shard(part, mesh=mesh)
        assert isinstance(part, FSDPModule)  # the module itself, under another class
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # which is then a plain sum, in gloo too
        # a batch may not reach an expert that another process's does
        part.set_reduce_scatter_unused_params(True, recurse=False)
        for name, _ in part.named_parameters(prefix=prefix):
            tensors[name].data = tensors[name].data.new_empty(0)


@dataclass(frozen=True)
class _Found:
    """What a module was before `fully_shard`."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]

    @staticmethod
    def of(module: nn.Module) -> "_Found":
        # tables of parameters, buffers and hooks are changed in place: copies of them
        held = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        return _Found(module, type(module), held)

    def put_back(self) -> None:
        """Undo what changed the class and the tables; other attributes stay as they are now."""
        from torch.distributed._composable_state import _module_state_mapping

        self.module.__class__ = self.kind
        held = vars(self.module)
        for name in held.keys() - self.attributes.keys():
            del held[name]
        for name, value in self.attributes.items():
            table = name in ("_parameters", "_buffers", "_non_persistent_buffers_set")
            if isinstance(value, dict) and (table or name.endswith("_hooks")):
                held[name].clear()  # the dict itself stays: handles of hooks point to it
                held[name].update(value)
        _module_state_mapping.pop(self.module, None)
