"""The command line given an encoder's folder: what it can do, and what it says it cannot."""

import json
from pathlib import Path

import pytest
import torch

from lora_core.adapters import LoRAConfig, adapted_modules, add_adapter
from lora_core.checkpoint import load_model, save_adapter, save_model
from lora_core.cli.main import main
from lora_core.models import EncoderConfig, build_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A classifier with the tests' tokenizer of 400 ids."""
    config = EncoderConfig(400, 32, 48, 2, 4, max_position_embeddings=64, head="sequence")
    model = build_model(config)
    model.init_weights(0.2)
    save_model(model, tmp_path / "encoder", source=tokenizer_folder)
    return tmp_path / "encoder"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "hello"],
        ["evaluate", "--data", "DATA"],
        ["finetune", "--data", "DATA", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_it_writes_no_text(
    words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "hello", "completion": " world"}) + "\n")
    named = {"DATA": str(data), "OUT": str(tmp_path / "out")}
    verb, *rest = [named.get(word, word) for word in words]
    assert main([verb, "--model", str(folder), *rest]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"lora-core {verb}: {folder} holds an encoder (SequenceClassifier), which does not "
        "continue text: this command needs a decoder"
    )


def test_it_is_merged_and_quantized(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    add_adapter(model, LoRAConfig(r=2, targets=["query"], modules_to_save=["classifier"]))
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for parameter in host.adapters.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    save_adapter(model, tmp_path / "adapter", base_model=str(folder))
    words = ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    assert main(["merge", *words, "--device", "cpu"]) == 0
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    words = ["--model", str(tmp_path / "merged"), "--out", str(tmp_path / "small")]
    assert main(["quantize", *words]) == 0
    small = load_model(tmp_path / "small")
    assert 0 < (small(IDS).logits - merged(IDS).logits).abs().max() < 1
