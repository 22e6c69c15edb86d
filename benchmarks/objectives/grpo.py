"""grpo"""

from pathlib import Path

from benchmarks.objectives._answers import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    steps, batch, prompts = ("6", "40", "5") if quick else ("40", "64", "8")
    sizes = ["--steps", steps, "--batch-size", batch, "--rollout-prompts", prompts]
    sizes += ["--lr", "1e-2" if quick else "5e-3"]
    return command(folder, quick, "grpo", *sizes, "--group-size", "8")


RECIPE = Recipe(
    name="grpo",
    says="a returned expression is to use the function's arguments; eight answers are compared",
    commands=_commands,
    measure=measure,
    at_least=0.4,
    quick_at_least=0.1,
)
