"""Kahneman-Tversky optimization: the same answers rated one by one, none in a pair."""

from pathlib import Path

from benchmarks.objectives._preferences import command, measure
from benchmarks.objectives.recipe import Command, Recipe


def _commands(folder: Path, quick: bool) -> list[Command]:
    return command(folder, quick, "kto")


RECIPE = Recipe(
    name="kto",
    says="rated answers about a ship's log: short and sure is better than long and unsure",
    commands=_commands,
    measure=measure,
    at_least=0.8,
    quick_at_least=0.5,
)
