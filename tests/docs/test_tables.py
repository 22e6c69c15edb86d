"""Tables in docs/ that are made from the code are what the code makes now."""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from lora_core import LoRA

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def methods(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("methods")


def test_what_each_method_can_do(methods: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = methods.table()
    assert "wrong" not in made
    assert made in (ROOT / "docs" / "adapters.md").read_text(), (
        "docs/adapters.md is behind the code: python -m benchmarks.methods --write"
    )


def test_a_method_that_computes_something_else_would_be_seen(methods: ModuleType) -> None:
    class Forgetful(LoRA):
        def merged(self, weight, bias):  # type: ignore[no-untyped-def]
            return weight, bias

    class Config:
        def build(self, name: str, module: nn.Module) -> Forgetful | None:
            return Forgetful(32, 32, 2) if name.endswith("q_proj") else None

    broken = methods.Method("broken", lambda *_: Config(), "", "", "")
    assert methods._merges(broken) == "wrong"
    assert methods._merges(methods.METHODS[0]) == "yes"
