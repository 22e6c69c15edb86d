"""The benchmark of merging: its made-up layers tell what they are meant to tell."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_core.adapters.merge_samples import Moments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def merging(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("merging")


def test_uncorrelated_inputs_are_the_limit_and_a_steep_spectrum_is_not(
    merging: ModuleType,
) -> None:
    flat, plain = merging.one_layer(64, 0.0, "random", 0.01)
    # the nearest point is W itself, but for what the scales can do; plain does worse
    assert 0.97 < flat <= 1.001 < plain
    steep, plain = merging.one_layer(64, 3.0, "among inputs", 0.01)
    assert steep < 0.3 < plain


def test_the_error_is_that_of_its_definition(merging: ModuleType) -> None:
    x, old, update, stored = (torch.randn(40, 8), *(torch.randn(5, 8) for _ in range(3)))
    moment = x.double().t() @ x.double()
    got = merging.output_error(stored, old + update, old, Moments(moment, moment))
    wanted = (x @ (stored - old - update).t()).norm() / (x @ update.t()).norm()
    assert got == pytest.approx(float(wanted), rel=1e-4)
