"""The loading benchmark at toy sizes: folders, checks that can fail, what it measures and skips."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.checkpoint import load_model, load_state


@pytest.fixture(scope="module")
def loading(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("loading")


@pytest.fixture(scope="module")
def folders(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("loading_folders")


def test_shapes_by_name_and_by_numbers(folders: ModuleType) -> None:
    eight = folders.shape_of("8b", 32000)
    assert (eight.hidden_size, eight.num_hidden_layers, eight.vocab_size) == (4096, 32, 128256)
    own = folders.shape_of("256,3", 100)
    assert (own.hidden_size, own.num_hidden_layers, own.vocab_size) == (256, 3, 100)
    with pytest.raises(ValueError, match="no model 'x'"):
        folders.shape_of("x", 100)
    small = folders.cut(eight)
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (4096, 1, 1024)
    # 8.03e9 parameters of 2 bytes; in 4 bits a quarter, but for embedding and head
    assert 17e9 < folders.memory_needed(eight, 2, False) < 17.2e9
    assert 8.5e9 < folders.memory_needed(eight, 2, True) < 9.5e9
    with pytest.raises(ValueError, match=r"the folders take .*--where"):
        folders.check_disk(eight, 10**6, Path(tempfile.gettempdir()))


def test_the_weights_are_normal_and_not_alike(
    folders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "BLOCK", 4999)  # shorter than the tensors, as in large models
    folders.write_folder(tmp_path, folders.shape_of("64,1", 100), "bfloat16")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    firsts = set()
    for name, tensor in load_state(tmp_path):
        assert tensor.dtype == torch.bfloat16
        if tensor.dim() == 1:
            assert (tensor == 1).all()
            continue
        assert tensor.float().std().item() == pytest.approx(0.02, rel=0.05), name
        assert abs(tensor.float().mean().item()) < 0.002
        assert len(tensor.unique(dim=0)) == len(tensor)
        firsts.add(tuple(tensor[0].tolist()))
    assert len(firsts) == 9


def test_a_wrong_weight_is_not_timed(folders: ModuleType, tmp_path: Path) -> None:
    folders.write_folder(tmp_path, folders.shape_of("64,3", 100), "float32", shards=1)
    for quantize in (None, "nf4"):
        model = load_model(tmp_path, quantize=quantize)
        assert folders.check_loaded(model, tmp_path) == 2 * 9 + 1
        path = tmp_path / "model.safetensors"
        whole, state = path.read_bytes(), load_file(path)
        state["model.layers.2.mlp.up_proj.weight"][5, 7] *= -1
        save_file(state, path)
        with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj\.weight was loaded wrongly"):
            folders.check_loaded(model, tmp_path)
        path.write_bytes(whole)


def rows(
    loading: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str
) -> list[dict[str, Any]]:
    """Run it in this process; the rows it recorded."""

    def here(task: str, folder: Path, other: Path) -> dict[str, Any]:
        found: dict[str, Any] = loading.answer(task, folder, other)
        return found

    monkeypatch.setattr(loading, "in_a_process", here)
    out = tmp_path / "out.jsonl"
    arguments = ["--shape", "64,2", "--vocab", "64", "--repeat", "1", "--out", str(out), *flags]
    monkeypatch.setattr(sys, "argv", ["loading", *arguments])
    loading.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.oracle
def test_every_stack_is_measured(
    loading: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
) -> None:
    oracle("bitsandbytes")
    found = {row["stack"]: row for row in rows(loading, tmp_path, monkeypatch, "--cold")}
    assert found.keys() == loading.STACKS.keys()
    assert all(row["seconds"][0] > 0 and row["shape"] == "64,2" for row in found.values())
    dense, packed = (found[stack] for stack in ("lora_core", "lora_core 4-bit folder"))
    assert dense["model_bytes"] > packed["model_bytes"]
    assert dense["disk_bytes"] > packed["disk_bytes"]
    assert packed["model_bytes"] == found["lora_core nf4"]["model_bytes"]
    printed = capsys.readouterr().out
    assert "logits: error" in printed
    assert "nf4: error at most" in printed


@pytest.mark.oracle
def test_what_does_not_fit_is_skipped_with_the_reason(
    loading: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Callable[[str], Any],
) -> None:
    oracle("bitsandbytes")
    monkeypatch.setattr(loading, "available", lambda: 10**8)
    (row,) = rows(loading, tmp_path, monkeypatch, "--stacks", "lora_core")
    assert row["skipped"] == "needs 1.0 GB of memory, 0.1 are free"


def test_a_process_that_fails_says_why(loading: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with 1: .*has no config"):
        loading.in_a_process("pack", tmp_path, tmp_path / "out")
