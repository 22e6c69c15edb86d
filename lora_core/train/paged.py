"""AdamW with its state in the host's memory: 0 bytes a parameter on the device, plus 128 MB.

The moments, 8 bytes a parameter, lie in the host's memory in buckets of 64 MB. A step takes the
buckets one after another: copied to one of two staging buffers on the device, updated there by the
fused kernel, copied back. Copies run beside the computation, each way on a stream of its own:

    in       0  1     2     3
    update      0     1     2     3          staging buffer = bucket's number modulo 2
    out            0     1     2     3

Bucket i + 2 goes into i's buffer once i has been copied out, and no copy in begins before the same
bucket's copy out of the step before is done. The device waits, the host never does: what is done is
told from stream to stream by events (`lora_core.device.Lanes`). Bytes over the bus: 8 a parameter
each way, so 20 million LoRA parameters take 160 MB, 3 ms at 50 GB/s; it pays when state is large.

bitsandbytes pages through the driver's managed memory, a whole tensor when it is touched, and never
a tensor below 100,000 elements, of which LoRA is made. Here all are paged, whatever their sizes: a
bucket holds many small tensors or a part of a large one.

Numerically this is `torch.optim.AdamW(fused=True)`, bit for bit: the same kernel on the same
numbers. Parameters are cut at multiples of `CUT` elements alone, where that kernel begins a vector
anyway. On a CPU the staging buffers are ordinary memory and the copies are only a cost.

Ref: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 (paged optimizers).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.device import Lanes
from lora_core.train.fused_adamw import (
    ClosureOptimizer,
    check_numbers,
    check_parameters,
    fused_adamw_,
    load_as_saved,
)

__all__ = ["PagedAdamW"]

CUT = 4096  # elements
ALIGNED = 32  # elements: a tensor's moments begin at a multiple, so that they are read in vectors
_NAMES = ("mean", "square")


class Piece(NamedTuple):
    """A run of a parameter's elements and its place in a bucket."""

    param: Tensor
    first: int
    last: int
    at: int

    def moments(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The piece's mean and square in a bucket (2, n), flat."""
        end = self.at + self.last - self.first
        return buffer[0, self.at : end], buffer[1, self.at : end]

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of the parameter, or of its gradient, flat."""
        return tensor.view(-1)[self.first : self.last]


@dataclass
class Bucket:
    """Moments of one group that are moved together."""

    group: int
    """its group's number"""
    pieces: list[Piece] = field(default_factory=list)
    size: int = 0
    """elements of each moment"""
    host: Tensor | None = None
    """(2, size) float32: means, squares"""
    stored: Any = None
    """what says that the last copy into `host` is done"""


class PagedAdamW(ClosureOptimizer):
    """AdamW whose float32 moments live in the host's memory and visit the device by buckets.

    A group may have its own `lr`, `betas`, `eps` and `weight_decay`. `state_dict()` holds, for each
    parameter, `step` (int) and `mean` and `square`, float32 on the CPU in its shape.

    Args:
        params: parameters or groups; float32, contiguous, all on one device.
        lr: learning rate.
        betas: decay of the mean and of the mean square, in [0, 1).
        eps: added to the root of the mean square.
        weight_decay: decoupled, a step and unit of lr.
        bucket_bytes: of a bucket, at least 32768: moments are moved so many bytes at a time.
        lanes: who copies; None: `lora_core.device.Lanes` of the parameters' device.

    Raises:
        ValueError: a number out of range, or parameters on several devices.
        TypeError: a parameter that is not float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bucket_bytes: int = 64 << 20,
        lanes: Any = None,
    ) -> None:
        check_numbers(lr, betas, eps, weight_decay)
        if bucket_bytes < 8 * CUT:
            raise ValueError(f"bucket_bytes must be {8 * CUT} or more; got {bucket_bytes}")
        self.room = bucket_bytes // (8 * CUT) * CUT  # elements a bucket
        self.buckets: list[Bucket] = []
        self.lanes = lanes
        self.staging: list[Tensor] = []
        self.free: list[Any] = []  # what says that a staging buffer may be written
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters have to be float32, and make room for its moments."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_parameters(group["params"], type(self).__name__)
        devices = {p.device for g in self.param_groups for p in g["params"]}
        if len(devices) > 1:
            raise ValueError(
                f"parameters must lie on one device; got {', '.join(sorted(map(str, devices)))}"
            )
        if self.lanes is None:
            self.lanes = Lanes(devices.pop())
        made = fill_buckets(len(self.param_groups) - 1, group["params"], self.room)
        for bucket in made:
            bucket.host = self.lanes.host_zeros(2, bucket.size)
        self.buckets += made
        self.staging.clear()  # made anew, for the largest bucket

    def update(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1
        due = [b for b in self.buckets if any(piece.param.grad is not None for piece in b.pieces)]
        self._make_staging()
        fetched: list[Any] = [self._fetch(i, bucket) for i, bucket in enumerate(due[:1])]
        for i, bucket in enumerate(due):
            if i + 1 < len(due):
                fetched.append(self._fetch(i + 1, due[i + 1]))
            self.lanes.wait(fetched[i])
            self._update(bucket, self._stage(i, bucket))
            self._store(i, bucket)

    def _make_staging(self) -> None:
        """Two buffers on the device, each as large as the largest bucket."""
        if self.staging or not self.buckets:
            return
        size = max(bucket.size for bucket in self.buckets)
        self.staging = [self.lanes.device_empty(2 * size) for _ in range(2)]
        self.free = [self.lanes.mark()] * 2

    def _stage(self, i: int, bucket: Bucket) -> Tensor:
        """The place (2, n) of the step's i-th bucket on the device."""
        return self.staging[i % 2][: 2 * bucket.size].view(2, bucket.size)

    def _fetch(self, i: int, bucket: Bucket) -> Any:
        """Start copying a bucket in."""
        after = (self.free[i % 2], bucket.stored)
        return self.lanes.copy_in(self._stage(i, bucket), bucket.host, after)

    def _update(self, bucket: Bucket, stage: Tensor) -> None:
        """Update the bucket's parameters; moments of those without a gradient stay as they are."""
        pieces = [piece for piece in bucket.pieces if piece.param.grad is not None]
        moments = [piece.moments(stage) for piece in pieces]
        fused_adamw_(
            [piece.of(piece.param) for piece in pieces],
            [piece.of(_gradient(piece.param)) for piece in pieces],
            [mean for mean, _ in moments],
            [square for _, square in moments],
            [self.state[piece.param]["step"] for piece in pieces],
            self.param_groups[bucket.group],
        )

    def _store(self, i: int, bucket: Bucket) -> None:
        """Start copying a bucket out."""
        done = self.lanes.copy_out(bucket.host, self._stage(i, bucket), (self.lanes.mark(),))
        self.free[i % 2] = bucket.stored = done

    def finish(self) -> None:
        """Wait until the host's memory holds the state."""
        for bucket in self.buckets:
            self.lanes.finish(bucket.stored)

    def state_dict(self) -> dict[str, Any]:
        """Groups and state, a tensor a moment and parameter, copied."""
        self.finish()
        packed = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        pieces = self._pieces()
        for number, state in list(packed["state"].items()):
            p = params[number]
            parts = zip(*(piece.moments(host) for piece, host in pieces[p]), strict=True)
            whole = (torch.cat(part).view(p.shape) for part in parts)
            packed["state"][number] = {**state, **dict(zip(_NAMES, whole, strict=True))}
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over groups and state.

        Args:
            state_dict: of a `PagedAdamW` over parameters of the same shapes.

        Raises:
            ValueError: it is another optimizer's, or of other parameters.
        """
        self.finish()
        loaded = load_as_saved(self, state_dict, _fresh, torch.device("cpu"))
        for p, pieces in self._pieces().items():
            for piece, host in pieces:
                for moment, name in zip(piece.moments(host), _NAMES, strict=True):
                    moment.copy_(piece.of(loaded[p][name])) if p in loaded else moment.zero_()
        self.state.clear()
        for p, state in loaded.items():
            self.state[p] = {"step": state["step"]}

    def _pieces(self) -> dict[Tensor, list[tuple[Piece, Tensor]]]:
        """Each parameter's pieces in order, with the host memory of their buckets."""
        found: dict[Tensor, list[tuple[Piece, Tensor]]] = {}
        for bucket in self.buckets:
            assert bucket.host is not None  # made with the group
            for piece in bucket.pieces:
                found.setdefault(piece.param, []).append((piece, bucket.host))
        return found


def fill_buckets(group: int, params: Sequence[Tensor], room: int) -> list[Bucket]:
    """Put parameters into buckets one after another, cut where a bucket is full.

    Args:
        group: number of their group.
        params: in the group's order.
        room: elements a bucket, a multiple of `CUT`.

    Returns:
        Buckets without memory; each parameter is cut at multiples of `CUT`.
    """
    buckets = [Bucket(group)]
    for p in params:
        first = 0
        while first < p.numel() or not p.numel():
            at = -(-buckets[-1].size // ALIGNED) * ALIGNED
            left = p.numel() - first
            taken = left if left <= room - at else (room - at) // CUT * CUT
            if left and not taken:
                buckets.append(Bucket(group))
                continue
            buckets[-1].pieces.append(Piece(p, first, first + taken, at))
            buckets[-1].size = at + taken
            first += taken
            if not p.numel():
                break
    return buckets


def _gradient(p: Tensor) -> Tensor:
    """Its gradient, one element after another."""
    assert p.grad is not None  # asked before
    return p.grad.contiguous()


def _fresh(p: Tensor) -> dict[str, Any]:
    """What `state_dict()` holds of a parameter."""
    return {"step": 0, **{name: torch.empty_like(p) for name in _NAMES}}
