"""A finetune folder as parts of a report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lora_core.report import Page, run_report
from lora_core.report.run import base_weights, read_history, run_facts, updates

Make = Callable[..., Any]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matplotlib: drawing takes longer than everything else here."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)


@pytest.mark.usefixtures("undrawn")
def test_all_parts(run_dir: Path, adapted: nn.Module, parse: Make, outside: Make) -> None:
    page = Page("t")
    run_report(page, run_dir, adapted)
    parsed = parse(page.html())
    assert outside(parsed) == []
    assert "/models/<base>" in parsed.text
    assert "base quantizedno" in parsed.text
    assert "rank r, alpha16, 32" in parsed.text
    assert "dataa.jsonl, b.jsonl:0.5" in parsed.text
    assert "Training loss 3 at step 1, 1 at step 3, best evaluation 1.25." in parsed.text
    assert "the largest in" in parsed.text
    assert "5,120 weights of 4 layers, nf4 in blocks of 64" in parsed.text
    assert parsed.text.count("matplotlib is not installed (pip install 'lora-core[plots]')") == 3
    assert len(parsed.named("tr")) == 17  # of the counts by bin


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_said(tmp_path: Path, parse: Make) -> None:
    page = Page("t")
    run_report(page, tmp_path)
    said = parse(page.html()).text
    assert f"no run.json in {tmp_path.name}" in said
    assert f"no metrics.jsonl in {tmp_path.name}" in said
    updates(page, nn.Linear(4, 4))
    base_weights(page, nn.LayerNorm(4))
    said = parse(page.html()).text
    assert "There is no update to show: no adapter 'default' in the model" in said
    assert "There is no histogram: the model has no linear layer" in said
    with pytest.raises(FileNotFoundError, match=r"no folder .*: give the --out of"):
        run_report(page, tmp_path / "none")


def test_a_line_cut_off_by_a_crash_is_left_out(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    assert [record["step"] for record in read_history(run_dir)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"step": 1}', ""])
def test_a_bad_line_is_named(run_dir: Path, line: str) -> None:
    with open(run_dir / "metrics.jsonl", "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: a record needs step and loss; got"):
        read_history(run_dir)


def test_a_bad_run_json_is_named(run_dir: Path) -> None:
    (run_dir / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: not valid JSON"):
        run_facts(run_dir)
    (run_dir / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run.json: must hold a JSON object; got list"):
        run_facts(run_dir)
    (run_dir / "run.json").write_text('{"train": 3}')
    assert run_facts(run_dir) == {}
