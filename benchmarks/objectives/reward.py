"""A reward model: does it score the better answer of a pair it has not seen above the worse one?

Untrained it scores everything alike, so that no better answer is ahead; a coin would have half.
"""

from pathlib import Path

from benchmarks.objectives._preferences import HELD_OUT, command
from benchmarks.objectives.recipe import Command, Measured, Recipe
from lora_core.data.lines import read_rows
from lora_core.evaluate.estimate import paired_difference, proportion
from lora_core.objectives.reward_model import RewardModel
from lora_core.objectives.rewards import Sample


def _commands(folder: Path, quick: bool) -> list[Command]:
    return command(folder, quick, "reward")


def _measure(folder: Path, quick: bool) -> Measured:
    rows = list(read_rows(folder / HELD_OUT))
    judge = RewardModel.open(folder / "out")
    better, worse = (
        judge.score([Sample(where, row["prompt"], row[side]) for where, row in rows])
        for side in ("chosen", "rejected")
    )
    ahead = [float(a > b) for a, b in zip(better, worse, strict=True)]
    before = [0.0] * len(ahead)
    return Measured(
        "share of held-out pairs whose better answer scores higher",
        proportion(0, len(ahead), unit="pairs"),
        proportion(sum(ahead), len(ahead), unit="pairs"),
        paired_difference(ahead, before, unit="pairs"),
    )


RECIPE = Recipe(
    name="reward",
    says="pairs about a ship's log: short and sure is better than long and unsure",
    commands=_commands,
    measure=_measure,
    at_least=0.9,
    quick_at_least=0.75,
)
