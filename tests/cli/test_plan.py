"""`lora-core plan`: its table, its JSON, its budget, and one line for each mistake."""

import json
from pathlib import Path

import pytest

from lora_core import base_model_path
from lora_core.cli.main import main
from lora_core.cli.plan import read_bytes

SMALL = ["--model", str(base_model_path()), "--batch-size", "2", "--max-length", "128"]


@pytest.fixture
def flat(tmp_path: Path) -> list[str]:
    """The shipped model with two layers, for which a plan takes a single run."""
    raw = json.loads((base_model_path() / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    return ["--model", str(file), "--max-length", "128"]


def test_the_table_has_every_method_and_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--activation-checkpointing"]) == 0
    out = capsys.readouterr().out
    for word in ("full", "lora", "qlora", "4-bit weights", "optimizer", "activations", "peak"):
        assert word in out
    assert "2 × 128 tokens, adamw, activation checkpointing, products in bfloat16, on cuda" in out
    assert "CUDA context" in out


def test_json_of_one_method(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--method", "qlora", "--r", "4", "--device", "cpu", "--json"]
    assert main(["plan", *words, "--targets", "q_proj,v_proj", "--optimizer", "adamw8bit"]) == 0
    told = json.loads(capsys.readouterr().out)
    (plan,) = told["plans"]
    assert plan["method"] == "qlora"
    assert plan["trainable"] == 5 * (4 * (256 + 256) + 4 * (256 + 128))
    assert plan["bytes"]["adapter"] == 4 * plan["trainable"]
    assert plan["peak"] == max(plan["phases"].values())
    assert plan["compute_dtype"] == "float32"
    assert plan["formulas"].keys() == plan["bytes"].keys()
    assert "fits" not in told


def test_a_budget_lists_what_fits(flat: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*flat, "--method", "lora", "--device", "cpu", "--budget", "200MB"]
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "within 0.2 GB" in out
    assert "activation checkpointing + adamw8bit" in out
    assert "lora: batch" in out
    assert main(["plan", *words[:-1], "1MB"]) == 0
    assert "lora: not one row of 128" in capsys.readouterr().out


def test_a_budget_as_json(flat: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flat, "--method", "lora", "--budget", "0.6GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["budget"] == 600_000_000
    plain, *others = told["fits"]
    assert plain["switches"] == {}
    assert len(others) == 4
    assert plain["batch"] == plain["tokens"] // 128


def test_a_config_json_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text((base_model_path() / "config.json").read_text())
    assert main(["plan", "--model", str(file), "--method", "lora", "--max-length", "64"]) == 0
    by_file = capsys.readouterr().out.splitlines()[3:]
    assert main(["plan", "--model", str(tmp_path), "--method", "lora", "--max-length", "64"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == by_file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "9B"], "no model '9B': give one of 1B, 7B, 8B, 13B, 65B, 70B, a Hugging Face"),
        ([*SMALL, "--budget", "much"], "--budget must be a size such as 24GB or 22.5GiB"),
        ([*SMALL, "--max-length", "1"], "tokens must be a whole number, 2 or more; got 1"),
        ([*SMALL, "--targets", "w_proj"], "w_proj"),
        ([*SMALL, "--r", "0"], "r must be a whole number of at least 1, got 0"),
        ([*SMALL, "--batch-size", "0"], "batch_size must be a whole number"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("lora-core plan: ")
    assert err.count("\n") == 1


def test_broken_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object; got list"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not implemented"),
        ('{"model_type": "llama"}', "the key vocab_size is missing"),
    ):
        file.write_text(text)
        assert main(["plan", "--model", str(file)]) == 1
        assert message in capsys.readouterr().err


def test_bad_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert main(["plan", "--model", "8B", "--method", "dora"]) == 2
    assert "--model" in capsys.readouterr().err


def test_sizes_are_read() -> None:
    assert read_bytes("24GB") == 24_000_000_000
    assert read_bytes("1.5 GiB") == 3 << 29
    assert read_bytes("512") == 512
    for wrong in ("", "GB", "1.2.3GB", "-1GB", "0", "3 XB"):
        with pytest.raises(ValueError, match="--budget must be a size"):
            read_bytes(wrong)
