"""How long does a model folder take to load, and how much memory beyond the model itself?

    python -m benchmarks.loading                              # 0.3 B parameters in bfloat16
    python -m benchmarks.loading --shape 1b --out             # Llama-3.2-1B's sizes, recorded
    python -m benchmarks.loading --shape 8b --repeat 3        # Llama-3-8B's: 16 GB of disk, 6 more
    python -m benchmarks.loading --shape 4096,4 --cold        # layers of an 8B, from the disk

A folder of random weights is written to a temporary place, in shards, and loaded by each stack in a
process of its own: lora_core and transformers, dense, 4-bit quantized on load (transformers through
bitsandbytes), and from the 4-bit folder in bitsandbytes' format that `save_model` writes. A thread
samples memory every 2 ms. "Above" is the peak of RssAnon above the finished model (the bytes of its
parameters and buffers): memory the process cannot give back, pages of mapped files not counted.
transformers leaves dense weights that need no cast in the mapped files, which shows as less than
nothing above the model. "RSS" is the peak with pages of files. Both start at what the process had
after its imports and a load of a tiny model. lora_core may need twice the largest tensor in float32
plus 200 MB above the model; more is an error.

The files were just written, so as much of them as fits is in the page cache, for every stack; with
--cold they are dropped from it before each load. A stack that the machine's free memory cannot hold
is skipped, and the reason printed and recorded.

Results first, on one layer of the same width with a vocabulary of at most 1024, since float64 has
no room for more: the logits of lora_core in float32 may be off transformers' in float64 by twice
the error of transformers in float32 plus two roundings, and no 4-bit layer may be further from its
original than bitsandbytes' by more than 1 %. And in every timed process of lora_core's the first
and the last layer and the final norm are compared with the files, to a bit. What fails is not
timed.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import machine, record, results_file, version
from benchmarks.loading_folders import (
    bytes_on_disk,
    check_disk,
    check_loaded,
    check_logits,
    check_quantized,
    cut,
    largest,
    memory_needed,
    shape_of,
    write_folder,
)
from lora_core.checkpoint import load_model, save_model
from lora_core.models import ModelConfig

MB = 1e6
ROOT = Path(__file__).parents[1]


def _ours(folder: Path) -> nn.Module:
    return load_model(folder)


def _ours_nf4(folder: Path) -> nn.Module:
    return load_model(folder, quantize="nf4")


def _theirs(folder: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def _theirs_nf4(folder: Path) -> nn.Module:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return _theirs(folder, quantization_config=config, device_map="cpu")


def _theirs_packed(folder: Path) -> nn.Module:
    return _theirs(folder, device_map="cpu")


# stack -> (load, whether it reads the 4-bit folder, whether its linear layers are 4-bit)
STACKS: dict[str, tuple[Callable[[Path], nn.Module], bool, bool]] = {
    "lora_core": (_ours, False, False),
    "transformers": (_theirs, False, False),
    "lora_core nf4": (_ours_nf4, False, True),
    "transformers nf4": (_theirs_nf4, False, True),
    "lora_core 4-bit folder": (_ours, True, True),
    "transformers 4-bit folder": (_theirs_packed, True, True),
}


def resident() -> tuple[int, int]:
    """Bytes of this process that are resident: anonymous ones, and all."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "VmRSS:")):
            found[line.partition(":")[0]] = int(line.split()[1]) * 1024
    if len(found) < 2:
        raise ValueError("this benchmark reads RssAnon from /proc/self/status: it needs Linux")
    return found["RssAnon"], found["VmRSS"]


class Peak:
    """Samples memory every 2 ms while it is entered; `anonymous` and `all` are above the start."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self._start = self._most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._look()

    def _look(self) -> None:
        now = resident()
        self._most = max(self._most[0], now[0]), max(self._most[1], now[1])

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    @property
    def anonymous(self) -> int:
        """Bytes of memory of the process's own."""
        return self._most[0] - self._start[0]

    @property
    def all(self) -> int:
        """The same with pages of files."""
        return self._most[1] - self._start[1]


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, and of bitsandbytes' scales beside them; shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [v for v in state.as_dict(packed=True).values() if isinstance(v, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def measure(stack: str, folder: Path, dense: Path) -> dict[str, float]:
    """Load once in this process: seconds, bytes of the model, peak of memory."""
    load, packed, _ = STACKS[stack]
    with tempfile.TemporaryDirectory() as name:  # imports and first calls are not loading
        tiny = Path(name)
        write_folder(tiny, shape_of("64,1", 64), "float32")
        if packed:
            save_model(_ours_nf4(tiny), tiny, quantized=True)
        load(tiny)
    with Peak() as peak:
        begin = time.perf_counter()
        model = load(folder)
        seconds = time.perf_counter() - begin
    size = model_bytes(model)
    if stack.startswith("lora_core"):
        check_loaded(model, dense)
    return {"seconds": seconds, "model": size, "above": peak.anonymous - size, "rss": peak.all}


