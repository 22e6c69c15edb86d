"""One stack, one run, one process: losses, seconds a step, peak memory.

    python -m benchmarks.training.worker ours FOLDER ADAPTER '{"method": "qlora", ...}'

Memory on a CPU is the process's highest resident set above that after the imports and a step of a
tiny model (loading the model included), on a GPU the allocator's peaks, allocated and
reserved. The last line printed is the result as JSON.
"""

import gc
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.problem import Settings, adapter_folder, batches, write_model
from benchmarks.training.stacks import STACKS
from lora_core.train.batches import tokens_in


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is now, VmHWM the highest so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def warm(stack: str, settings: Settings) -> None:
    """Train a tiny model for a step: what is imported or built on the way is not of the run."""
    tiny = replace(settings, shape="smoke", batch=1, sequence=64, steps=1, compile=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model("smoke", folder)
        step, around = STACKS[stack](tiny, folder, adapter_folder(tiny, folder))
        with around:
            step(batches(tiny)[0])


def run(stack: str, folder: Path, adapter: Path, settings: Settings) -> dict[str, Any]:
    """Losses, seconds of the timed steps and memory of one run."""
    warm(stack, settings)
    gc.collect()
    before = resident("VmRSS")
    steps = batches(settings)
    step, around = STACKS[stack](settings, folder, adapter)
    cuda = settings.device == "cuda"
    if cuda:
        loaded = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        loaded = resident("VmRSS") - before
    losses, seconds = [], []
    with around:
        for batch in steps:
            start = time.perf_counter()
            losses.append(step(batch))  # a float: the device is done
            seconds.append(time.perf_counter() - start)
    if cuda:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak, reserved = resident("VmHWM") - before, 0
    timed = slice(settings.untimed, None)
    return {
        "losses": losses,
        "seconds": seconds[timed],
        "tokens": [tokens_in(batch) for batch in steps[timed]],
        "peak": peak,
        "reserved": reserved,
        "loaded": loaded,
    }


if __name__ == "__main__":
    name, where, start_at, text = sys.argv[1:]
    found = run(name, Path(where), Path(start_at), Settings.from_json(text))
    sys.stdout.write(json.dumps(found) + "\n")
