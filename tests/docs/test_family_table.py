"""The table of docs/models.md has the rows and columns of the tests, and ticks come from runs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def families(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("families")


def test_the_table_is_of_the_cases(families: ModuleType) -> None:
    """Every cell of a thing that the family has is green in what was committed."""
    tests = families.known()
    text = (ROOT / "docs" / "models.md").read_text()
    inside = text.split(families.MARK[0])[1].split(families.MARK[1])[0].strip().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in inside if line[:1] == "|"]
    header, _, *rows = cells
    assert header == ["family", *(families.HEADS.get(c, c) for c in tests.COLUMNS)]
    behind = "docs/models.md is behind the tests: python -m benchmarks.families --write"
    assert [row[0] for row in rows] == [case.title for case in tests.CASES.values()], behind
    for row, case in zip(rows, tests.CASES.values(), strict=True):
        signs = [families.GREEN if c in case.columns else families.NONE for c in tests.COLUMNS]
        assert row[1:] == signs, f"{case.title}: {behind}"


def item_of(row: str, column: str, test: str) -> Any:
    return SimpleNamespace(
        nodeid=test,
        path=Path("test_some.py"),
        callspec=SimpleNamespace(params={"family": row}),
        iter_markers=lambda name: [SimpleNamespace(args=(column,))],
    )


def report(outcomes: Any, item: Any, **phases: str) -> None:
    for when, outcome in phases.items():
        hook = outcomes.pytest_runtest_makereport(item)
        next(hook)
        with pytest.raises(StopIteration):
            hook.send(SimpleNamespace(when=when, passed=outcome == "passed"))


@pytest.mark.parametrize(
    ("phases", "sign"),
    [
        ({"setup": "passed", "call": "passed", "teardown": "passed"}, "✓"),
        ({"setup": "passed", "call": "failed", "teardown": "passed"}, "✗"),
        ({"setup": "passed", "call": "skipped", "teardown": "passed"}, "✗"),
        ({"setup": "failed", "teardown": "passed"}, "✗"),
        ({"setup": "skipped", "teardown": "passed"}, "✗"),
        ({"setup": "passed", "call": "passed", "teardown": "failed"}, "✗"),
        ({}, "not tried"),
    ],
)
def test_only_what_passed_is_green(families: ModuleType, phases: dict[str, str], sign: str) -> None:
    outcomes = families.Outcomes(families.known().CASES)
    report(outcomes, item_of("llama2", "cache", "test_a"), **phases)
    assert outcomes.sign("llama2", "cache") == sign
    report(outcomes, item_of("llama3", "cache", "test_b"), setup="passed", call="passed")
    report(outcomes, item_of("llama2", "NF4", "test_b"), setup="passed", call="passed")
    assert outcomes.sign("llama2", "cache") == sign  # another cell's test changes nothing
    assert outcomes.sign("llama2", "window") == families.NONE
    if phases:
        report(outcomes, item_of("llama2", "cache", "test_c"), setup="passed", call="passed")
        assert outcomes.sign("llama2", "cache") == sign  # one that fails is enough


def test_each_template_must_be_tried(families: ModuleType) -> None:
    outcomes = families.Outcomes(families.known().CASES)
    first, second = families.known().CASES["llama3"].templates
    for template, sign in ((first, "not tried"), (second, "✓")):
        item = item_of("", "", f"test_x[{template}]")
        item.path = Path("test_templates.py")
        item.callspec.params = {"name": template}
        report(outcomes, item, setup="passed", call="passed", teardown="passed")
        assert outcomes.sign("llama3", "template") == sign
