"""The comparison of tasks runs, makes the rows it says, and its page holds the newest result."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def tasks(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("tasks")


def test_the_quick_run_says_every_figure_and_stays_off_the_page(
    tasks: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(tasks, "FILE", tmp_path / "page.jsonl")
    assert tasks.main(["--quick", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "page.jsonl").exists()
    found = tasks.newest(tmp_path / "out" / "tasks.jsonl")
    assert found["command"] == "python -m benchmarks.tasks --quick"
    plans = found["plans"]
    assert list(plans) == ["joint", "joint-pcgrad", "sequential", "adapters"]
    assert {plan["steps"] for plan in plans.values()} == {3}
    assert plans["adapters"]["forgetting"]["value"] == 0
    assert len(plans["sequential"]["matrix"]) == 3
    assert "conflicts" in plans["joint-pcgrad"]["figures"]
    printed = capsys.readouterr().out
    for name in ("origin", "parts", "defaults", "forgetting", "Pairs of tasks with a negative"):
        assert name in printed
    # what is trained on is not scored
    for name in ("origin", "parts", "defaults"):
        data = tmp_path / "out" / "data"
        train, held = (data / f"{name}.{kind}.jsonl" for kind in ("train", "held-out"))
        rows = [json.loads(line) for line in train.read_text().splitlines()]
        assert len(rows) == 12
        assert not set(train.read_text().splitlines()) & set(held.read_text().splitlines())


def test_rows_of_the_tasks(tasks: ModuleType) -> None:
    kind = tasks.Function
    made = [
        kind(module, name, "(self, x=None, sep=', ')", f"Do {name}. More.")
        for module, name in [("a.b", "f"), ("a", "C.g"), ("z", "h")]
    ]
    assert next(iter(tasks.origin_rows(made))) == {
        "text": "f(self, x=None, sep=', ')\nDo f.",
        "label": "a",
    }
    first, second = list(tasks.default_rows(made[:1]))
    assert first["question"] == "The default of `x`?"
    for row, value in ((first, "None"), (second, "', '")):
        at = row["answers"]["answer_start"][0]
        assert row["context"][at : at + len(value)] == value == row["answers"]["text"][0]
    (row,) = tasks.part_rows(["def f(a): return a.b + 1", "x = 1", "if (", "'a b' + c"])
    assert dict(zip(row["tokens"], row["tags"], strict=True)) == {
        "def": "keyword",
        "f": "definition",
        "(": "operator",
        "a": "name",
        ")": "operator",
        ":": "operator",
        "return": "keyword",
        ".": "operator",
        "b": "attribute",
        "+": "operator",
        "1": "number",
    }
    assert len(tasks.different(iter([row, row]), 0)) == 1


def test_the_page_holds_the_newest_result(tasks: ModuleType) -> None:
    text = tasks.PAGE.read_text(encoding="utf-8")
    inside = text.split(tasks.MARK[0])[1].split(tasks.MARK[1])[0].strip()
    behind = "docs/tasks.md is behind the results: python -m benchmarks.tasks --write"
    assert inside == tasks.generated(tasks.newest()), behind


def test_writing_the_page_changes_what_is_between_the_marks(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, file = tmp_path / "tasks.md", tmp_path / "none.jsonl"
    page.write_text(f"before {tasks.MARK[0]}\nold\n{tasks.MARK[1]} after")
    monkeypatch.setattr(tasks, "PAGE", page)
    monkeypatch.setattr(tasks, "newest", lambda: None)
    assert tasks.main(["--write"]) == 0
    wanted = f"before {tasks.MARK[0]}\nNo result yet: run the command.\n{tasks.MARK[1]} after"
    assert page.read_text() == wanted
    assert not file.exists()
