"""What differs from device to device: memory, synchronisation, and the dtype a run computes in.

The mathematics of this library asks no device its name; the few services that must are here. The
dtype policy is three rules: weights keep the dtype they were loaded in, adapters and whatever else
is trained are float32, and activations are computed in `compute_dtype` through autocast. Only
float16 needs loss scaling, as its smallest normal number is 6e-5 against bfloat16's 1e-38.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_MEMORY = re.compile("you tried to allocate|out of memory", re.I)


def default_device() -> torch.device:
    """The accelerator torch finds, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def out_of_memory(error: BaseException) -> str | None:
    """What an error says, in one line, if it is that memory ran out.

    CUDA has an error of its own for it; the CPU's allocator raises a plain RuntimeError.

    Args:
        error: any.

    Returns:
        Its first line; None: it is another error.
    """
    plain = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    if not plain and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        return None
    return next(iter(str(error).strip().splitlines()), "out of memory")


def synchronize(device: torch.device | str) -> None:
    """Wait for the work queued on `device`; on the CPU there is none."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most memory used so far, in bytes.

    Args:
        device: a CUDA device gives the peak of its allocator since `reset_peak_memory`, anything
            else the process's peak resident size since it began.

    Returns:
        Bytes.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # not getrusage first: Linux lets a process begin with the peak of the one that started it
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        # Linux counts in KiB, macOS in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device | str) -> None:
    """Start the peak of a CUDA device anew; a process's own peak cannot be reset."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class HostCopies:
    """Copies between a CUDA device and pinned host memory, on a stream of their own.

    One stream serves both ways: a step's copies out all come before its copies back. Memory is the
    current stream's; who lets it go, or uses it, calls `wait` first. Pinned memory comes from
    torch's allocator, which hands a block out again only when the copies on it are done.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Start copying a contiguous tensor out; give the copy and what says that it is made."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return copy, self._copy(copy, tensor)

    def back(self, copy: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Start copying to the device; give the tensor and what says that it is there."""
        tensor = torch.empty_like(copy, device=self.device)
        return tensor, self._copy(tensor, copy)

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the current stream, not the host, wait for a copy."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        # what is in the tensor, or was in its memory, is the current stream's work
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        return self.stream.record_event()


def host_copies(device: torch.device | str) -> HostCopies | None:
    """The copies between a device and the host.

    Args:
        device: any.

    Returns:
        None where the host's memory is the device's own.
    """
    device = torch.device(device)
    return HostCopies(device) if device.type == "cuda" else None


