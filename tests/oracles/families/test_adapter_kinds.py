"""The other kinds of adapters on the families whose parts could get in their way, against PEFT.

Each is made here and read by PEFT, then written by PEFT and read here again. Scaled embeddings
(Gemma), a factor on what is embedded (Granite), fused projections (Phi-3), norms of queries and
keys (Qwen 3, OLMo 2), biases (Qwen 2), layers that slide or do not rotate.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    add_adapter,
    merge_adapters,
)
from lora_core.checkpoint import load_adapter, save_adapter

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*tied layer is part of the adapter"),
]

P = 2
DORA = {"r": 3, "use_dora": True}
KINDS: dict[str, Any] = {
    "dora": LoRAConfig(**DORA),
    "embedding": LoRAConfig(r=3, targets=["embed_tokens", "o_proj"], untie=True),
    "dora of the embedding": LoRAConfig(**DORA, targets=["embed_tokens"], untie=True),
    "rows": LoRAConfig(r=3, targets=["o_proj"], trainable_token_indices=[3, 9]),
    "copies": LoRAConfig(r=3, targets=["o_proj"], modules_to_save=["embed_tokens"], untie=True),
    "biases": LoRAConfig(r=3, bias="lora_only"),
    "prompt": PromptTuningConfig(P),
    "p-tuning": PTuningConfig(P, hidden=10),
    "prefix": PrefixTuningConfig(P, projection=False, std=1.0),
}
PAIRS = [
    ("dora", "phi3"),
    ("dora", "qwen2"),
    ("dora", "olmo2"),
    ("embedding", "gemma"),
    ("embedding", "gemma3"),
    ("embedding", "granite"),
    ("dora of the embedding", "gemma2"),
    ("rows", "gemma"),
    ("rows", "gemma3"),
    ("copies", "gemma2"),
    ("biases", "qwen2"),
    ("prompt", "gemma"),
    ("prompt", "gemma3"),
    ("prompt", "granite"),
    ("p-tuning", "gemma2"),
    ("prefix", "gemma3"),
    ("prefix", "qwen3"),
    ("prefix", "phi3"),
    ("prefix", "phi4-mini"),
    ("prefix", "olmo2"),
    ("prefix", "smollm3"),
]


def tell(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits[:, -ids.shape[1] :]  # PEFT gives those of a prompt too


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_kinds(
    kind: str,
    name: str,
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    oracle: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    peft = oracle("peft")
    ours, theirs, truth, folder = make_pair(name)
    # of texts longer than a window PEFT's prefix slides out
    ids = draw(tokens=4 if kind == "prefix" else 12)
    plain = tell(ours, ids)
    add_adapter(ours, KINDS[kind])
    if kind in ("embedding", "copies", "biases"):
        assert torch.equal(tell(ours, ids), plain)
    found = tell(randomised(ours), ids)
    assert (found - plain).abs().max() > 0.05
    save_adapter(ours, tmp_path / "ours", base_model=str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*([Uu]nexpected|[Mm]issing).*")
        read = [
            peft.PeftModel.from_pretrained(m, tmp_path / "ours").eval() for m in (theirs, truth)
        ]
    within(found, tell(read[0], ids), tell(read[1].double(), ids), "rms")
    read[0].save_pretrained(tmp_path / "theirs")
    again = make_pair(name)[0]
    load_adapter(again, tmp_path / "theirs", untie=True)
    assert torch.equal(tell(again, ids), found)
    if isinstance(KINDS[kind], LoRAConfig):
        merge_adapters(ours)
        peer = read[0].merge_and_unload() if kind == "dora" else read[0]
        within(tell(ours, ids), tell(peer, ids), tell(read[1], ids), "rms")
