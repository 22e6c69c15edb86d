"""Sixty digits to judge losses by: formulas over Decimal, differentiated by central differences."""

import decimal
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal

import pytest

STEP = Decimal("1e-20")  # its error, in the square, is far below float64's rounding


class Precise:
    """Functions of Decimal, written apart from the library, and derivatives of any function."""

    number = Decimal
    """exact for any float"""

    @staticmethod
    def log_sigmoid(x: Decimal) -> Decimal:
        """log(1 / (1 + e⁻ˣ))."""
        return -(1 + (-x).exp()).ln()

    @staticmethod
    def gradient(
        function: Callable[[Sequence[Decimal]], Decimal], at: Sequence[float]
    ) -> list[float]:
        """Each partial derivative, good to more digits than a float has."""
        point = [Decimal(x) for x in at]
        found = []
        for i in range(len(point)):
            up, down = list(point), list(point)
            up[i] += STEP
            down[i] -= STEP
            found.append(float((function(up) - function(down)) / (2 * STEP)))
        return found


@pytest.fixture
def precise() -> Iterator[Precise]:
    """Decimal arithmetic of 60 digits while the test runs."""
    with decimal.localcontext() as context:
        context.prec = 60
        yield Precise()
