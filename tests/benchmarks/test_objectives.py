"""Each objective end to end at a reduced size: what it trains rises by what was stated."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_core.evaluate.estimate import Estimate
from lora_core.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    path.stem
    for path in (ROOT / "benchmarks" / "objectives").glob("*.py")
    if not path.stem.startswith("_") and path.stem != "recipe"
)


@pytest.fixture(scope="module")
def root_on_path() -> Iterator[None]:
    """Lets `benchmarks` be imported as its commands import it."""
    sys.path.insert(0, str(ROOT))
    yield
    sys.path.remove(str(ROOT))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("root_on_path")
def test_the_objective_trains_what_it_says(name: str, tmp_path: Path, full_run: bool) -> None:
    if name == "cpt_replay" and not full_run:
        pytest.skip("a second run of cpt, ten seconds: in the full run")
    recipe = importlib.import_module(f"benchmarks.objectives.{name}").RECIPE
    assert recipe.name == name
    ran = recipe.run(tmp_path / "run", quick=True)
    assert ran.shown, f"{ran.measured.rise} where {ran.wanted} was stated"


def test_every_objective_has_a_recipe() -> None:
    # supervised training is the quickstart's; heads have their own figures, benchmarks/tasks.py
    assert set(OBJECTIVES) - set(NAMES) <= {"sft", "heads"}


@pytest.fixture
def command(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("objectives.__main__")


def fake(command: ModuleType, rise: float, fails: bool = False) -> Any:
    """A recipe that runs nothing."""
    kinds = sys.modules[command.Recipe.__module__]

    def commands(folder: Path, quick: bool) -> list[list[str]]:
        return [["no-such-verb"]] if fails else [["info", "--json"]]

    def measure(folder: Path, quick: bool) -> Any:
        figures = [Estimate(v, 4, v - 0.1, v + 0.1) for v in (0.0, rise, rise)]
        return kinds.Measured("reward", *figures)

    return command.Recipe("dpo", "a task", commands, measure, 0.5, 0.1)


@pytest.mark.parametrize(
    ("rise", "quick", "code"), [(0.6, False, 0), (0.3, False, 1), (0.3, True, 0)]
)
def test_a_rise_smaller_than_stated_is_a_failure(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rise: float,
    quick: bool,
    code: int,
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.MARK[0]}\nold\n{command.MARK[1]}\nafter\n")
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "FILE", tmp_path / "objectives.jsonl")
    monkeypatch.setattr(command, "recipes", lambda: {"dpo": fake(command, rise)})
    flags = ["--quick"] if quick else []
    assert command.main(["dpo", "--out", str(tmp_path / "out"), "--write", *flags]) == code
    assert (tmp_path / "objectives.jsonl").exists() is not quick
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert ("**not reached**" in text) is (code == 1)


def test_a_command_that_fails_is_named(
    command: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = fake(command, 1.0, fails=True)
    monkeypatch.setattr(command, "recipes", lambda: {"dpo": broken})
    monkeypatch.setattr(command, "FILE", tmp_path / "objectives.jsonl")
    assert _code(lambda: command.main(["--out", str(tmp_path)])) != 0
    assert not (tmp_path / "objectives.jsonl").exists()
    with pytest.raises(SystemExit):
        command.main(["nothing"])
    assert "no objective 'nothing'; there are dpo" in capsys.readouterr().err


def _code(call: Callable[[], int]) -> int:
    try:
        return call()
    except SystemExit as stop:
        return int(str(stop.code))


def test_the_page_says_what_was_found(command: ModuleType) -> None:
    results = command.read_results(command.FILE)
    assert set(results) == set(NAMES)
    assert all(row["shown"] and row["seconds"] < 120 for row in results.values())
    assert command.generated(results) in command.PAGE.read_text()
