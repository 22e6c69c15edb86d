"""Adapters of a multimodal model, loaded into its text part."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core.adapters import LoRA, TrainableTokens, adapted_modules
from lora_core.checkpoint import load_adapter
from lora_core.models import CausalLM, ModelConfig

CONFIG = ModelConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    sliding_window=4,
    model_type="gemma3_text",
    head_dim=4,
)
FIRST = "base_model.model."


def folder(directory: Path, text: str, vision: bool = True, **options: Any) -> Path:
    """PEFT's files, rank 2 at q_proj and 3 at o_proj of the first layer."""
    tensors: dict[str, Tensor] = {}

    def pair(site: str, r: int, rows: int) -> None:
        tensors[f"{FIRST}{site}.lora_A.weight"] = torch.randn(r, 8)
        tensors[f"{FIRST}{site}.lora_B.weight"] = torch.randn(rows, r)

    for layer in range(2):
        pair(f"{text}.layers.{layer}.self_attn.q_proj", 2, 8)
    pair(f"{text}.layers.0.self_attn.o_proj", 3, 8)
    if vision:
        newer = text.startswith("model.")
        pair(f"{'model.' if newer else ''}vision_tower.layers.0.q_proj", 2, 8)
    if options.get("trainable_token_indices"):
        key = f"{FIRST}{text}.embed_tokens.token_adapter.trainable_tokens_delta"
        tensors[key] = torch.randn(2, 8)
    record = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"]}
    record |= {"rank_pattern": {f"{text}.layers.0.self_attn.o_proj": 3}}
    record |= {"alpha_pattern": {r"language_model.*\.1\.self_attn\.q_proj": 10}}
    (directory / "adapter_config.json").write_text(json.dumps(record | options))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("text", ["model.language_model", "language_model.model"])
def test_names_ranks_and_alphas_of_the_whole_mean_the_text_part(text: str, tmp_path: Path) -> None:
    model = CausalLM(CONFIG)
    with pytest.warns(UserWarning, match=r"2 tensors \(.*vision_tower.*\) left out") as caught:
        load_adapter(model, folder(tmp_path, text, exclude_modules=["vision_tower"]))
    assert caught[0].filename == __file__
    pairs = {site: host.adapter("default") for site, host in adapted_modules(model)}
    first = "model.layers."
    scalings = {}
    for site, pair in pairs.items():
        assert isinstance(pair, LoRA)
        scalings[site.removeprefix(first)] = (pair.r, pair.scaling)
    assert scalings == {
        "0.self_attn.q_proj": (2, 2.0),
        "0.self_attn.o_proj": (3, 4 / 3),
        "1.self_attn.q_proj": (2, 5.0),
    }


def test_rows_by_the_name_of_the_whole(tmp_path: Path) -> None:
    rows = {"model.language_model.embed_tokens": [3, 7]}
    path = folder(tmp_path, "model.language_model", vision=False, trainable_token_indices=rows)
    model = CausalLM(CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, path)
    kept = dict(adapted_modules(model))["model.embed_tokens"].adapter("default")
    assert isinstance(kept, TrainableTokens)
    assert kept.index.tolist() == [3, 7]


def test_a_model_that_has_the_names_takes_them_as_they_are(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = CausalLM(CONFIG)
            self.vision_tower = nn.ModuleDict(
                {"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])}
            )

    targets = r".*(q_proj|layers\.0\.self_attn\.o_proj)"
    path = folder(tmp_path, "language_model.model", target_modules=targets)
    report = load_adapter(Whole(), path)
    assert len(report.sites) == 4
    assert "vision_tower.layers.0.q_proj" in report.sites


def test_another_models_adapter_is_still_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, "model.language_model.blocks")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="the adapter is for another model"),
    ):
        load_adapter(CausalLM(CONFIG), path)
