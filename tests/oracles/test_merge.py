"""Merged models in transformers: saved, loaded again, the same logits; ties as they should be."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, add_adapter, merge_adapters, unload_adapters

pytestmark = pytest.mark.oracle

OPTIONS: dict[str, dict[str, Any]] = {
    "tied kept": {"targets": "all-linear"},
    "full head": {"targets": "all-linear", "modules_to_save": ["HEAD"], "untie": True},
    "low-rank head": {"targets": ["HEAD"], "untie": True},
    "full embedding and head": {
        "targets": "all-linear",
        "modules_to_save": ["EMBED", "HEAD"],
        "untie": True,
    },
    "token rows": {"targets": "all-linear", "trainable_token_indices": [3, 7]},
    "norms": {"targets": "all-linear", "modules_to_save": ["NORM"]},
}
NAMES = {
    "llama": {"HEAD": "lm_head", "EMBED": "embed_tokens", "NORM": "model.norm"},
    "gpt2": {"HEAD": "lm_head", "EMBED": "wte", "NORM": "ln_f"},
}


def shaken(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape), alpha=0.05)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("merge", [True, False])
def test_a_merged_model_is_saved_and_read_with_the_same_logits(
    family: str,
    name: str,
    merge: bool,
    oracle: Callable[[str], ModuleType],
    small_peer: Callable[..., nn.Module],
    tmp_path: Path,
) -> None:
    transformers = oracle("transformers")
    model: Any = small_peer(family, tie_word_embeddings=True)
    names = NAMES[family]
    options = {
        key: [names.get(v, v) for v in value] if isinstance(value, list) else value
        for key, value in OPTIONS[name].items()
    }
    if "trainable_token_indices" in options:
        options["trainable_token_indices"] = [3, 7]
    ids = torch.tensor([[1, 3, 7, 20]])

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            return of(ids).logits

    plain = logits(model)
    add_adapter(model, LoRAConfig(r=2, **options))
    shaken(model)
    wanted = logits(model) if merge else plain
    assert merge == (not torch.equal(wanted, plain))
    if merge:
        merge_adapters(model)
    unload_adapters(model, merge=merge)
    got = logits(model)
    # a merged float32 layer errs by some tens of roundings of its terms, through two layers
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (not options.get("untie", False)) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), got)
    assert again.config.tie_word_embeddings == tied
