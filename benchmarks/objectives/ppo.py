"""ppo"""

from pathlib import Path

from benchmarks.objectives._answers import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    # no KL: a twentieth of the answers earn anything, and a nat against each is more than that
    steps, batch = ("8", "48") if quick else ("60", "64")
    sizes = ["--steps", steps, "--batch-size", batch, "--rollout-prompts", batch]
    return command(folder, quick, "ppo", *sizes, "--kl-coef", "0", "--lam", "1.0")


RECIPE = Recipe(
    name="ppo",
    says="a returned expression is to use the function's arguments; a value head says what to "
    "expect",
    commands=_commands,
    measure=measure,
    at_least=0.25,
    quick_at_least=0.05,
)
