"""`finetune --adapter`: training goes on with an adapter that is there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_core.cli.main import main


@pytest.fixture(scope="module")
def first(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data file, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("first")
    rows = [
        {"prompt": f"{i} and {i} are", "completion": f" {2 * i}, and that is {i} times two."}
        for i in range(8)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(llama_folder, data, folder / "out") == 0
    return data, folder / "out"


def run(model: Path, data: Path, out: Path, *more: str) -> int:
    words = ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), "--lr"]
    quick = ["1e-2", "--steps", "2", "--batch-size", "4", "--accumulate", "1", "--eval-fraction"]
    return main([*words, *quick, "0", "--warmup", "0", "--progress", "false", *more])


def test_training_goes_on_where_the_adapter_is(
    llama_folder: Path, first: tuple[Path, Path], tmp_path: Path
) -> None:
    data, before = first
    out = tmp_path / "out"
    assert run(llama_folder, data, out, "--adapter", str(before), "--lr", "1e-12") == 0
    old, new = (load_file(d / "adapter_model.safetensors") for d in (before, out))
    assert old.keys() == new.keys()
    for key in old:
        torch.testing.assert_close(new[key], old[key], rtol=0, atol=1e-10)
    assert any("lora_B" in key and bool(old[key].abs().max() > 1e-4) for key in old)
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (before, out)]
    assert configs[0] == configs[1]
    assert json.loads((out / "run.json").read_text())["finetune"]["adapter"] == str(before)


def test_another_base_is_said(
    llama_folder: Path,
    first: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, before = first
    more = ["--adapter", str(before), "--method", "qlora"]
    assert run(llama_folder, data, tmp_path / "out", *more) == 0
    assert "it was trained on a dense base; this one is nf4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "full"], "an adapter cannot be gone on with by method full"),
        (["--add-tokens", "<x>"], "added tokens are trained by a fresh adapter"),
        (["--r", "4"], "--r is the shape of a fresh adapter"),
        (["--objective", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_what_does_not_go_together(
    llama_folder: Path,
    first: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    data, before = first
    try:
        code = run(llama_folder, data, tmp_path / "out", "--adapter", str(before), *more)
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code != 0
    assert said in capsys.readouterr().err
