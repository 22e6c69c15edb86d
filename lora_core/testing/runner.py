"""Run a property over drawn cases; the failure that comes out is the smallest one found.

hypothesis draws the cases and shrinks the one that fails. It is imported when a check runs, so that
`import lora_core.testing` needs torch alone. Runs are reproducible: the same check draws the same
cases every time, and torch's generator is left where it was.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Case = TypeVar("Case")


def load_hypothesis(name: str = "hypothesis") -> ModuleType:
    """Import hypothesis or a module of it.

    Args:
        name: "hypothesis" or "hypothesis.strategies".

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lora_core.testing draws its cases with hypothesis, which is not installed; "
            "pip install lora-core[test]"
        ) from error


def run_property(
    check: Callable[[Case], None], cases: "SearchStrategy[Case]", examples: int
) -> None:
    """Call `check` on drawn cases and raise the smallest failure.

    Args:
        check: raises AssertionError where the property fails; any other exception counts as a
            failure too, since no drawn case is outside the promise.
        cases: hypothesis strategy; what it draws is shown in the message.
        examples: how many cases.

    Raises:
        AssertionError: the fact and the smallest failing case.
        ValueError: `examples` is below 1.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    hypothesis = load_hypothesis()

    def attempt(case: Case) -> None:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{error}\nsmallest failing case: {case}") from error
        except Exception as error:
            raise AssertionError(
                f"raised {type(error).__name__}: {error}\nsmallest failing case: {case}"
            ) from error

    limits = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    with torch.random.fork_rng():
        try:
            limits(hypothesis.given(cases)(attempt))()
        except hypothesis.errors.Flaky as error:
            raise AssertionError(
                f"fails on some calls and passes on others with the same input: {error}"
            ) from error
