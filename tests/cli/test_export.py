"""`lora-core export` and the kinds of LoRA that `finetune` and `merge` offer."""

import json
from pathlib import Path

import pytest
import torch

from lora_core.adapters import LoRAConfig, adapted_modules, add_adapter
from lora_core.checkpoint import load_model, read_adapter, save_adapter
from lora_core.cli.main import main
from lora_core.runs.opening import open_model


@pytest.fixture
def adapter(llama_folder: Path, tmp_path: Path) -> Path:
    """An adapter with a rank of its own in one kind of layer."""
    model = load_model(llama_folder)
    add_adapter(model, LoRAConfig(r=4, alpha=6, rank_pattern={"q_proj": 2}, use_dora=False))
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    with pytest.warns(UserWarning, match="rank_pattern: misread by vLLM, in silence"):
        save_adapter(model, tmp_path / "a", base_model=str(llama_folder))
    return tmp_path / "a"


def test_baked_for_vllm(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--adapter", str(adapter), "--out", str(tmp_path / "b")]
    assert main([*words, "--baked", "--for", "vllm"]) == 0
    out = capsys.readouterr().out
    assert "baked, rank 4 everywhere" in out
    assert "read by vllm: off by" in out
    assert read_adapter(tmp_path / "b")[0]["rank_pattern"] == {}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = open_model(None, adapter, device="cpu").model(ids).logits
        got = open_model(None, tmp_path / "b", device="cpu").model(ids).logits
    assert (got - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max()
    # a second time the folder is not empty
    assert main([*words, "--baked"]) == 1
    assert "is not empty: choose a new folder" in capsys.readouterr().err


def test_a_plain_copy_and_its_notes_as_json(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--adapter", str(adapter), "--out", str(tmp_path / "b"), "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rank"] is None
    assert facts["conversion"] is None
    assert facts["notes"][0].startswith("rank_pattern: misread by vLLM, in silence")
    assert "one rank" in facts["refused"]["sglang"]


def test_dora_is_refused_or_converted(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(llama_folder)
    add_adapter(model, LoRAConfig(r=2, use_dora=True, targets=["v_proj"]))
    save_adapter(model, tmp_path / "a", base_model=str(llama_folder))
    words = ["export", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--baked"]
    assert main([*words, "--for", "llama.cpp"]) == 1
    error = capsys.readouterr().err
    assert "lora_magnitude_vector'; --to-lora RANK (with --model)" in error
    assert error.count("\n") == 1
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    save_adapter(model, tmp_path / "a", base_model=str(llama_folder))
    assert main([*words, "--for", "llama.cpp", "--to-lora", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0 < facts["conversion"]["error"] < 1
    assert facts["rank"] == 8
    assert "llama.cpp" in facts["errors"]


@pytest.mark.filterwarnings("ignore:init='loftq' made the 4-bit base")
@pytest.mark.parametrize(
    "flags",
    [
        ["--use-dora"],
        ["--init", "pissa", "--bias", "lora_only"],
        ["--init", "loftq", "--loftq-steps", "2"],
        ["--modules-to-save", "norm,lm_head", "--targets", "q_proj,v_proj"],
    ],
    ids=["dora", "pissa", "loftq", "modules"],
)
def test_finetune_and_merge_with_the_kinds_of_lora(
    flags: list[str], llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}]}
        for i in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    words = ["finetune", "--model", str(llama_folder), "--data", str(data), "--out", str(out)]
    words += ["--steps", "2", "--batch-size", "2", "--accumulate", "1", "--progress", "false"]
    words += ["--device", "cpu", "--lr", "1e-2", "--r", "2", *flags]
    assert main(words) == 0
    recorded = json.loads((out / "run.json").read_text())["adapter"]
    config = LoRAConfig(**recorded)
    assert config.use_dora == ("--use-dora" in flags)
    assert config.init == (flags[1] if flags[0] == "--init" else "kaiming")
    assert config.modules_to_save == (["norm", "lm_head"] if "norm,lm_head" in flags else None)
    capsys.readouterr()
    # repeated from its record: the same files, bit for bit
    again = tmp_path / "again"
    repeated = ["finetune", "--config", str(out / "run.json"), "--out", str(again)]
    assert main(repeated) == 0
    first, second = read_adapter(out)[1], read_adapter(again)[1]
    assert all(torch.equal(first[key], second[key]) for key in first)
    capsys.readouterr()
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(out), "--out", str(merged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["merged_onto"] == ("nf4" if "loftq" in flags else "dense")
    eps = torch.finfo(torch.float32).eps
    assert facts["largest_logit_difference"] <= 256 * eps * facts["largest_logit"]


@pytest.mark.filterwarnings("ignore:init='loftq' made the 4-bit base")
def test_loftq_has_no_original(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(llama_folder)
    add_adapter(model, LoRAConfig(r=2, init="loftq", targets=["q_proj"]))
    save_adapter(model, tmp_path / "a", base_model=str(llama_folder))
    words = ["merge", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "m")]
    assert main([*words, "--onto-original"]) == 1
    assert "the adapter's base is in 4 bits itself, made by init='loftq'" in capsys.readouterr().err


def test_loftq_quantizes_itself(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--model", str(llama_folder), "--data", "x", "--out", str(tmp_path / "r")]
    assert main([*words, "--method", "qlora", "--init", "loftq"]) == 1
    assert "--init loftq quantizes the 16-bit base itself" in capsys.readouterr().err
