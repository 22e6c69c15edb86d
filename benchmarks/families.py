"""What is proved of each family of models, as a table made of the tests that prove it.

    python -m benchmarks.families           runs them and prints the table of docs/models.md
    python -m benchmarks.families --write   puts it there

The rows are those of tests/oracles/families/cases.py. A test that takes `family` and bears
the marker `column` fills its cell; the cell of the chat templates is filled by the tests of the
family's own in tests/oracles/test_templates.py. A cell is green if all its tests passed and there
was at least one; a family without such a thing (a sliding window) has a dash. Nothing else makes a
tick, and a run with a cell that is not green ends with exit code 1.
"""

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

__all__ = ["Outcomes", "known", "table"]

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "oracles"
PAGE = ROOT / "docs" / "models.md"
MARK = ("<!-- families: made by `python -m benchmarks.families` -->", "<!-- end of families -->")
HEADS = {"adapter": "adapter through PEFT"}
GREEN, RED, NONE, UNTRIED = "✓", "✗", "–", "not tried"


def known() -> ModuleType:
    """The tests' own list: its `CASES` and `COLUMNS`."""
    spec = importlib.util.spec_from_file_location(
        "family_cases", TESTS / "families" / "conftest.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Outcomes:
    """A pytest plugin that keeps for each cell which of its tests passed.

    Args:
        cases: rows by name.
    """

    def __init__(self, cases: Mapping[str, Any]) -> None:
        self.cases = cases
        self.cells: dict[tuple[str, str], dict[str, bool]] = {}
        """(row, column) -> {test: whether it passed}"""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note what became of a test, its setup and its teardown."""
        report = yield
        passed = report.passed and not hasattr(report, "wasxfail")
        for cell in self.cells_of(item):
            tests = self.cells.setdefault(cell, {})
            tests[item.nodeid] = tests.get(item.nodeid, True) and passed
        return report

    def cells_of(self, item: pytest.Item) -> Iterator[tuple[str, str]]:
        """The cells that a test fills."""
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        row, template = parameters.get("family"), parameters.get("name")
        if row in self.cases:
            yield from ((row, mark.args[0]) for mark in item.iter_markers("column"))
        if item.path.name == "test_templates.py":
            for name, case in self.cases.items():
                if template in case.templates:
                    yield name, "template"

    def sign(self, row: str, column: str) -> str:
        """What stands in a cell."""
        if column not in self.cases[row].columns:
            return NONE
        tests = self.cells.get((row, column), {})
        if column == "template" and not self._templates_tried(row, tests):
            return UNTRIED
        return (GREEN if all(tests.values()) else RED) if tests else UNTRIED

    def _templates_tried(self, row: str, tests: Mapping[str, bool]) -> bool:
        """Whether each of a row's templates has a test."""
        return all(any(f"[{name}" in test for test in tests) for name in self.cases[row].templates)


def table(outcomes: Outcomes, columns: Sequence[str]) -> str:
    """The Markdown of docs/models.md.

    Args:
        outcomes: of a run.
        columns: those to show.
    """
    lines = ["| family | " + " | ".join(HEADS.get(c, c) for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row, case in outcomes.cases.items():
        signs = " | ".join(outcomes.sign(row, column) for column in columns)
        lines.append(f"| {case.title} | {signs} |")
    tests = {test for cell in outcomes.cells.values() for test in cell}
    peers = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    return "\n".join([MARK[0], *lines, "", f"{len(tests)} tests, with {peers}.", MARK[1]])


def main(argv: Sequence[str]) -> int:
    """Run the tests, then print the table or put it where it belongs."""
    os.environ["LORA_REQUIRE_ORACLES"] = "1"  # a test that was skipped proves nothing
    # the folder kernels/ would be taken for the package of that name, which transformers imports
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    tests = known()
    outcomes = Outcomes(tests.CASES)
    paths = [str(TESTS / "families"), str(TESTS / "test_templates.py")]
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    status = pytest.main([*options, *paths], plugins=[outcomes])
    made = table(outcomes, tests.COLUMNS)
    if "--write" in argv:
        text = PAGE.read_text()
        head, rest = text.split(MARK[0])
        PAGE.write_text(head + made + rest.split(MARK[1])[1])
    else:
        print(made)
    cells = {outcomes.sign(row, column) for row in tests.CASES for column in tests.COLUMNS}
    return int(status) or int(not cells <= {GREEN, NONE})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
