"""Preference runs from the command line: the first loss, every method, a run gone on with."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.cli.main import main

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Is {i} even or odd?"}],
        "chosen": "even" if i % 2 == 0 else "odd",
        "rejected": f"I am not sure about {i}.",
    }
    for i in range(12)
]
RATED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
LN2 = pytest.approx(math.log(2), rel=3e-7)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    for name, rows in (("pairs", PAIRS), ("rated", RATED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(llama_folder: Path, data: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run `finetune` into a folder of `tmp_path`; its metrics, a record a step."""

    def go(objective: str, out: str, *more: str, steps: int = 2) -> list[dict[str, Any]]:
        file = data / ("rated.jsonl" if objective == "kto" else "pairs.jsonl")
        words = ["finetune", "--objective", objective, "--model", str(llama_folder)]
        words += ["--data", str(file), "--out", str(tmp_path / out), "--steps", str(steps)]
        words += ["--progress", "false", "--batch-size", "4", "--accumulate", "1"]
        assert main([*words, *more]) == 0
        return records(tmp_path / out)

    return go


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_first_loss_of_dpo_is_ln_2_in_each_case(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = run("dpo", "fresh", "--lr", "1e-2")
    assert fresh[0]["loss"] == LN2
    assert fresh[0]["margin"] == 0
    assert fresh[1]["margin"] != 0
    assert "reference: the base, adapters disabled" in capsys.readouterr().err
    again = run("dpo", "again", "--adapter", str(tmp_path / "fresh"))
    assert again[0]["loss"] == LN2
    assert again[0]["margin"] == 0
    assert "reference: a frozen copy of the adapter" in capsys.readouterr().err
    whole = run("dpo", "whole", "--method", "full")
    assert whole[0]["loss"] == LN2
    assert abs(whole[0]["margin"]) < 1e-6
    assert "reference: log-probabilities recorded before the first step" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["qlora", "bottleneck", "prefix", "prompt"])
def test_every_method_runs(method: str, run: Callable[..., Any], tmp_path: Path) -> None:
    steps = run("dpo", "out", "--method", method)
    assert len(steps) == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    if method in ("qlora", "bottleneck"):
        assert steps[0]["loss"] == LN2


@pytest.mark.parametrize("objective", ["ipo", "simpo", "orpo", "kto"])
def test_every_objective_learns_its_rows(
    objective: str, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rate = ["--lr", "3e-3", "--eval-fraction", "0.2", "--eval-every", "10"]
    steps = run(objective, "out", *rate, steps=10)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["margin"] > steps[0]["margin"]
    last = steps[-1]
    assert math.isfinite(last["eval_loss"])
    assert f"accuracy {last['eval_accuracy']:.3f}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objective", "more"), [("dpo", []), ("kto", []), ("dpo", ["--method", "full"])]
)
def test_a_run_that_is_resumed_is_the_run_that_was_not(
    objective: str, more: list[str], run: Callable[..., Any], tmp_path: Path
) -> None:
    words = [*more, "--save-every", "1", "--keep", "9", "--eval-fraction", "0", "--lr", "1e-3"]
    straight = run(objective, "straight", *words, steps=3)
    shutil.copytree(tmp_path / "straight", tmp_path / "halted")
    for folder in (tmp_path / "halted" / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 1:
            shutil.rmtree(folder)
    halted = run(objective, "halted", *words, "--resume", steps=3)
    timed = {"seconds", "tokens_per_second", "peak_memory"}
    for one, other in zip(straight, halted, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    file = "model.safetensors" if more else "adapter_model.safetensors"
    weights = [(tmp_path / name / file).read_bytes() for name in ("straight", "halted")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective", "dpo", "--target-margin", "2"], "--target-margin is no option of dpo"),
        (["--objective", "dpo", "--dropout", "0.1"], "dropout is 0.1, and dpo compares"),
        (["--objective", "sft", "--beta", "1"], "--beta is no option of sft"),
        (["--objective", "sft"], "pairs.jsonl:1: chosen/rejected is data for preference training"),
        (["--objective", "kto"], "pairs.jsonl:1: completion is missing"),
        (["--objective", "dpo", "--max-length", "4"], "no pair is left to train on. Left out: 12"),
    ],
)
def test_what_is_refused_is_one_line(
    words: list[str],
    said: str,
    llama_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["finetune", "--model", str(llama_folder), "--data", str(data / "pairs.jsonl")]
    assert main([*given, "--out", str(tmp_path / "out"), *words]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]


def test_data_of_one_prompt_is_not_split(
    run: Callable[..., Any],
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(
        "".join(json.dumps({**PAIRS[0], "chosen": f"answer {i}"}) + "\n" for i in range(4))
    )
    words = ["finetune", "--objective", "dpo", "--model", str(llama_folder), "--data", str(file)]
    assert (
        main([*words, "--out", str(tmp_path / "out"), "--steps", "1", "--progress", "false"]) == 0
    )
    assert "no rows are set aside (all rows have one prompt)" in capsys.readouterr().err
