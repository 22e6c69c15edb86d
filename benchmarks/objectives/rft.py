"""rft"""

from pathlib import Path

from benchmarks.objectives._answers import PROMPTS, command, measure
from benchmarks.objectives.recipe import Command, Recipe

QUICK_PROMPTS = 100


def _commands(folder: Path, quick: bool) -> list[Command]:
    # accepted is what uses one of the two arguments; the base earns a tenth, so prompts are
    # answered often
    each, epochs = ("4", "4") if quick else ("8", "4")
    sizes = ["--group-size", each, "--epochs", epochs, "--batch-size", "16"]
    commands = command(folder, quick, "rft", *sizes, "--reward-threshold", "0.5", "--keep-cut")
    if quick:
        lines = (folder / PROMPTS).read_text().splitlines(keepends=True)
        (folder / PROMPTS).write_text("".join(lines[:QUICK_PROMPTS]))
    return commands


RECIPE = Recipe(
    name="rft",
    says="a returned expression is to use the function's arguments; good answers are learned",
    commands=_commands,
    measure=measure,
    at_least=0.15,
    quick_at_least=0.05,
)
