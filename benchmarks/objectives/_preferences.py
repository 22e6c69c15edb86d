"""What the runs on preferences share: questions from a rule, a better and a worse answer to each.

A ship's log in a sentence, and a question about it. The better answer is short and says nothing but
the port; the worse one is long and unsure. The base writes neither, and finds the long one the more
probable by token. The figure is the same for all: of held-out questions, the share in which the
better answer is the more probable by token. Ships, ports and cargoes of held-out questions are
known; the sentences are not.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.objectives.recipe import Command, Measured
from lora_core.checkpoint import base_model_path
from lora_core.data import PairRows
from lora_core.data.branches import branch_batch
from lora_core.evaluate.estimate import paired_difference, proportion
from lora_core.objectives.scoring import completion_log_probs
from lora_core.runs import open_model

SHIPS = ("Aurora", "Boreas", "Calypso", "Doris", "Electra", "Fortuna", "Galatea", "Hesper")
PORTS = ("Bergen", "Cadiz", "Danzig", "Elba", "Genoa", "Hull", "Lisbon", "Malmo", "Narvik", "Oslo")
CARGO = ("salt", "timber", "wool", "copper", "grain", "herring", "tar", "linen")
PAIRS, RATED, HELD_OUT = "pairs.jsonl", "rated.jsonl", "held-out.jsonl"
FIGURE = "share of held-out pairs whose better answer is the more probable by token"


def pair(draw: random.Random) -> dict[str, Any]:
    """A question and its two answers."""
    ship, (start, end) = draw.choice(SHIPS), draw.sample(PORTS, 2)
    question = (
        f"The {ship} left {start} for {end} with {draw.randint(10, 300)} tons of "
        f"{draw.choice(CARGO)}. Where did she go?"
    )
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": f"To {end}.",
        "rejected": f"The {ship} left {start}, and as far as I know the {ship} went to {end}.",
    }


def rated(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One answer of each pair with its label, in turn the better and the worse one."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(pairs, ("chosen", "rejected") * len(pairs), strict=False)
    ]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, quick: bool, name: str, *more: str) -> list[Command]:
    """Write the data; train the objective on them."""
    draw = random.Random(0)
    rows = [pair(draw) for _ in range(32 if quick else 320)]
    write(folder / PAIRS, rows)
    write(folder / RATED, rated(rows))
    write(folder / HELD_OUT, [pair(draw) for _ in range(16 if quick else 128)])
    data = RATED if name == "kto" else PAIRS
    words = ["finetune", "--objective", name, "--model", str(base_model_path())]
    words += ["--data", str(folder / data), "--out", str(folder / "out"), "--eval-fraction", "0"]
    # the base is small: its adapters want a higher rate than the defaults, which are for large ones
    words += ["--batch-size", "4" if quick else "8", "--accumulate", "1", "--epochs", "1"]
    return [[*words, "--lr", "2e-3" if quick else "1e-3", "--progress", "false", *more]]


def ahead(adapter: Path | None, file: Path) -> list[float]:
    """Of each pair of a file, 1 where the better answer is the more probable by token, else 0."""
    opened = open_model(str(base_model_path()), None if adapter is None else str(adapter))
    rows = PairRows.from_jsonl(file, opened.tok)
    found: list[float] = []
    opened.model.eval()
    for start in range(0, len(rows), 16):
        with torch.no_grad():
            values, mask = completion_log_probs(
                opened.model, branch_batch([*rows[start : start + 16]])
            )
        means = values.sum(1) / mask.sum(1)  # (2B,)
        found += (means[::2] > means[1::2]).float().tolist()
    return found


def measure(folder: Path, quick: bool) -> Measured:
    """The figure of the base and of what was trained."""
    file = folder / HELD_OUT
    before, after = ahead(None, file), ahead(folder / "out", file)
    return Measured(
        FIGURE,
        proportion(sum(before), len(before), unit="pairs"),
        proportion(sum(after), len(after), unit="pairs"),
        paired_difference(after, before, unit="pairs"),
    )
