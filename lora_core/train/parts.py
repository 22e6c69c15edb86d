"""Tensors of which each process holds a part, and the same tensors whole.

Checkpoints hold whole tensors, so that a run's files do not depend on how it was split. A whole
tensor exists on the processes for as long as it takes to hand it to the one that writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, distributed

Some = TypeVar("Some", bound=Tensor)


def is_part(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor (a DTensor, as FSDP2 makes)."""
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part_here(tensor: Tensor) -> Tensor:
    """This process's part of the tensor; others as they are."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes, which all have to ask; others as they are."""
    return tensor.detach().full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def wholes(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather tensors one by one.

    Args:
        tensors: the same names, in the same order, on every process.
        keep: whether this process wants them; it takes part all the same.

    Returns:
        The whole tensors, gathered ones in the host's memory; {} where they are not wanted.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full.cpu() if is_part(tensor) else full
    return found


def like(model: Tensor, tensor: Tensor) -> Tensor:
    """Split a tensor as another one is.

    Args:
        model: a whole tensor, or one in parts.
        tensor: of the same shape, whole and the same on every process; or in parts already.

    Returns:
        `tensor`, in parts where `model` is; nothing is exchanged.
    """
    if not is_part(model) or is_part(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
    here = tensor.to(model.device)
    return distribute_tensor(here, mesh, placements, src_data_rank=None)


def buckets(tensors: Sequence[Some], size: int) -> Iterator[list[Some]]:
    """Runs of tensors of one dtype, of up to `size` elements or a single larger one each."""
    bucket: list[Some] = []
    held = 0
    for tensor in tensors:
        full = held + tensor.numel() > size
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
