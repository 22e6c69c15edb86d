"""The savings one after another, from the plain loop to the full set.

    python -m benchmarks.training --ladder

Rows of 64 to 512 tokens, eight a step. Each rung is a process of its own and has all of the rungs
above it; the first is the other stack, the second this library with its savings undone (plain.py).
Tokens a second count real tokens, not padding.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.training.plain import SAVINGS
from benchmarks.training.problem import Settings

Run = Callable[[str, Path, Path, Settings], dict[str, Any]]


def rungs(shape: str) -> list[tuple[str, str, Settings]]:
    """Name, stack and settings of each rung."""
    now = Settings(
        shape=shape,
        method="lora",
        batch=8,
        sequence=512,
        mixed=True,
        steps=4,
        untimed=1,
        without=tuple(SAVINGS),
    )
    found = [("transformers + PEFT", "theirs", now), ("plain loop", "ours", now)]

    def add(name: str, **changes: Any) -> None:
        nonlocal now
        now = replace(now, **changes)
        found.append((name, "ours", now))

    for saving in SAVINGS:
        add(f"+ {saving}", without=tuple(s for s in now.without if s != saving))
    add("+ packing (rows of 2048)", packing=2048)
    add("+ activation checkpointing", checkpointing=True)
    add("+ 8-bit AdamW", optimizer="adamw8bit")
    add("+ 4-bit base (QLoRA)", method="qlora")
    add("+ torch.compile", compile=True)
    return found


def climb(run: Run, folder: Path, adapter: Path, shape: str) -> list[dict[str, Any]]:
    """Measure each rung and print it; lines for the results."""
    rows = []
    print(f"{'':32} {'tokens/s':>9} {'peak GB':>8} {'above the loaded model':>23}")
    for name, stack, settings in rungs(shape):
        result = run(stack, folder, adapter, settings)
        speed = sum(result["tokens"]) / sum(result["seconds"])
        fastest = max(t / s for t, s in zip(result["tokens"], result["seconds"], strict=True))
        peak, above = result["peak"], result["peak"] - result["loaded"]
        print(f"{name:32} {speed:9.1f} {peak / 1e9:8.2f} {above / 1e9:23.2f}", flush=True)
        rows.append(
            {
                "benchmark": "training-ladder",
                "rung": name,
                "shape": shape,
                "tokens_per_second": speed,
                "fastest": fastest,
                "seconds": statistics.median(result["seconds"]),
                "peak": peak,
                "loaded": result["loaded"],
            }
        )
    return rows