def in_a_process(*arguments: object) -> dict[str, Any]:
    """Run this file again; its last line is the result.

    Raises:
        RuntimeError: it failed, with what it said last.
    """
    command = [sys.executable, "-m", "benchmarks.loading", "--child", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        killed = " (killed: out of memory?)" if done.returncode == -9 else ""
        raise RuntimeError(f"ended with {done.returncode}{killed}: {said}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def answer(task: str, folder: Path, other: Path) -> dict[str, Any]:
    """What a process of its own does: check, write the 4-bit folder, or measure a stack."""
    if task == "check":
        said = [
            check_logits(folder, _theirs),
            check_quantized(folder, _ours_nf4(folder), _theirs_nf4(folder)),
        ]
        return {"said": said}
    if task == "pack":
        save_model(_ours_nf4(folder), other, quantized=True, max_shard_size=2_000_000_000)
        return {"disk": bytes_on_disk(other)}
    return measure(task, folder, other)


def available() -> int:
    """Bytes of memory that processes can still have."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) * 1024


def drop_cached(folder: Path) -> None:
    """Drop a folder's weights from the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages not yet written are not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def main() -> None:
    """Write, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", help="1b, 8b, another size of `lora-core plan`, or hidden,layers"
    )
    parser.add_argument("--hidden", type=int, default=1024, help="width (default 1024)")
    parser.add_argument("--layers", type=int, default=16, help="layers (default 16)")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary (default 32000)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype on disk (default bfloat16)")
    parser.add_argument("--repeat", type=int, default=5, help="loads per stack (default 5)")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument(
        "--cold", action="store_true", help="read from the disk, not from its cache"
    )
    parser.add_argument("--where", type=Path, help="where the temporary folders go")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=results_file(),
        help="append the results as JSON lines [results/<machine>.jsonl]",
    )
    parser.add_argument("--child", nargs=3, metavar="X", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        task, folder, other = args.child
        print(json.dumps(answer(task, Path(folder), Path(other))))
        return
    args.shape = args.shape or f"{args.hidden},{args.layers}"
    config = shape_of(args.shape, args.vocab)
    facts = machine() | {name: version(name) for name in ("transformers", "bitsandbytes")}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    with tempfile.TemporaryDirectory(dir=args.where) as name:
        compare(Path(name), config, args, facts)


def compare(
    place: Path, config: ModelConfig, args: argparse.Namespace, facts: dict[str, Any]
) -> None:
    """Write the folders, check, and time every stack."""
    dense, packed, small = (place / name for name in ("dense", "packed", "small"))
    itemsize = getattr(torch, args.dtype).itemsize
    check_disk(config, itemsize, place)
    for folder in (dense, small):
        folder.mkdir()
    write_folder(small, cut(config), args.dtype)
    print(*in_a_process("check", small, small)["said"], sep="\n")
    write_folder(dense, config, args.dtype)
    if any(STACKS[stack][1] for stack in args.stacks):
        in_a_process("pack", dense, packed)
    whole = 4 * largest(config)
    allowed = 2 * whole + 200 * MB
    print(f"largest tensor {whole / MB:.0f} MB in float32; allowed {allowed / MB:.0f} MB\n")
    head = ("seconds", "20 %", "80 %", "disk MB", "model MB", "above MB", "RSS MB")
    print(f"{'stack':26}" + "".join(f"{title:>10}" for title in head))
    for stack in args.stacks:
        folder = packed if STACKS[stack][1] else dense
        memory = memory_needed(config, itemsize, STACKS[stack][2])
        row = {"benchmark": "loading", **facts, "stack": stack, "shape": args.shape}
        row |= {"hidden": config.hidden_size, "layers": config.num_hidden_layers}
        row |= {"vocab": config.vocab_size, "dtype": args.dtype, "cold": args.cold}
        row |= {"disk_bytes": bytes_on_disk(folder), **timed(stack, folder, dense, args, memory)}
        print_row(stack, row)
        if args.out is not None:
            record(args.out, [row])
        if stack.startswith("lora_core") and row.get("peak_above_bytes", 0) > allowed:
            raise ValueError(
                f"{stack} needed {row['peak_above_bytes'] / MB:.0f} MB above the model"
            )


def timed(
    stack: str, folder: Path, dense: Path, args: argparse.Namespace, memory: int
) -> dict[str, Any]:
    """Load `--repeat` times, each in a process of its own; or why not."""
    free = available()
    if memory > free:
        return {"skipped": f"needs {memory / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"}
    runs = []
    for _ in range(args.repeat):
        if args.cold:
            drop_cached(folder)
        try:
            runs.append(in_a_process(stack, folder, dense))
        except RuntimeError as error:
            if stack.startswith("lora_core"):
                raise
            return {"skipped": str(error)}
    seconds = sorted(run["seconds"] for run in runs)
    low, high = (seconds[round(q * (len(runs) - 1))] for q in (0.2, 0.8))
    return {
        "seconds": [statistics.median(seconds), low, high],
        "model_bytes": runs[0]["model"],
        "peak_above_bytes": max(run["above"] for run in runs),
        "peak_rss_bytes": max(run["rss"] for run in runs),
    }


def print_row(stack: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    if "skipped" in row:
        print(f"{stack:26}  skipped: {row['skipped']}", flush=True)
        return
    times = "".join(f"{value:10.2f}" for value in row["seconds"])
    keys = ("disk_bytes", "model_bytes", "peak_above_bytes", "peak_rss_bytes")
    print(f"{stack:26}{times}" + "".join(f"{row[key] / MB:10.0f}" for key in keys), flush=True)


if __name__ == "__main__":
    main()
