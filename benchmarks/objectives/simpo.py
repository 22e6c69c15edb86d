"""Simple preference optimization: no reference, means over tokens."""

from pathlib import Path

from benchmarks.objectives._preferences import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    return command(folder, quick, "simpo")


RECIPE = Recipe(
    name="simpo",
    says="pairs about a ship's log: short and sure is better than long and unsure",
    commands=_commands,
    measure=measure,
    at_least=0.9,
    quick_at_least=0.5,
)
