"""Small models and the accuracy bound that the model tests share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_core.models import CausalLM, ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Sizes of a small model: 2 layers, 4 heads of 8 over 2 key/value heads, vocabulary 97."""
    return dict(SIZES)


@pytest.fixture
def make_model() -> Callable[..., CausalLM]:
    """Build a small model with seeded random weights, in evaluation mode."""

    def make(*, seed: int = 0, std: float = 0.1, **changes: Any) -> CausalLM:
        torch.manual_seed(seed)
        model = CausalLM(ModelConfig(**(SIZES | changes)))
        model.init_weights(std)
        return model.eval()

    return make


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare two float32 results by their distance from a float64 one."""

    def check(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
        eps = torch.finfo(ours.dtype).eps
        error = (ours.double() - truth).abs().max()
        allowed = 2 * (theirs.double() - truth).abs().max() + 2 * eps * truth.abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check
