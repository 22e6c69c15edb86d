"""LoRA on experts, both ways between PEFT on transformers' Qwen3-MoE and here."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, add_adapter, load_adapter, save_adapter
from lora_core.checkpoint import load_model

pytestmark = pytest.mark.oracle

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformers(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("transformers")


@pytest.fixture(scope="module")
def peft(oracle: Callable[[str], ModuleType]) -> ModuleType:
    return oracle("peft")


@pytest.fixture(scope="module")
def folder(transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.dim() == 1), 0.2)
    where = tmp_path_factory.mktemp("base")
    model.save_pretrained(where)
    return where


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


OURS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "experts": {"targets": ["experts"]},
    "ranks": {"rank_pattern": {"gate_up_proj": 5, "gate": 1}, "alpha_pattern": {"down_proj": 9}},
    "one-parameter": {"targets": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "one-layer": {"targets": ["1.mlp.experts"], "use_rslora": True},
    "attention-and-router": {"exclude": ["experts"]},
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_here_peft_loads(
    transformers: ModuleType, peft: ModuleType, folder: Path, tmp_path: Path, name: str
) -> None:
    ours = load_model(folder)
    before = ours(IDS).logits
    add_adapter(ours, LoRAConfig(r=3, alpha=5, **OURS[name]))
    for parameter in ours.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(ours, tmp_path)
    base = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT holds patterns against modules alone, and says so
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    close(ours(IDS).logits, theirs(IDS).logits)
    assert (ours(IDS).logits - before).abs().max() > 0.01 * before.abs().max()


DENSE_TOO: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "plain-layers": {"targets": ["gate_proj", "up_proj", "down_proj"]},
    "gate-alone": {"targets": ["gate_proj", "q_proj"], "rank_pattern": {"gate_proj": 2}},
    "beside-experts": {
        "targets": ["down_proj", "experts", "gate"],
        "rank_pattern": {"0.mlp.down_proj": 4, "experts.down_proj": 2, "gate": 1},
        "alpha_pattern": {"mlp.down_proj": 9},
    },
}


@pytest.mark.parametrize("name", DENSE_TOO)
def test_plain_layers_of_a_model_with_experts_are_not_taken_for_experts(
    transformers: ModuleType, peft: ModuleType, tmp_path: Path, name: str
) -> None:
    """PEFT rewrites targets named gate_proj, up_proj and down_proj; `mlp_only_layers` has such."""
    torch.manual_seed(1)
    base = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, mlp_only_layers=[0])
    )
    for parameter in base.parameters():
        nn.init.normal_(parameter, float(parameter.dim() == 1), 0.2)
    base.save_pretrained(tmp_path / "base")
    ours = load_model(tmp_path / "base")
    add_adapter(ours, LoRAConfig(r=3, alpha=5, **DENSE_TOO[name]))
    for parameter in ours.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    with pytest.warns(UserWarning, match="target_parameters"):
        save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    close(ours(IDS).logits, theirs(IDS).logits)
    fresh = load_model(tmp_path / "base")
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, ours(IDS).logits)


THEIRS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "parameters": {
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"],
    },
    "nothing-else": {"target_modules": [], "target_parameters": ["gate_up_proj"]},
    "router": {"target_modules": ["gate", "q_proj"]},
    "old-names": {"target_modules": ["gate_proj", "up_proj", "down_proj", "k_proj"]},
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_writes_is_loaded_here(
    transformers: ModuleType, peft: ModuleType, folder: Path, tmp_path: Path, name: str
) -> None:
    base = transformers.Qwen3MoeForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **THEIRS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(folder)
    load_adapter(ours, tmp_path)
    close(ours(IDS).logits, theirs(IDS).logits)
    again = tmp_path / "again"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(ours, again)
    fresh = load_model(folder)
    load_adapter(fresh, again)
    assert torch.equal(fresh(IDS).logits, ours(IDS).logits)
    raw = json.loads((again / "adapter_config.json").read_text())
    assert ("target_parameters" in raw) == (name != "router")
