"""`lora-core quantize` beyond the usual path: without the comparison, and on encoders."""

import json
from pathlib import Path

import pytest

from lora_core.checkpoint import load_model, save_model
from lora_core.cli.main import main
from lora_core.models import EncoderConfig, ModelConfig, build_model
from lora_core.quant import NF4Linear, NF4Stack


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["quantize", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_without_the_comparison_the_original_is_never_loaded(
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lora_core.cli import quantize

    asked: list[str | None] = []

    def load(directory: Path, quantize: str | None = None, **options: object) -> object:
        asked.append(f"{Path(directory).name} {quantize}")
        return load_model(directory, quantize)

    monkeypatch.setattr(quantize, "load_model", load)
    words = ("--model", str(llama_folder), "--out", str(tmp_path / "out"))
    found = facts(capsys, *words, "--no-compare")
    assert asked == [f"{llama_folder.name} nf4", "out None"]
    assert found["layers"] == 21
    assert "logit_rms" not in found


def test_an_encoder_is_written_without_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    raw = {"model_type": "bert", **sizes, "num_attention_heads": 2, "max_position_embeddings": 9}
    save_model(build_model(EncoderConfig.from_dict(raw), head="token"), tmp_path / "a")
    words = ("--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"))
    found = facts(capsys, *words)
    assert "logit_rms" not in found
    layers = [m for m in load_model(tmp_path / "b").modules() if isinstance(m, NF4Linear)]
    assert found["layers"] == len(layers) == 12
    main(["quantize", *words[:2], "--out", str(tmp_path / "c")])
    assert "wrote" in capsys.readouterr().out


def test_a_folder_without_a_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--model", str(tmp_path), "--out", str(tmp_path / "b")]) == 1
    said = capsys.readouterr().err
    assert "has no config.json: not a Hugging Face folder" in said
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("ignore:experts are written in 4 bits")  # for transformers
def test_the_matrices_of_experts_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = ModelConfig(model_type="qwen3_moe", **sizes, **experts, **heads)
    save_model(build_model(config), tmp_path / "a")
    found = facts(
        capsys, "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--no-compare"
    )
    again = load_model(tmp_path / "b").modules()
    stacked = sum(len(module) for module in again if isinstance(module, NF4Stack))
    assert stacked
    assert found["layers"] == 2 * 4 + stacked
    assert isinstance(found["bits_per_weight"], float)
    assert 4 < found["bits_per_weight"] < 5
