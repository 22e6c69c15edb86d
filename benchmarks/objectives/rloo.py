"""rloo"""

from pathlib import Path

from benchmarks.objectives._answers import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    steps, batch, prompts = ("6", "40", "10") if quick else ("40", "64", "16")
    sizes = ["--steps", steps, "--batch-size", batch, "--rollout-prompts", prompts]
    return command(folder, quick, "rloo", *sizes, "--group-size", "4")


RECIPE = Recipe(
    name="rloo",
    says="a returned expression is to use the function's arguments; four answers are compared",
    commands=_commands,
    measure=measure,
    at_least=0.4,
    quick_at_least=0.05,
)
