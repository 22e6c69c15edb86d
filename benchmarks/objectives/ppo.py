"""ppo"""

from pathlib import Path

from benchmarks.objectives._answers import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    # no KL: a twentieth of the answers earn anything, and a nat against each is more than that
    steps, batch = ("8", "48") if quick else ("40", "64")
    sizes = ["--steps", steps, "--batch-size", batch, "--rollout-prompts", batch]
    rate = "1e-2" if quick else "3e-3"  # a policy of many steps at the first collapses
    sizes += ["--lr", rate, "--kl-coef", "0", "--lam", "1.0"]
    return command(folder, quick, "ppo", *sizes)


RECIPE = Recipe(
    name="ppo",
    says="a returned expression is to use the function's arguments; a value head says what to "
    "expect",
    commands=_commands,
    measure=measure,
    at_least=0.4,
    quick_at_least=0.05,
)
