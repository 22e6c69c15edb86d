"""Plans against measured peaks, each of a real run (benchmarks/plan.py)."""

from collections.abc import Callable
from types import ModuleType

import pytest

WITHIN = 0.1  # what is promised


@pytest.fixture(scope="module")
def comparison(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("plan")


def check(comparison: ModuleType, **options: object) -> None:
    case = comparison.Case(**options)
    told, real = comparison.planned(case), comparison.measure(case)
    assert abs(told.peak / real - 1) <= WITHIN, (told.phases, real)


@pytest.mark.parametrize(
    ("method", "checkpointing"), [("lora", False), ("qlora", True), ("full", False), ("full", True)]
)
def test_the_shipped_model_in_float32(
    comparison: ModuleType, full_run: bool, method: str, checkpointing: bool
) -> None:
    if not full_run and (method, checkpointing) in (("full", True), ("lora", False)):
        pytest.skip("five seconds each: in the full run")
    check(comparison, method=method, checkpointing=checkpointing, batch=2)


def test_the_shipped_model_in_bfloat16(comparison: ModuleType) -> None:
    check(comparison, dtype="bfloat16", batch=2)


def test_accumulated_gradients_and_an_optimizer_of_8_bits(comparison: ModuleType) -> None:
    check(comparison, method="full", accumulate=2, batch=1)
    check(comparison, method="full", optimizer="adamw8bit", batch=1)


def test_a_plan_of_another_batch_would_be_seen(comparison: ModuleType) -> None:
    real = comparison.measure(comparison.Case(method="lora", batch=1))
    told = comparison.planned(comparison.Case(method="lora", batch=2))
    assert abs(told.peak / real - 1) > WITHIN


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_of_1b(
    comparison: ModuleType, full_run: bool, method: str, checkpointing: bool
) -> None:
    if not full_run:
        pytest.skip("minutes and 6 GB a case: make test-all")
    case = comparison.Case("1B", method, 1, 128, "bfloat16", checkpointing)
    result = comparison.compare(case)  # in a process of its own, which gives the memory back
    assert abs(result["ratio"] - 1) <= WITHIN, result
