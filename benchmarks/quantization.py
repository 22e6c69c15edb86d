"""How long, how much memory, how exact: quantizing to NF4 and expanding it again.

    python -m benchmarks.quantization            # the weights of a Llama-3-8B layer, in bfloat16
    python -m benchmarks.quantization --smoke    # toy shapes, a second

Peers: bitsandbytes, with and without double quantization, and torchao's NF4Tensor, which always
quantizes its scales. Before anything is timed, each result is checked against the definition: ours
bit for bit, bitsandbytes' codes against ours byte for byte, every reconstruction against the mean
error that NF4 has on normal weights. One that fails is not timed and the command exits with 1.

The share of the limit compares the bytes that have to move (the 16-bit weight on one side, codes
and scales on the other) with what a plain copy moves on this machine in the same time.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from lora_core.quant import codebook, quantize_nf4
from lora_kernels import backend_for

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
TOY = ((128, 128), (64, 512))  # torchao takes multiples of 16384 elements only
# mean |error| of NF4 with blocks of 64 on N(0, 1), and of the same with 8-bit scales, torchao's
# linear ones included; reference figures of bitsandbytes' tests, 7 standard deviations apart
MEAN_ERROR = 0.0728


@dataclass(frozen=True)
class Peer:
    """One way to quantize and to expand."""

    name: str
    quantize: Callable[[Tensor], Any]
    expand: Callable[[Any], Tensor]
    double_quant: bool


def peers() -> tuple[list[Peer], list[str]]:
    """Whoever can be imported, and a line for whoever cannot."""
    found, absent = [], []
    for dq in (False, True):
        run = functools.partial(quantize_nf4, double_quant=dq)
        found.append(Peer("lora-core", run, lambda q: q.dequantize(), dq))
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        absent.append(f"bitsandbytes is not measured: {error}")
    else:
        for dq in (False, True):
            run = functools.partial(bnb.quantize_4bit, quant_type="nf4", compress_statistics=dq)
            found.append(Peer("bitsandbytes", run, lambda q: bnb.dequantize_4bit(*q), dq))
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError as error:
        absent.append(f"torchao is not measured: {error}")
    else:
        found.append(Peer("torchao", to_nf4, lambda q: q.get_original_weight(), True))
    return found, absent


def definition(w: Tensor) -> Tensor:
    """NF4 without double quantization, by a search for every element: slow and plain."""
    table = codebook("nf4").table(w.device)
    blocks = w.float().view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks * (1 / absmax.clamp(min=1e-38)), (table[:-1] + table[1:]) / 2)
    return (table[codes] * absmax).to(w.dtype).view(w.shape)


def check(peer: Peer, w: Tensor, tolerance: float) -> float:
    """Mean |error| of a reconstruction, after it is found right.

    Raises:
        SystemExit: it is wrong, and would be timed for nothing.
    """
    quantized = peer.quantize(w)
    back = peer.expand(quantized)
    error = float((back.float() - w.float()).abs().mean())
    if back.shape != w.shape or back.dtype != w.dtype or abs(error / MEAN_ERROR - 1) > tolerance:
        raise SystemExit(f"{peer.name} is wrong on {tuple(w.shape)}: mean |error| {error:.5f}")
    if peer.name != "torchao" and not peer.double_quant and not torch.equal(back, definition(w)):
        raise SystemExit(f"{peer.name} differs from the definition on {tuple(w.shape)}")
    if peer.name == "bitsandbytes":
        ours = quantize_nf4(w, double_quant=peer.double_quant)
        if not torch.equal(ours.packed, quantized[0].view(-1)):
            raise SystemExit(f"bitsandbytes' codes differ from ours on {tuple(w.shape)}")
    return error


def measure(
    shape: tuple[int, int], device: torch.device, repeats: int, bandwidth: float, tolerance: float
) -> list[dict[str, Any]]:
    """Check, then time everyone on one shape."""
    weights = harness.rotation(lambda: torch.randn(shape, device=device).bfloat16())
    everyone, _ = peers()
    labelled = {f"{p.name}{' + double quant' if p.double_quant else ''}": p for p in everyone}
    errors = {label: check(p, weights[0], tolerance) for label, p in labelled.items()}
    rows = []
    for task in ("quantize", "expand"):
        runs: dict[str, Callable[[Any], Any]] = {}
        inputs: dict[str, Any] = {}
        for label, peer in labelled.items():
            runs[label] = peer.quantize if task == "quantize" else peer.expand
            inputs[label] = weights
            if task == "expand":  # as many copies of one result, wherever they lie in memory
                quantized = peer.quantize(weights[0])
                inputs[label] = [copy.deepcopy(quantized) for _ in weights]
        timings = harness.time_in_turns(runs, inputs, repeats)
        for label, timing in timings.items():
            bits = 4.127 if labelled[label].double_quant else 4.5
            moved = weights[0].numel() * (2 + bits / 8)
            peak = harness.peak_allocation(functools.partial(runs[label], inputs[label][0]))
            rows.append(
                {
                    "task": task,
                    "shape": list(shape),
                    "who": label,
                    "seconds": [timing.median, timing.low, timing.high],
                    "share_of_copy": moved / timing.median / bandwidth,
                    "peak_bytes": peak,
                    "mean_abs_error": errors[label],
                }
            )
            print(
                f"{task:<9}{shape[0]:>6} x {shape[1]:<6} {label:<28} {timing!s:<34}"
                f" {rows[-1]['share_of_copy']:6.1%} {peak / 1e6:9.1f} MB  {errors[label]:.5f}"
            )
    return rows


def main() -> None:
    """Run everything and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy shapes; nothing is recorded")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each [15]")
    parser.add_argument("--out", type=Path, help="file of JSON lines [results/<machine>.jsonl]")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    names = ("lora-core", "bitsandbytes", "torchao")
    facts = harness.machine() | {name: harness.version(name) for name in names}
    facts["backend"] = backend_for(torch.empty(0, device=device))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for line in peers()[1]:
        print(line)
    bandwidth = harness.copy_bandwidth(device)
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s (read + written): 100 % below")
    columns = f"{'median [20 %, 80 %]':<34} {'limit':>6} {'peak memory':>12}"
    print(f"{'':<53}{columns}  mean |error|")
    rows: list[dict[str, Any]] = []
    for shape in TOY if args.smoke else SHAPES:
        # the toy shapes are too few elements for the mean error to be sharp
        tolerance = 0.1 if args.smoke else 0.005
        rows += measure(shape, device, 2 if args.smoke else args.repeats, bandwidth, tolerance)
    if args.smoke:
        print("a smoke run: the figures mean nothing and are not recorded")
        return
    path = args.out or harness.results_file()
    stamp = {
        "benchmark": "quantization",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    harness.record(path, [stamp | facts | row for row in rows])
    print(f"appended {len(rows)} lines to {path}")


if __name__ == "__main__":
    main()
