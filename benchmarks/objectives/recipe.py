"""An objective's smallest run that shows it works: data, commands, and what has to rise.

A recipe makes its own data, from the standard library or from a rule, the same at every call. Its
commands are the ones a user would type. What it measures is measured on rows that nothing was
trained on, before and after, and the rise is the difference on the same rows, with its interval:
`at_least` is what every further run has to show: it was set well below what trial runs gave, and a
run whose rise is smaller has failed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.cli.main import main as lora_core
from lora_core.evaluate.estimate import Estimate

Command = list[str]


@dataclass(frozen=True)
class Measured:
    """A figure on held-out rows, before and after."""

    figure: str
    """what it is, with its unit: "mean reward of sampled answers" """
    before: Estimate
    """of the base, or of the adapter that was gone on with"""
    after: Estimate
    """of what was trained"""
    rise: Estimate
    """after - before on the same rows: `paired_difference`, or a figure whose start is 0"""


@dataclass(frozen=True)
class Recipe:
    """One objective's run; a module of this package with a `RECIPE` is one."""

    name: str
    """on the command line, and of the file"""
    says: str
    """the task in a line: what the data are and what is rewarded"""
    commands: Callable[[Path, bool], list[Command]]
    """(folder, quick) -> arguments of `lora-core`, in order; writes the data into the folder, which
    exists. Quick is the test suite's size, a few seconds."""
    measure: Callable[[Path, bool], Measured]
    """(folder, quick) -> the figures, once the commands have run"""
    at_least: float
    """the rise that the run has to show, in the figure's unit"""
    quick_at_least: float
    """the same of the quick run"""

    def run(self, folder: Path, quick: bool = False) -> "Ran":
        """Run the commands and measure.

        Args:
            folder: for data and results; new or empty.
            quick: at the test suite's size.

        Raises:
            RuntimeError: a command failed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        commands = self.commands(folder, quick)
        began = time.perf_counter()
        for command in commands:
            if code := lora_core(command):
                raise RuntimeError(f"lora-core {' '.join(command)}: exit code {code}")
        seconds = time.perf_counter() - began
        return Ran(self, commands, self.measure(folder, quick), seconds, quick)


@dataclass(frozen=True)
class Ran:
    """A recipe's run."""

    recipe: Recipe
    commands: list[Command]
    measured: Measured
    seconds: float
    """of the commands"""
    quick: bool

    @property
    def wanted(self) -> float:
        """The rise that it has to show."""
        return self.recipe.quick_at_least if self.quick else self.recipe.at_least

    @property
    def shown(self) -> bool:
        """Whether it rose by that much."""
        return self.measured.rise.value >= self.wanted

    def facts(self) -> dict[str, Any]:
        """What the results file keeps."""
        measured = self.measured
        return {
            "name": self.recipe.name,
            "says": self.recipe.says,
            "figure": measured.figure,
            "before": measured.before.facts(),
            "after": measured.after.facts(),
            "rise": measured.rise.facts(),
            "at_least": self.wanted,
            "shown": self.shown,
            "seconds": round(self.seconds, 1),
        }
