"""The process in which GPU jobs run: lines of JSON in, lines of JSON out. See `lanes`."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import timing
from benchmarks.gpu.check import check
from benchmarks.gpu.contenders import peers
from benchmarks.gpu.problem import device, normal
from benchmarks.gpu.timing import alive, described, measure
from benchmarks.gpu.tune import tune

Row = dict[str, Any]


def facts(job: Row) -> Iterator[Row]:
    """The machine, and the ceilings that shares refer to: a copy's bandwidth, a product's rate."""
    names = ("triton", "bitsandbytes", "lora-core")
    row = harness.machine() | {name: harness.version(name) for name in names}
    row["device"] = device().type
    row["peers"], row["note"] = peers()
    if device().type == "cuda":
        properties = torch.cuda.get_device_properties(device())
        row["capability"] = f"{properties.major}.{properties.minor}"
        row["multiprocessors"] = properties.multi_processor_count
        row["l2_bytes"] = properties.L2_cache_size
        row["memory_bytes"] = properties.total_memory
        row["cuda"] = torch.version.cuda
    yield {"kind": "facts"} | row
    if device().type == "cuda" or job["smoke"]:
        yield {"kind": "ceilings"} | _ceilings(job["smoke"])


def _ceilings(smoke: bool) -> dict[str, float]:
    """Measured on random data: on zeros a product runs faster than it ever will."""
    elements, side = (1 << 16, 64) if smoke else (1 << 28, 8192)
    stopwatch = harness.device_seconds if device().type == "cuda" else harness.host_seconds
    source = normal(elements, seed=1)
    target = torch.empty_like(source)
    square = normal(side, side, seed=2, dtype=torch.bfloat16)
    runs: dict[str, Callable[[Any], Any]] = {
        "copy": target.copy_,
        "product": lambda a: torch.mm(a, square),
        "launches": harness.captured(lambda t: t.add_(1), [source[:32]], 64),
    }
    inputs = {"copy": [source], "product": [square], "launches": [source[:32]]}
    # turns enough for the clocks to have risen long before the median
    timings = harness.time_in_turns(runs, inputs, 2 if smoke else 60, stopwatch)
    return {
        "bytes_per_second": 2 * source.nbytes / timings["copy"].median,
        "flops_per_second": 2 * side**3 / timings["product"].median,
        "launch_in_graph_seconds": timings["launches"].median / 64,
    }


KINDS: dict[str, Callable[[Row], Iterator[Row]]] = {
    "facts": facts,
    "check": check,
    "time": measure,
    "tune": tune,
}


def strict(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Do jobs until there are none, or until the device is broken."""
    # whatever a library prints must not get between the rows
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    for line in sys.stdin:
        job = json.loads(line)
        try:
            for row in KINDS[job["kind"]](job):
                out.write(json.dumps(strict(row)) + "\n")
        except Exception as problem:  # noqa: BLE001  whatever it is, the next job must run
            out.write(json.dumps(job | {"failure": described(problem)}) + "\n")
            alive()
            if isinstance(problem, harness.CaptureError):
                timing.spoilt.append(job["kind"])
        out.write(json.dumps({"kind": "done", "ends": bool(timing.spoilt)}) + "\n")


if __name__ == "__main__":
    main()
