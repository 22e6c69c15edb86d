"""Latency: the states a model can be in, in turns, and the model left as it was."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PromptTuningConfig,
    adapted_modules,
    add_adapter,
)
from lora_core.compare import latency as module
from lora_core.compare.latency import measure_latency, why_unmergeable

PROMPT = [1, 2, 3]


@pytest.fixture
def model(small_decoder: Callable[..., nn.Module]) -> nn.Module:
    made = small_decoder()
    made.init_weights(0.1)
    return made.eval()


def test_the_states_by_what_is_attached(model: nn.Module) -> None:
    assert list(measure_latency(model, PROMPT, tokens=2, rounds=1)) == ["base"]
    assert why_unmergeable(model) is None
    add_adapter(model, LoRAConfig(r=2), "a")
    assert list(measure_latency(model, PROMPT, tokens=2, rounds=1)) == [
        "base",
        "unmerged",
        "merged",
    ]


@pytest.mark.parametrize(
    "config", [BottleneckConfig(reduction=4), PromptTuningConfig(2, vocabulary=9)], ids=repr
)
def test_what_cannot_be_merged_has_no_such_state(model: nn.Module, config: Any) -> None:
    add_adapter(model, config)
    assert list(measure_latency(model, PROMPT, tokens=2, rounds=1)) == ["base", "unmerged"]
    reason = why_unmergeable(model)
    assert reason is not None
    assert "no" in reason


def test_the_model_is_as_it_was(model: nn.Module, shake: Callable[..., nn.Module]) -> None:
    add_adapter(model, LoRAConfig(r=2))
    shake(model)
    ids = torch.tensor([PROMPT])
    before = model(ids).logits
    measure_latency(model, PROMPT, tokens=2, rounds=2)
    assert torch.equal(model(ids).logits, before)
    assert all(host.merged is None and host.active for _, host in adapted_modules(model))


def test_each_state_is_what_its_name_says(
    model: nn.Module, shake: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are replaced by a look at the model: states take turns, the first round is cold."""
    add_adapter(model, LoRAConfig(r=2))
    shake(model)
    seen: list[str] = []

    def look(model: nn.Module, prompt: Any, tokens: int) -> tuple[float, float]:
        hosts = [host for _, host in adapted_modules(model)]
        merged = all(host.merged is not None for host in hosts)
        on = any(host.enabled for host in hosts)
        seen.append("merged" if merged else "unmerged" if on else "base")
        return float(len(seen)), 10.0 * len(seen)

    monkeypatch.setattr(module, "_request", look)
    found = measure_latency(model, PROMPT, tokens=2, rounds=3)
    assert seen == ["base", "unmerged", "merged"] * 4
    # rounds 2 to 4 of "unmerged" are requests 5, 8 and 11
    assert found["unmerged"] == module.Latency(8.0, 80.0, 50.0, 110.0, 3)


def test_seconds_to_the_first_token_and_a_further_one(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 103.0, 103.5, 104.0, 104.5])  # asked, then four tokens
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert module._request(model, PROMPT, 4) == (3.0, 0.5)
    with pytest.raises(StopIteration):
        next(times)  # no token more, and none fewer: nothing ended it early


@pytest.mark.parametrize(("tokens", "rounds"), [(1, 1), (2, 0)])
def test_too_little_to_time(model: nn.Module, tokens: int, rounds: int) -> None:
    with pytest.raises(ValueError, match=f"2 tokens and 1 round or more; got {tokens} and"):
        measure_latency(model, PROMPT, tokens=tokens, rounds=rounds)
