"""What every timed benchmark shares: the machine, fair timing, memory, and a line of JSON a result.

A figure is a median with its 20th and 80th percentiles. Inputs rotate through more memory than the
caches hold, so that nothing is timed on data that an earlier run left there; peers run in the same
process on the same data, in turns. Memory is the most that was allocated at once beyond what was
there before, the result included.
"""

import functools
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

import torch

RESULTS = Path(__file__).parent / "results"
ROTATE_BYTES = 512 << 20  # more than any cache
FEWEST_TURNS = 3  # a median of fewer says nothing, whatever the limit on time
Input = TypeVar("Input")
Stopwatch = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Timing":
        """Summarise at least one measurement."""
        if len(seconds) < 2:
            return Timing(seconds[0], seconds[0], seconds[0])
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return Timing(statistics.median(seconds), fifths[0], fifths[3])

    def __str__(self) -> str:
        return f"{self.median * 1e3:9.2f} ms [{self.low * 1e3:.2f}, {self.high * 1e3:.2f}]"


def processor() -> str:
    """Name of the GPU in use, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def machine() -> dict[str, Any]:
    """What a result has to be read with: hardware, threads, software."""
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def rotation(make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Copies of one tensor, as many as overflow the caches: from 2 to 64."""
    first = make()
    copies = ROTATE_BYTES // max(1, first.nbytes)
    return [first, *(first.clone() for _ in range(min(63, max(1, copies))))]


def host_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call by the host's clock, from an idle device to an idle device."""
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    seconds = time.perf_counter() - start
    del result  # freeing is not part of the call
    return seconds


def device_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call between two events in the GPU's own stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait()
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop) / 1e3


def time_in_turns(
    runs: dict[str, Callable[[Input], Any]],
    inputs: dict[str, Sequence[Input]],
    repeats: int,
    stopwatch: Stopwatch = host_seconds,
    limit: float | None = None,
) -> dict[str, Timing]:
    """Time several ways to do one thing, taking turns, each over its rotating inputs.

    Args:
        runs: name to function of one input.
        inputs: name to the inputs it rotates through.
        repeats: timed calls of each, after one that is not timed.
        stopwatch: measures one call.
        limit: seconds after which no further turn begins, three turns excepted; None for no limit.

    Returns:
        Name to timing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    began = time.monotonic()
    for turn in range(-1, repeats):
        if limit is not None and turn >= FEWEST_TURNS and time.monotonic() - began > limit:
            break
        for name, run in runs.items():
            value = inputs[name][turn % len(inputs[name])]
            measured = stopwatch(functools.partial(run, value))
            if turn >= 0:
                seconds[name].append(measured)
    return {name: Timing.of(values) for name, values in seconds.items()}


def in_a_row(
    run: Callable[[Input], Any], inputs: Sequence[Input], calls: int
) -> Callable[[Any], None]:
    """A function that makes `calls` calls, each on the next of the inputs, and goes on from there.

    One such batch is long enough for an event's resolution and hides the host's time behind the
    device's, as a model's many launches do.
    """
    turns = itertools.cycle(inputs)

    def batch(_: Any) -> None:
        for value in itertools.islice(turns, calls):
            run(value)

    return batch


def captured(
    run: Callable[[Input], Any], inputs: Sequence[Input], calls: int
) -> Callable[[Any], Any]:
    """The same as one CUDA graph, which a call replays; on a CPU the calls themselves.

    The graph goes through all inputs, so that a replay finds nothing in the caches.
    """
    calls = -(-calls // len(inputs)) * len(inputs)
    if not torch.cuda.is_available():
        return in_a_row(run, inputs, calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # handles and workspaces are made outside the capture
        for value in inputs[:2]:
            run(value)
    torch.cuda.current_stream().wait_stream(side)
    graph, _ = capture(functools.partial(in_a_row(run, inputs, calls), None))
    return lambda _: graph.replay()


class CaptureError(RuntimeError):
    """A CUDA graph could not be made; the process can hardly make another."""


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Make a CUDA graph of a call, and keep what the call returned.

    Raises:
        CaptureError: with the reason. PyTorch then leaves its stream and its allocator as they are
            within a capture, so that the process had better end.
    """
    outside, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = run()
    except Exception as problem:
        torch.cuda.set_stream(outside)
        first = problem.__context__ or problem  # what broke it, not that it is broken
        said = (str(first).strip().splitlines() or [""])[0]
        raise CaptureError(f"{type(first).__name__}: {said[:200]}") from problem
    return graph, result


def past_the_cache(nbytes: int, device: torch.device) -> int:
    """Copies of something this large that together hold twice the second-level cache: 2 to 64."""
    if device.type != "cuda":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return min(64, max(2, -(-2 * cache // max(1, nbytes)) + 1))


def peak_allocation(run: Callable[[], Any]) -> int:
    """Most bytes allocated at once during one call beyond those before it, the result included."""
    if torch.cuda.is_available():
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    peak = now = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        peak = max(peak, now)
    return peak


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of a large copy: the limit that the shares refer to."""
    source = torch.zeros(ROTATE_BYTES // 8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": target.copy_}, {"copy": [source]}, repeats=5)["copy"]
    return 2 * source.nbytes / timing.low


def record(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append results as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def results_file() -> Path:
    """`benchmarks/results/<machine>.jsonl`."""
    slug = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    where = slug if torch.cuda.is_available() else f"{slug}-{os.cpu_count()}-cores"
    return RESULTS / f"{where}.jsonl"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
