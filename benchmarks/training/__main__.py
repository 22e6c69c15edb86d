"""Train the same weights on the same data here and by transformers + PEFT + bitsandbytes.

    python -m benchmarks.training                     # 1B width, 4 layers: 128, 512, 2048 tokens
    python -m benchmarks.training --tokens 512 --methods qlora --repeats 5
    python -m benchmarks.training --ladder            # the savings one after another
    python -m benchmarks.training --gpu               # Llama-3-8B's shape, 2 x 2048, on a GPU
    python -m benchmarks.training --smoke             # a tiny model: does it run

Each run is a process of its own (worker.py), the two stacks take turns, and a figure is the median
over all timed steps of all runs. First both train 20 steps on one batch from the same adapter, and
nothing is timed unless their losses agree: at every step within 1 % of the first loss (bfloat16
rounds differently in each) while the loss falls by at least a tenth.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, record, results_file, version
from benchmarks.training.ladder import climb
from benchmarks.training.problem import Settings, adapter_folder, write_model

AGREE = 0.01  # share of the first loss by which the two stacks may differ at any step
FALL = 0.1  # share of the first loss that has to be learnt, or agreement would say nothing
ROW = 512  # longest row on a CPU: a step of more tokens has more rows


def run(stack: str, folder: Path, adapter: Path, settings: Settings) -> dict[str, Any]:
    """One worker's result."""
    command = [sys.executable, "-m", "benchmarks.training.worker", stack]
    command += [str(folder), str(adapter), settings.to_json()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{stack}, {settings.method}, {settings.tokens} tokens: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(folder: Path, adapter: Path, settings: Settings) -> float:
    """Compare the stacks' losses over 20 steps; return the largest relative difference."""
    settings = replace(settings, steps=20, untimed=0, repeat=True)
    ours, theirs = (run(s, folder, adapter, settings)["losses"] for s in ("ours", "theirs"))
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / theirs[0]
    fell = (theirs[0] - theirs[-1]) / theirs[0]
    print(
        f"{settings.method}: losses over 20 steps from {theirs[0]:.4f} to {theirs[-1]:.4f} "
        f"(ours {ours[-1]:.4f}), apart by at most {worst:.2%} of the first"
    )
    if worst > AGREE or fell < FALL:
        raise SystemExit(f"{settings.method}: the stacks do not train alike: not timed")
    return worst


def compare(
    folder: Path, adapter: Path, settings: Settings, repeats: int
) -> dict[str, dict[str, Any]]:
    """Both stacks in turns: every timed step's seconds, the highest peak."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for stack in ("ours", "theirs"):
            result = run(stack, folder, adapter, settings)
            kept = found.setdefault(stack, {"seconds": [], "peak": 0, "reserved": 0, "loaded": 0})
            kept["seconds"] += result["seconds"]
            for name in ("peak", "reserved", "loaded"):
                kept[name] = max(kept[name], result[name])
    return found


def line(settings: Settings, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One comparison as a line of the results."""
    row: dict[str, Any] = {"benchmark": "training", **asdict(settings), "tokens": settings.tokens}
    for stack, result in found.items():
        row[stack] = {
            "tokens_per_second": settings.tokens / statistics.median(result["seconds"]),
            **{name: result[name] for name in ("peak", "reserved", "loaded")},
        }
    row["speed"] = row["ours"]["tokens_per_second"] / row["theirs"]["tokens_per_second"]
    row["memory"] = row["ours"]["peak"] / row["theirs"]["peak"]
    return row


def show(row: dict[str, Any]) -> None:
    """Print a comparison with all that it was made with."""
    ours, theirs = row["ours"], row["theirs"]
    reserved = (
        f" (reserved {ours['reserved'] / 1e9:.2f} / {theirs['reserved'] / 1e9:.2f})"
        if ours["reserved"]
        else ""
    )
    print(
        f"{row['method']:6} {row['tokens']:5} tokens: "
        f"{ours['tokens_per_second']:8.1f} / {theirs['tokens_per_second']:8.1f} tokens/s = "
        f"{row['speed']:.2f}x; peak {ours['peak'] / 1e9:.2f} / {theirs['peak'] / 1e9:.2f} GB"
        f"{reserved} = {row['memory']:.2f}x"
    )
    print(
        f"       batch {row['batch']} x {row['sequence']}, unpacked, {row['graded']:.0%} graded, "
        f"r {row['r']}, {row['targets']}, {row['optimizer']}, checkpointing "
        f"{'on' if row['checkpointing'] else 'off'}, compile {'on' if row['compile'] else 'off'}",
        flush=True,
    )


def cases(args: argparse.Namespace) -> list[Settings]:
    """The runs that were asked for."""
    methods: Sequence[str] = args.methods
    common: dict[str, Any] = {
        "r": args.r,
        "optimizer": args.optimizer,
        "checkpointing": args.checkpointing,
        "compile": args.compile,
        "graded": args.graded,
        "steps": args.steps,
    }
    if args.gpu:
        common |= {"shape": "8b", "device": "cuda", "batch": 2, "sequence": 2048}
        return [Settings(method=m, **common) for m in methods]
    common["shape"] = "smoke" if args.smoke else "1b-width"
    return [
        Settings(method=m, batch=-(-tokens // ROW), sequence=min(tokens, ROW), **common)
        for m in methods
        for tokens in args.tokens
    ]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=("lora", "qlora"), default=["lora", "qlora"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=2, help="processes of each stack")
    parser.add_argument("--steps", type=int, default=6, help="steps of each, the first 2 not timed")
    parser.add_argument("--graded", type=float, default=0.5, help="share of tokens graded")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw")
    parser.add_argument("--checkpointing", action="store_true", help="in both stacks")
    parser.add_argument("--compile", action="store_true", help="ours only")
    parser.add_argument("--ladder", action="store_true", help="the savings one after another")
    parser.add_argument("--gpu", action="store_true", help="Llama-3-8B's shape on a GPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, nothing recorded")
    parser.add_argument("--folder", type=Path, help="keep the models here between runs")
    return parser.parse_args()


def main() -> None:
    """Write the model, check, time, print, record."""
    args = arguments()
    runs = cases(args)
    facts = machine() | {p: version(p) for p in ("transformers", "peft", "bitsandbytes")}
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / runs[0].shape
        write_model(runs[0].shape, folder, runs[0].device)
        adapter = adapter_folder(runs[0], folder)
        agreed = {
            m: check(folder, adapter, next(s for s in runs if s.method == m))
            for m in dict.fromkeys(s.method for s in runs[: 1 if args.ladder else None])
        }
        rows = []
        if args.ladder:
            rows = [facts | row for row in climb(run, folder, adapter, runs[0].shape)]
            runs = []
        for settings in runs:
            found = compare(folder, adapter, settings, 1 if args.smoke else args.repeats)
            rows.append(facts | line(settings, found) | {"apart": agreed[settings.method]})
            show(rows[-1])
    if not args.smoke:
        record(results_file(), rows)
        print(f"recorded in {results_file().relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
