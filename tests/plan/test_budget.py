"""What fits a budget does fit, and little more would."""

import dataclasses

import pytest

from lora_core.adapters import LoRAConfig
from lora_core.models import ModelConfig
from lora_core.plan import plan, what_fits
from lora_core.plan.budget import GRID, STEP, largest
from lora_core.train import TrainConfig

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,  # up to three, a plan is a single run
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_what_fits_fits_and_a_little_more_does_not() -> None:
    settings = plan(CONFIG, "qlora", LoRAConfig(r=4), tokens=64).settings
    budget = 700_000_000
    switches = [{}, {"activation_checkpointing": True, "optimizer": "adamw8bit"}]
    plain, small = what_fits([settings], budget, switches)
    assert 0 < plain.tokens < small.tokens
    assert plain.words == "no switch"
    assert small.words == "activation checkpointing + adamw8bit"
    for fit in (plain, small):
        train = TrainConfig(batch_size=1, **fit.switches)
        exact = plan(CONFIG, "qlora", LoRAConfig(r=4), train, tokens=fit.tokens)
        more = plan(CONFIG, "qlora", LoRAConfig(r=4), train, tokens=int(fit.tokens * 1.05))
        assert exact.peak + exact.outside <= 1.01 * budget
        assert more.peak + more.outside > 0.99 * budget


def test_nothing_fits_a_budget_below_the_weights() -> None:
    settings = plan(CONFIG, "full", tokens=64).settings
    (fit,) = what_fits([settings], 1_000_000, [{}])
    assert fit.tokens == 0
    assert fit.least > 1_000_000


@pytest.mark.parametrize("limit", [63, 64, 1000, 5000, 10**9])
def test_largest_on_a_line(limit: int) -> None:
    found = largest(lambda tokens: 10 * tokens, 10 * limit)
    assert found == min(limit // STEP * STEP, GRID[-1])


def test_the_rows_of_the_settings_are_not_read() -> None:
    settings = plan(CONFIG, "lora", LoRAConfig(r=4), tokens=64).settings
    wide = dataclasses.replace(settings, train=TrainConfig(batch_size=64), tokens=999)
    assert what_fits([settings], 10**9, [{}]) == what_fits([wide], 10**9, [{}])
