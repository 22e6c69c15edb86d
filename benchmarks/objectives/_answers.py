"""What the runs on rewards share: functions to finish, and a reward that Python itself can check.

The prompt is a function's first line and a `return`; the answer's first line is parsed, and the
reward is the share of the function's arguments that the expression uses, 0 where it does not parse.
The base writes Python, but names of its own: it earns about a twentieth. Nobody writes an answer
down, so that what rises was found by sampling. The figure is the mean reward of one sampled answer
to each held-out function; their argument names are known, the pairs of them with a name are not.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.objectives.recipe import Command, Measured
from lora_core.checkpoint import base_model_path
from lora_core.evaluate.estimate import mean, paired_difference
from lora_core.models import generate_batch
from lora_core.objectives.rewards import Rewards, Sample
from lora_core.runs import open_model

ARGUMENTS = (
    *("width", "height", "depth", "count", "total", "first", "second", "rate", "size", "value"),
    *("weight", "length", "price", "score", "index", "left", "right", "start", "stop", "step"),
)
FUNCTIONS = (
    "area",
    "mix",
    "combine",
    "scale",
    "measure",
    "check",
    "limit",
    "merge",
    "cost",
    "mean",
)
PROMPTS, HELD_OUT, REWARD = "prompts.jsonl", "held-out.jsonl", "reward.py"
TOKENS = 6
REWARD_TEXT = '''"""The reward of an answer, as a user would write it."""

import ast


def uses_arguments(completion, arguments):
    """The share of the arguments that the returned expression uses; 0 if it is no expression."""
    try:
        tree = ast.parse(completion.split("\\n")[0].strip(), mode="eval")
    except (SyntaxError, ValueError):
        return 0.0
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return len(used & set(arguments)) / len(arguments)
'''


def functions(count: int) -> list[dict[str, Any]]:
    """Different functions of two arguments, each up to its `return`."""
    draw, made = random.Random(0), {}
    while len(made) < count:
        arguments = draw.sample(ARGUMENTS, 2)
        prompt = f"def {draw.choice(FUNCTIONS)}({', '.join(arguments)}):\n    return"
        made[prompt] = {"prompt": prompt, "arguments": arguments}
    return list(made.values())


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_prompts(folder: Path, quick: bool) -> None:
    """Prompts to learn on, prompts to measure on, and the reward."""
    held_out = 64 if quick else 200
    rows = functions(held_out + 600)
    write_rows(folder / HELD_OUT, rows[:held_out])
    write_rows(folder / PROMPTS, rows[held_out:])
    (folder / REWARD).write_text(REWARD_TEXT)


def command(folder: Path, quick: bool, name: str, *more: str) -> list[Command]:
    """Write the prompts; train the objective on them."""
    write_prompts(folder, quick)
    words = ["finetune", "--objective", name, "--model", str(base_model_path())]
    words += ["--data", str(folder / PROMPTS), "--reward", f"{folder / REWARD}:uses_arguments"]
    words += ["--out", str(folder / "out"), "--max-new-tokens", str(TOKENS), "--lr", "1e-2"]
    return [[*words, "--accumulate", "1", "--warmup", "0", "--progress", "false", *more]]


def rewards_of(adapter: Path | None, folder: Path) -> list[float]:
    """The reward of one answer to each held-out prompt, sampled with the prompt's own seed."""
    opened = open_model(str(base_model_path()), None if adapter is None else str(adapter))
    rows = [json.loads(line) for line in (folder / HELD_OUT).read_text().splitlines()]
    prompts, seeds = [row["prompt"] for row in rows], list(range(len(rows)))
    answers = generate_batch(opened.model, opened.tok, prompts, TOKENS, 1.0, seed=seeds)
    samples = [
        Sample(HELD_OUT, row["prompt"], answer, {"arguments": row["arguments"]})
        for row, answer in zip(rows, answers, strict=True)
    ]
    scored = Rewards.open([f"{folder / REWARD}:uses_arguments"])(samples)
    return [0.0 if one.value is None else one.value for one in scored]


def measure(folder: Path, quick: bool) -> Measured:
    """The mean reward of the base and of what was trained."""
    before, after = rewards_of(None, folder), rewards_of(folder / "out", folder)
    return Measured(
        "mean reward of a sampled answer to held-out functions: the share of arguments used",
        mean(before),
        mean(after),
        paired_difference(after, before),
    )
