"""Direct preference optimization: the base prefers the worse answers; does that turn round?"""

from pathlib import Path

from benchmarks.objectives._preferences import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    return command(folder, quick, "dpo")


RECIPE = Recipe(
    name="dpo",
    says="pairs about a ship's log: short and sure is better than long and unsure",
    commands=_commands,
    measure=measure,
    at_least=0.9,
    quick_at_least=0.5,
)
