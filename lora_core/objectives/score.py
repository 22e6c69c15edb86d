"""A score for a text: one number read from a decoder's last hidden state at the text's last token.

The head is a linear layer of the name `score` on the decoder, as transformers' classes for sequence
classification have it, so that an adapter trained here is one that PEFT puts onto
`AutoModelForSequenceClassification(num_labels=1)`. It starts at 0: before anything is learned all
texts are alike, and a pair's loss is ln 2.

Ref: Ouyang et al. 2022, arXiv:2203.02155, section 3.5 (the last layer is taken off and a projection
to a scalar put on).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.models import CausalLM
from lora_core.models.attention import branch_positions

HEAD = "score"


def add_score_head(model: CausalLM) -> nn.Module:
    """Put a frozen score head of zeros on a decoder; one that is there stays.

    Args:
        model: a decoder of this library.

    Returns:
        The head.
    """
    if HEAD not in model._modules:
        head = nn.Linear(model.config.hidden_size, 1, bias=False, device=model.device)
        nn.init.zeros_(head.weight)
        model.add_module(HEAD, head.requires_grad_(False))
    return model.get_submodule(HEAD)


def completion_scores(model: CausalLM, batch: Mapping[str, Any]) -> Tensor:
    """The score of each completion, read at its last token.

    Args:
        model: a decoder with a score head; the adapters that are active count.
        batch: of `branch_batch`, N completions, shared or not.

    Returns:
        (N,) float32 with gradients.
    """
    branches = batch.get("branch_ids")
    positions = None if branches is None else branch_positions(branches)
    x = model.model.embed_tokens(batch["input_ids"])
    states = model.model(x, batch["attention_mask"], positions, branch_ids=branches)
    ends = states[-1].flatten(0, 1)[batch["ends"]]  # (N, H)
    with torch.autocast(ends.device.type, enabled=False):
        return model.get_submodule(HEAD)(ends.float()).squeeze(-1)


def has_score_head(folder: str | Path) -> bool:
    """Whether a folder's adapter is a reward model's."""
    file = Path(folder) / "adapter_config.json"
    return file.is_file() and HEAD in (read_json_object(file).get("modules_to_save") or [])
