"""How long does a model folder take to load, and how much memory beyond the model itself?

    python -m benchmarks.loading                              # 0.3 B parameters in bfloat16
    python -m benchmarks.loading --hidden 4096 --layers 4     # layers of a Llama-3-8B

A folder of random weights is written to a temporary place, in shards, and loaded by each stack in a
process of its own: lora_core and transformers, dense and 4-bit (transformers through bitsandbytes).
A thread samples RssAnon every 2 ms: memory the process cannot give back, pages of mapped files not
counted (transformers leaves dense weights that need no cast in the mapped files, which shows as
less than nothing above the model). Above the finished model, the bytes of its parameters and
buffers, lora_core may need twice the largest tensor in float32 plus 200 MB; more is an error. The
files are in the page cache for every stack, since they were just written.

Results first: the logits of lora_core in float32 may be off transformers' in float64 by twice the
error of transformers in float32 plus two roundings, and no 4-bit layer may be further from its
original than bitsandbytes' by more than 1 %. A stack that fails is not timed.
"""

import argparse
import gc
import json
import platform
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

from lora_core.checkpoint import load_model, load_state, save_model
from lora_core.models import CausalLM, ModelConfig

MB = 1e6


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


STACKS: dict[str, Callable[[Path], nn.Module]] = {
    "lora_core": _ours,
    "transformers": _theirs,
    "lora_core nf4": _ours_nf4,
    "transformers nf4": _theirs_nf4,
}


def rss_anon() -> int:
    """Bytes of this process's anonymous memory that are resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError("this benchmark reads RssAnon from /proc/self/status: it needs Linux")


class Peak:
    """Samples RssAnon every 2 ms while it is entered; `bytes` is the highest since entering."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.start = self.bytes = rss_anon()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, rss_anon())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, rss_anon())


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, and of bitsandbytes' scales beside them; shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [v for v in state.as_dict(packed=True).values() if isinstance(v, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def measure(stack: str, folder: Path) -> dict[str, float]:
    """Load once in this process: seconds, bytes of the model, peak anonymous bytes above it."""
    load = STACKS[stack]
    with tempfile.TemporaryDirectory() as tiny:  # imports and first calls are not loading
        write_folder(Path(tiny), argparse.Namespace(hidden=64, layers=1, vocab=64, dtype="float32"))
        load(Path(tiny))
    with Peak() as peak:
        begin = time.perf_counter()
        model = load(folder)
        seconds = time.perf_counter() - begin
    size = model_bytes(model)
    return {"seconds": seconds, "model": size, "above": peak.bytes - peak.start - size}


def write_folder(folder: Path, args: argparse.Namespace) -> None:
    """A model of random weights, in shards of a quarter of its size."""
    config = ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 128, 1),
        num_key_value_heads=max(args.hidden // 512, 1),
        bos_token_id=None,
        eos_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        model = CausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.init_weights(0.02, torch.Generator().manual_seed(0))
    size = sum(p.nbytes for p in model.parameters())
    save_model(model, folder, max_shard_size=size // 4)


@torch.no_grad()
def check_logits(folder: Path) -> None:
    """Refuse to go on unless our logits are as near to float64's as transformers'."""
    ids = torch.randint(10, (2, 17), generator=torch.Generator().manual_seed(0))
    ours = load_model(folder, dtype="float32")(ids).logits.double()
    theirs, truth = (
        _theirs(folder, dtype=dtype)(ids).logits.double()
        for dtype in (torch.float32, torch.float64)
    )
    error, peer = (ours - truth).abs().max().item(), (theirs - truth).abs().max().item()
    allowed = 2 * peer + 2 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    if error > allowed:
        raise ValueError(f"logits are off by {error:.2e}, allowed {allowed:.2e}: not timed")
    print(f"logits: error {error:.1e}, transformers' {peer:.1e} (float32 against float64)")


@torch.no_grad()
def check_quantized(folder: Path) -> None:
    """Refuse to go on unless every 4-bit layer is as near to its original as bitsandbytes'."""
    import bitsandbytes.functional as bnb

    ours, theirs = _ours_nf4(folder), _theirs_nf4(folder)
    worst = 0.0
    for name, weight in load_state(folder):
        if "_proj" not in name:
            continue
        layer = ours.get_submodule(name.removesuffix(".weight"))
        peer = theirs.get_parameter(name)
        restored = bnb.dequantize_4bit(peer.data, peer.quant_state).float()
        error, reference = (layer.dense_weight() - weight).norm(), (restored - weight).norm()
        worst = max(worst, (error / reference).item())
    if worst > 1.01:
        raise ValueError(f"a layer's 4-bit error is {worst:.3f} times bitsandbytes': not timed")
    print(f"nf4: error at most {worst:.4f} times bitsandbytes' in any layer")


def run(stack: str, folder: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--child", stack, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Write, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width (default 1024)")
    parser.add_argument("--layers", type=int, default=16, help="layers (default 16)")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary (default 32000)")
    parser.add_argument("--dtype", default="bfloat16", help="dtype on disk (default bfloat16)")
    parser.add_argument("--repeat", type=int, default=5, help="loads per stack (default 5)")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--out", type=Path, help="append the result to this file as a JSON line")
    parser.add_argument("--child", nargs=2, metavar=("STACK", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], Path(args.child[1]))))
        return
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {torch.get_num_threads()} threads; {versions}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder, args)
        check_logits(folder)
        if any("nf4" in stack for stack in args.stacks):
            check_quantized(folder)
        largest = max(tensor.numel() for _, tensor in load_state(folder)) * 4
        allowed = 2 * largest + 200 * MB
        print(f"largest tensor {largest / MB:.0f} MB in float32; allowed {allowed / MB:.0f} MB\n")
        print(
            f"{'stack':18} {'seconds':>8} {'20 %':>7} {'80 %':>7} {'model MB':>9} {'above MB':>9}"
        )
        for stack in args.stacks:
            report(stack, [run(stack, folder) for _ in range(args.repeat)], allowed, args)


def report(
    stack: str, runs: list[dict[str, float]], allowed: float, args: argparse.Namespace
) -> None:
    """One line of the table, and one of the file."""
    seconds = sorted(run["seconds"] for run in runs)
    low, high = (seconds[round(q * (len(runs) - 1))] for q in (0.2, 0.8))
    middle, above = statistics.median(seconds), max(run["above"] for run in runs)
    size = runs[0]["model"]
    print(f"{stack:18} {middle:8.2f} {low:7.2f} {high:7.2f} {size / MB:9.0f} {above / MB:9.0f}")
    if stack.startswith("lora_core") and above > allowed:
        raise ValueError(f"{stack} needed {above / MB:.0f} MB above the model")
    if args.out is not None:
        shape = {key: getattr(args, key) for key in ("hidden", "layers", "vocab", "dtype")}
        line = {"benchmark": "loading", "stack": stack, **shape, "torch": torch.__version__}
        line |= {"seconds": [low, middle, high], "model_bytes": size, "peak_above_bytes": above}
        with args.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
