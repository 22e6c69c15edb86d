"""Log-probabilities of labels, from logits and from the head, with any gradient coming back."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.adapters import LoRALinear
from lora_core.losses import label_log_probs, linear_log_probs
from lora_core.losses import log_probs as module


def by_hand(
    hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None, scale: float, temp: float
) -> list[list[float]]:
    """Each number from its definition, in Python's floats."""
    found = []
    for row, targets in zip(hidden.tolist(), labels.tolist(), strict=True):
        line = []
        for state, target in zip(row, [*targets[1:], -100], strict=True):
            if target == -100:
                line.append(0.0)
                continue
            logits = [
                scale * sum(h * w for h, w in zip(state, each, strict=True))
                for each in weight.tolist()
            ]
            if cap is not None:
                logits = [cap * math.tanh(z / cap) for z in logits]
            logits = [z / temp for z in logits]
            top = max(logits)
            line.append(logits[target] - top - math.log(sum(math.exp(z - top) for z in logits)))
        found.append(line)
    return found


@given(
    st.sampled_from([None, 2.0]),
    st.sampled_from([1.0, 0.25]),
    st.sampled_from([1.0, 0.5, 3.0]),
    st.integers(0, 1000),
)
def test_each_number_is_its_definition(
    cap: float | None, scale: float, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(2, 4, 3, dtype=torch.float64)
    weight = 3 * torch.randn(7, 3, dtype=torch.float64)
    labels = torch.where(torch.rand(2, 4) < 0.4, -100, torch.randint(0, 7, (2, 4)))
    settings: dict[str, Any] = {"softcap": cap, "scale": scale, "temperature": temperature}
    found = linear_log_probs(hidden, weight, labels, **settings)
    wanted = by_hand(hidden, weight, labels, cap, scale, temperature)
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["weight", "linear", "lora"])
def test_any_gradient_comes_back_through_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    linear = nn.Linear(4, 9).double()
    head: Any = {"weight": linear.weight, "linear": linear, "lora": linear}[kind]
    if kind == "lora":
        head = LoRALinear(linear, r=2)
        nn.init.normal_(head.B)
    labels = torch.randint(0, 9, (3, 5))
    labels[1, :3] = -100
    back = torch.randn(3, 5, dtype=torch.float64)
    logits = hidden @ linear.weight.t() if kind == "weight" else head(hidden)
    whole = label_log_probs(logits, labels, temperature=0.7)
    leaves = [
        hidden,
        *(p for p in ([head] if kind == "weight" else head.parameters()) if p.requires_grad),
    ]
    expected = torch.autograd.grad((whole * back).sum(), leaves)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 20)  # two rows at a time
    chunked = linear_log_probs(hidden, head, labels, temperature=0.7)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((chunked * back).sum(), leaves), expected, strict=True
    ):
        # a LoRA's parameters, and so their gradients, are float32
        wide = ours.dtype == torch.float64
        rtol, atol = (1e-10, 1e-12) if wide else (1e-5, 1e-5)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_nothing_graded_is_nothing_with_a_gradient() -> None:
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    found = linear_log_probs(hidden, torch.randn(5, 4), torch.full((1, 3), -100))
    assert not found.any()
    found.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_sixteen_bits_are_widened() -> None:
    hidden = torch.randn(2, 3, 4).bfloat16()
    weight = torch.randn(6, 4).bfloat16()
    found = linear_log_probs(hidden, weight, torch.randint(0, 6, (2, 3)))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        label_log_probs(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), temperature=temperature)


def test_labels_are_checked() -> None:
    with pytest.raises(ValueError, match="labels must be -100 or in 0 … 4"):
        linear_log_probs(torch.zeros(1, 2, 4), torch.zeros(5, 4), torch.tensor([[0, 5]]))
