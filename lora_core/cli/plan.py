"""`lora-core plan`: what a run will need in memory, before it, from config.json alone."""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from lora_core.adapters import LoRAConfig
from lora_core.cli.flags import add_dataclass_flags, given
from lora_core.plan import Fit, Plan, known_models, model_named, plan, what_fits
from lora_core.plan.empty import METHODS
from lora_core.plan.memory import DEVICES
from lora_core.train.config import TrainConfig

HELP = "memory before a run: each part and the peak, by method, and what fits a budget"
EXAMPLE = "lora-core plan --model 8B --batch-size 2 --max-length 2048 --budget 24GB"

_READ = {
    "batch_size",
    "accumulate",
    "dtype",
    "optimizer",
    "lora_plus",
    "activation_checkpointing",
    "offload_activations",
}
_ADAPTER = {"r", "alpha", "dropout", "targets", "exclude", "lora_bias", "untie"}
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    names = ", ".join(known_models())
    parser.add_argument(
        "--model", metavar="MODEL", required=True, help=f"folder, config.json, or one of {names}"
    )
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all", help="[all]")
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="tokens of a row [2048]"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cuda", help="where it will run [cuda]"
    )
    parser.add_argument(
        "--weights",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of weights that are not 4-bit [float32 if trained or on a CPU, else bfloat16]",
    )
    parser.add_argument(
        "--quantize", choices=["nf4", "fp4", "int4"], default="nf4", help="4-bit code [nf4]"
    )
    parser.add_argument("--budget", metavar="24GB", help="also list what fits this memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    unread = {f.name for f in dataclasses.fields(TrainConfig)} - _READ
    add_dataclass_flags(parser, TrainConfig, skip=unread, title="training")
    unread = {f.name for f in dataclasses.fields(LoRAConfig)} - _ADAPTER
    add_dataclass_flags(parser, LoRAConfig, skip=unread, title="LoRA (lora, qlora)")


def read_bytes(text: str) -> int:
    """`24GB`, `22.5 GiB` or a number of bytes.

    Raises:
        ValueError: neither.
    """
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    unit = match[2].upper() if match else "?"
    try:
        size = float(match[1]) * _UNITS[unit] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if size <= 0:
        raise ValueError(f"--budget must be a size such as 24GB or 22.5GiB; got {text!r}")
    return int(size)


def run(args: argparse.Namespace) -> int:
    """Plan every method asked for, and print them."""
    config = model_named(args.model)
    adapter = LoRAConfig(**{k: _list(v) for k, v in given(args, LoRAConfig).items()})
    train = TrainConfig(**given(args, TrainConfig))
    budget = None if args.budget is None else read_bytes(args.budget)
    methods = METHODS if args.method == "all" else (args.method,)
    options: dict[str, Any] = {"tokens": args.max_length, "device": args.device}
    options |= {"code": args.quantize}
    plans = []
    for method in methods:
        # trained weights stay float32 whatever the frozen ones are
        weights = None if args.weights is None or method == "full" else _dtype(args.weights)
        plans.append(plan(config, method, adapter, train, weights=weights, **options))
    fits = [] if budget is None else what_fits([p.settings for p in plans], budget)
    if args.json:
        found = [{**dataclasses.asdict(f), "batch": f.tokens // args.max_length} for f in fits]
        told = {"model": args.model, "plans": [p.to_dict() for p in plans]}
        print(json.dumps(told | ({} if budget is None else {"budget": budget, "fits": found})))
        return 0
    for line in report(args.model, plans):
        print(line)
    if budget is not None:
        for line in report_fits(fits, budget, args.max_length):
            print(line)
    return 0


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _list(value: Any) -> Any:
    """`q_proj,v_proj` to a list; "all-linear" and regular expressions stay strings."""
    if isinstance(value, str) and "," in value and not set(value) & set("()[]|*+?^$\\"):
        return [part.strip() for part in value.split(",")]
    return value


def report(name: str, plans: Sequence[Plan]) -> list[str]:
    """The plans as a table."""
    first, s = plans[0], plans[0].settings
    on = [s.train.optimizer] + ["activation checkpointing"] * s.train.activation_checkpointing
    head = f"{name}: {first.parameters:,} parameters; {s.train.batch_size} × {s.tokens} tokens, "
    head += f"{', '.join(on)}, products in {str(s.compute).removeprefix('torch.')}, on {s.device}"
    lines = [head, "GB are 10^9 bytes", ""]
    parts = list(first.parts)
    table = [["method", "trainable", *parts, "peak", "during"]]
    for p in plans:
        sizes = [_gb(p.parts[part]) for part in parts]
        table.append([p.settings.method, _count(p.trainable), *sizes, _gb(p.peak), p.at])
    lines += _aligned(table)
    lines.append("")
    for p in plans:
        note = f"{p.settings.method}: peak {p.peak / 1e9:.2f} GB = {p.peak / 2**30:.2f} GiB"
        if p.host:
            note += f", and {_gb(p.host)} GB of the host's memory"
        lines.append(note)
    if first.outside:
        lines.append(
            f"beside it the CUDA context takes about {_gb(first.outside)} GB, and the allocator "
            "keeps some memory that is free"
        )
    return lines


def report_fits(fits: Sequence[Fit], budget: int, tokens: int) -> list[str]:
    """What fits, as a table, and the cheapest way that takes a row of full length."""
    table = [["method", "switches", "tokens that fit", f"rows of {tokens}"]]
    for fit in fits:
        few = "none" if fit.tokens == 0 else f"{fit.tokens:,}"
        rows = f"needs {_gb(fit.least)} GB" if fit.tokens == 0 else str(fit.tokens // tokens)
        table.append([fit.method, fit.words, few, rows])
    lines = ["", f"within {budget / 1e9:.1f} GB ({budget / 2**30:.1f} GiB):", "", *_aligned(table)]
    enough = [fit for fit in fits if fit.tokens >= tokens]
    for method in dict.fromkeys(fit.method for fit in fits):
        first = next((fit for fit in enough if fit.method == method), None)
        if first is not None:
            batch = first.tokens // tokens
            lines.append(f"{method}: batch {batch} × {tokens} with {first.words}")
        else:
            lines.append(f"{method}: not one row of {tokens}")
    return lines


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size < 1e9 else f"{size / 1e9:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, columns padded; the first two and the last to the left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(_pad(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _pad(cell: str, width: int) -> str:
    return cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
