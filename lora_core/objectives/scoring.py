"""How probable a model finds completions: what every objective here is a function of.

One forward over a `branch_batch`, and the log-probabilities of each completion's graded tokens are
picked out of it by `completions`, the same way whether a prompt's completions share a row or not.
A decoder of this library never holds its logits; of any other module they are taken whole.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.soft import active_prompts
from lora_core.data.branches import PADDED
from lora_core.losses import label_log_probs
from lora_core.models import CausalLM
from lora_core.models.attention import branch_positions

_INPUTS = ("input_ids", "attention_mask", "branch_ids")


def why_not_shared(model: nn.Module) -> str | None:
    """Why a prompt's completions cannot share its computation in this model; None: they can.

    Args:
        model: with its adapters active as they will be.
    """
    inner = getattr(model, "module", model)
    if not isinstance(inner, CausalLM):
        return f"{type(inner).__name__} has no branch_ids"
    if any(prompt.prepended for prompt in active_prompts(inner)):
        return "virtual tokens stand before a row's first token, which branches count from"
    return None


def can_share(model: nn.Module) -> bool:
    """Whether `branch_batch(shared=True)` is for this model."""
    return why_not_shared(model) is None


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is given of a batch."""
    inputs = {name: batch[name] for name in _INPUTS if name in batch}
    if "branch_ids" in inputs:  # said, as what moves positions on (a prefix) counts them otherwise
        inputs["position_ids"] = branch_positions(inputs["branch_ids"])
    return inputs


def token_log_probs(model: nn.Module, batch: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
    """(B, T): log p of each next label of a batch, 0 where not graded, with gradients.

    Args:
        model: a decoder, or any module that returns `.logits` (B, T, V).
        batch: of `branch_batch`.
        temperature: logits are divided by it.
    """
    labels = batch["labels"]
    if getattr(getattr(model, "module", model), "grades", False):
        more: dict[str, Any] = {"token_log_probs": True, "temperature": temperature}
        return model(**_inputs(batch), labels=labels, keep_logits=False, **more).log_probs
    return label_log_probs(model(**_inputs(batch)).logits, labels, temperature=temperature)


def _picked(batch: Mapping[str, Any], log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities by completion (N, L), where there are tokens, and their flat places."""
    places = batch["completions"]  # (N, L)
    mask = places != PADDED
    places = places.clamp(min=0)
    return torch.where(mask, log_probs.flatten()[places], 0.0), mask, places


def completion_log_probs(
    model: nn.Module, batch: Mapping[str, Any], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each completion's graded tokens.

    Args:
        model: as in `token_log_probs`.
        batch: of `branch_batch`, with N completions of at most L graded tokens.
        temperature: logits are divided by it.

    Returns:
        (N, L) float32 with gradients, 0 where there is no token, and (N, L) bool: where there is.
    """
    found, mask, _ = _picked(batch, token_log_probs(model, batch, temperature))
    return found, mask


def completion_states(
    model: nn.Module, batch: Mapping[str, Any], temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`completion_log_probs`, and the hidden states that the tokens are predicted from.

    Args:
        model: a decoder of this library.
        batch: of `branch_batch`.
        temperature: logits are divided by it.

    Returns:
        (N, L), (N, L) bool, and the last hidden states (N, L, H), all with gradients.
    """
    more: dict[str, Any] = {"token_log_probs": True, "temperature": temperature}
    out = model(
        **_inputs(batch),
        labels=batch["labels"],
        keep_logits=False,
        output_hidden_states=True,
        **more,
    )
    found, mask, places = _picked(batch, out.log_probs)
    return found, mask, out.hidden_states[-1].flatten(0, 1)[places]
