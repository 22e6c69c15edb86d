"""`lora-core finetune` with packed rows, with batches by length, and with a probe."""

import json
from pathlib import Path

import pytest

from lora_core import base_model_path
from lora_core.cli.main import main


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short questions, with answers of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    turns = (
        [
            {"role": "user", "content": f"What does os.f{i} do?"},
            {"role": "assistant", "content": f"It returns {i}. " * (1 + i % 7)},
        ]
        for i in range(40)
    )
    path.write_text("".join(json.dumps({"messages": both}) + "\n" for both in turns))
    return path


def finetune(data: Path, out: Path, *more: str) -> int:
    words = ["finetune", "--model", str(base_model_path()), "--data", str(data), "--out", str(out)]
    quick = ["--steps", "6", "--batch-size", "2", "--accumulate", "1", "--progress", "false"]
    return main([*words, *quick, "--device", "cpu", "--max-length", "128", *more])


def records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_packed_rows_train(
    chats: Path, tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    setting = ["--packing", "256", "--probe", "true", "--lr", "1e-2", "--warmup", "0"]
    assert finetune(chats, out, "--method", method, *setting) == 0
    said = capfd.readouterr().err
    assert "packing: 38 samples in " in said
    assert " rows of at most 256 tokens; padding is " in said
    run = records(out)
    assert run[-1]["loss"] < run[0]["loss"]
    assert run[-1]["eval_loss"] > 0
    # several samples a row: more tokens in a step than two samples have
    assert run[0]["tokens"] > 2 * 128
    assert json.loads((out / "run.json").read_text())["train"]["packing"] == 256
    assert (out / "adapter_model.safetensors").stat().st_size > 0


def test_batches_by_length_train(
    chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert finetune(chats, tmp_path / "run", "--group-by-length") == 0
    assert "batches by length: padding is " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--packing", "40"], " rows have more than packing=40: set packing to "),
        (["--packing", "128", "--group-by-length"], "packing fills rows whole: leave group_by_len"),
        (["--packing", "128", "--method", "prompt"], "(packed rows) do not go with a prompt"),
        (["--packing", "1"], "packing must be a whole number, 2 or more; got 1"),
    ],
)
def test_what_is_refused_is_one_line(
    chats: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert finetune(chats, tmp_path / "run", *more) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in last


def test_help_tells_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for flag, text in [
        ("--packing N", "tokens of a row into which short samples are packed"),
        ("--group-by-length", "batches of samples of about the same length"),
        ("--probe", "run the longest batch once, without a step, before all others"),
    ]:
        assert flag in told
        assert text in told
