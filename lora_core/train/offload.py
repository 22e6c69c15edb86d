"""What activation checkpointing keeps, each layer's input, goes to the host's memory.

    on the device between forward and backward     B T C · L   ->   B T C, one or two layers' inputs
    in the host's memory, pinned                   0           ->   B T C · L

For a 32-layer model of width 4096 at 4096 tokens in 16 bits that is 1 GiB. The copies cost no time
as long as a layer computes longer than its input travels: 32 MiB at 25 GB/s are 1.3 ms, against
some 10 ms of arithmetic. They run on a stream of their own (device.HostCopies):

    forward    layer i's input starts its way out as layer i begins. When layer i + 1 begins, the
               device's stream waits for that copy and the input is dropped: so its memory is
               reused in order, and never more than two are there.
    backward   layer i's input is handed out, and at once i - 1's starts its way back.

The last layer's input does not travel back: it is wanted first, and has not been dropped yet.

It works through the hooks that autograd calls for tensors it saves, set around the call of a
checkpoint, which saves the layer's inputs through them (torch 2.11 by an autograd function, 2.13
directly). Tensors that a layer gets by keyword, or within a tuple (rotary tables), are held by the
checkpoint itself and stay. `torch.autograd.graph.save_on_cpu` hooks alike, but waits for each copy,
and fetches an input only when it is wanted.

On a CPU the host's memory is where the inputs lie already, and nothing is done.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_core.device import HostCopies, host_copies
from lora_core.train.report import say

SMALLEST = 1 << 20  # bytes of a tensor that is worth the trip


class Copies(Protocol):
    """The device's service, `device.HostCopies`."""

    device: torch.device

    def out(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Start copying to the host; the copy, and what to wait for before the source goes."""
        ...

    def back(self, copy: Tensor) -> tuple[Tensor, Any]:
        """Start copying to the device; the tensor, and what to wait for before it is used."""
        ...

    def wait(self, event: Any) -> None:
        """Let the device's work from here on wait for a copy."""
        ...


def offload_to_host(model: nn.Module) -> "Offload | None":
    """The offload for a model's device, or one line that says why there is none.

    Args:
        model: its first parameter says which device.

    Returns:
        None where the host's memory is the device's.
    """
    device = next(model.parameters()).device
    copies: HostCopies | None = host_copies(device)
    if copies is None:
        say(f"offload_activations: on {device.type} they lie in the host's memory already")
        return None
    return Offload(copies)


class Offload:
    """Takes saved tensors to the host and brings them back one ahead.

    Args:
        copies: the device's service.
        smallest: bytes from which a tensor is moved.
    """

    def __init__(self, copies: Copies, smallest: int = SMALLEST) -> None:
        self.copies, self.smallest = copies, smallest
        self.newest: weakref.ref[_Away] | None = None

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context in which tensors that are saved for backward are moved."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack)

    def pack(self, tensor: Tensor) -> "Tensor | _Away":
        """Send a tensor away, and let go of the one before it.

        Args:
            tensor: that autograd saves.

        Returns:
            What stands for it; the tensor itself if it stays.
        """
        if not self._moves(tensor):
            return tensor
        before = None if self.newest is None else self.newest()
        if before is not None:
            before.let_go()
        away = _Away(self.copies, tensor.detach(), self.newest)
        self.newest = weakref.ref(away)
        return away

    def _moves(self, tensor: Tensor) -> bool:
        """Whether it is an activation of some size, in an order that a copy keeps."""
        trained = tensor.is_leaf and tensor.requires_grad
        here = tensor.device == self.copies.device and tensor.is_floating_point()
        large = tensor.nbytes >= self.smallest and tensor.is_contiguous()
        return here and large and not trained and not isinstance(tensor, nn.Parameter)


class _Away:
    """A tensor that is, or is about to be, in the host's memory alone.

    Args:
        copies: the device's service.
        tensor: the tensor.
        before: the one sent away before it, which backward wants after it.
    """

    def __init__(self, copies: Copies, tensor: Tensor, before: "weakref.ref[_Away] | None") -> None:
        self.copies, self.before = copies, before
        self.source: Tensor | None = tensor
        self.copy, self.left = copies.out(tensor)
        self.arriving: tuple[Tensor, Any] | None = None

    def let_go(self) -> None:
        """Drop the device's tensor; what the device does next waits until it is copied."""
        if self.source is not None:
            self.copies.wait(self.left)
            self.source = None

    def fetch(self) -> None:
        """Start its way back, unless it is there or under way."""
        if self.source is None and self.arriving is None:
            self.arriving = self.copies.back(self.copy)

    def take(self) -> Tensor:
        """The tensor on the device; the one before it starts its way back."""
        self.fetch()
        tensor = self.source
        if self.arriving is not None:
            tensor, event = self.arriving
            self.arriving = None
            self.copies.wait(event)
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        assert tensor is not None
        return tensor

    def __del__(self) -> None:
        """Memory that nobody waited for is not given to others while it is still written to."""
        if getattr(self, "arriving", None) is not None:
            self.copies.wait(self.arriving[1])  # type: ignore[index]  # it is there


def _unpack(saved: "Tensor | _Away") -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.take()
