"""The quickstart: short in the quick suite, at full length with its promise in the full one."""

import json
from pathlib import Path

import pytest

from lora_core.cli.main import main
from lora_core.evaluate.function_task import parse_answer


def test_the_whole_path_on_the_shipped_model(
    tmp_path: Path, full_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quickstart"
    short = [] if full_run else ["--steps", "6", "--held-out", "8"]
    assert main(["quickstart", "--out", str(out), *short]) == 0
    facts = json.loads((out / "quickstart.json").read_text())
    assert facts["reload_bit_equal"] is True
    # merged in float32 on the dequantized weights: the rounding of five layers, no more
    assert facts["merge_largest_difference"] < 1e-4
    assert facts["after"]["perplexity"] < facts["before"]["perplexity"]
    assert facts["before"]["valid_json"] < 0.1
    if full_run:
        assert facts["after"]["valid_json"] >= 0.95
    for name in ("adapter/adapter_config.json", "adapter/loss.png", "merged/model.safetensors"):
        assert (out / name).stat().st_size > 0
    train = {json.loads(row)["messages"][0]["content"] for row in lines(out / "data/train.jsonl")}
    held = {json.loads(row)["messages"][0]["content"] for row in lines(out / "data/held-out.jsonl")}
    assert not train & held
    capsys.readouterr()
    assert main(["quickstart", "--out", str(out)]) == 1
    assert "--force replaces it" in capsys.readouterr().err


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"module": "os", "name": "walk", "summary": "Walk."}', True),
        ('{"module": "os", "name": "walk"}', False),
        ('{"module": "os", "name": "walk", "summary": "Walk."} and more', False),
        ('["module", "name", "summary"]', False),
        ('{"module": "os", "name": "walk", "summary": "a\nb"}', False),
        ("", False),
    ],
)
def test_what_counts_as_valid(text: str, good: bool) -> None:
    assert (parse_answer(text) is not None) is good