class Lanes:
    """Copies to a device and back, each way on a stream of its own, beside what it computes.

    Both ways of the bus are then in use at once. Where there are no such streams a copy is made at
    once and there is nothing to wait for, so that callers need not tell the two apart.

    Args:
        device: where the computation is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.beside = self.device.type == "cuda"
        self.streams = [self._stream() for _ in range(2 if self.beside else 0)]

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's

    def host_zeros(self, *shape: int) -> torch.Tensor:
        """Float32 zeros in the host's memory, pinned where that lets copies run beside."""
        return torch.zeros(shape, dtype=torch.float32, device="cpu", pin_memory=self.beside)

    def device_empty(self, *shape: int) -> torch.Tensor:
        """Float32 memory on the device that both lanes may use; not before a first `mark`."""
        made = torch.empty(shape, dtype=torch.float32, device=self.device)
        for stream in self.streams:
            made.record_stream(stream)
        return made

    def copy_in(
        self, to: torch.Tensor, source: torch.Tensor, after: Sequence[torch.cuda.Event | None]
    ) -> torch.cuda.Event | None:
        """Copy host memory to the device once all of `after` is done.

        Returns:
            What to wait for; None if it is done already.
        """
        return self._copy(0, to, source, after)

    def copy_out(
        self, to: torch.Tensor, source: torch.Tensor, after: Sequence[torch.cuda.Event | None]
    ) -> torch.cuda.Event | None:
        """Copy from the device to host memory, likewise."""
        return self._copy(1, to, source, after)

    def mark(self) -> torch.cuda.Event | None:
        """What says that the device has computed all that it was told so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.beside else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let what the device computes next, not the host, wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event | None) -> None:
        """Let the host wait."""
        if event is not None:
            event.synchronize()

    def _copy(
        self,
        lane: int,
        to: torch.Tensor,
        source: torch.Tensor,
        after: Sequence[torch.cuda.Event | None],
    ) -> torch.cuda.Event | None:
        if not self.beside:
            to.copy_(source)
            return None
        stream = self.streams[lane]
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        return stream.record_event()


class Recorded:
    """A call that works on fixed memory, captured as a CUDA graph and replayed from then on.

    The first call runs as it is, on a stream of its own: libraries make their handles and
    workspaces then, which capturing forbids. The second is captured, which computes nothing, and
    replayed; further ones are replayed. So each call has its effect once.

    A call that cannot be captured is made as it is each time, and a warning says why.

    Args:
        call: reads no number back to the host, and finds its tensors where they were each time.
        device: a CUDA device.
    """

    def __init__(self, call: Callable[[], None], device: torch.device) -> None:
        self.call, self.device = call, device
        self.warm = False
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Make the call."""
        if self.replay is not None:
            self.replay()
        elif not self.warm:
            self._on_a_stream_of_its_own()
        else:
            self.replay = self._captured()
            self.replay()

    def _on_a_stream_of_its_own(self) -> None:
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.call()
        current.wait_stream(side)
        self.warm = True

    def _captured(self) -> Callable[[], None]:
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.call()
        except RuntimeError as problem:
            torch.cuda.set_stream(outside)
            first = problem.__context__ or problem  # what broke it, not that it is broken
            said = next(iter(str(first).strip().splitlines()), type(first).__name__)
            warnings.warn(f"generating without a CUDA graph: {said}", stacklevel=2)
            return self.call
        return graph.replay


def recorded(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A call that is to be made many times on the same memory, in the device's fastest way.

    Args:
        call: see `Recorded`.
        device: where its tensors are.

    Returns:
        A `Recorded` on a CUDA device, elsewhere the call itself.
    """
    return Recorded(call, device) if device.type == "cuda" else call


@dataclass(frozen=True)
class DtypePolicy:
    """How a run computes: the dtype of activations, and whether the loss is scaled."""

    device: torch.device
    """where the model is"""
    compute_dtype: torch.dtype
    """dtype of the matrix products"""

    @property
    def scales_loss(self) -> bool:
        """Whether small gradients would be flushed to zero without loss scaling."""
        return self.compute_dtype is torch.float16

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context a forward pass runs in; float32 needs none."""
        if self.compute_dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)

    def __str__(self) -> str:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        scaled = ", loss scaled" if self.scales_loss else ""
        return f"{dtype} on {self.device.type}{scaled}; trained weights and optimizer in float32"


def dtype_policy(name: str, device: torch.device | str) -> DtypePolicy:
    """Choose the dtype a run computes in.

    Args:
        name: "auto" (bfloat16 on a GPU that has it, else float32), "float32", "bfloat16" or
            "float16".
        device: where the model is.

    Returns:
        The policy; `str()` of it is one line for the user.

    Raises:
        ValueError: an unknown name.
    """
    device = torch.device(device)
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return DtypePolicy(device, torch.bfloat16 if has_bf16 else torch.float32)
    if name not in _NAMES:
        raise ValueError(f'dtype must be "auto" or one of {", ".join(_NAMES)}; got {name!r}')
    return DtypePolicy(device, _NAMES[name])


def resident_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which frozen weights are held: bfloat16 where the device multiplies it natively.

    On a CPU float32: the adapters' arithmetic is then exact to rounding, and most CPUs gain nothing
    from bfloat16.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32
