"""How many cases a check draws: the count of the hypothesis profile in use."""

import pytest
from hypothesis import settings


@pytest.fixture(scope="session")
def examples() -> int:
    return settings.default.max_examples
