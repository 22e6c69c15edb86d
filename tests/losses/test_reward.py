"""The reward model's loss and its gradient, against the formula in sixty digits."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.losses import reward_loss

SCORES = st.one_of(st.floats(-20, 20), st.sampled_from([1e4, -1e4, 0.0]))


@given(
    rows=st.lists(st.tuples(SCORES, SCORES, st.floats(0, 3)), min_size=1, max_size=5),
    margin=st.booleans(),
    center=st.sampled_from([0.0, 0.01]),
)
def test_equals_the_formula(precise: Any, rows: Any, margin: bool, center: float) -> None:
    c = Decimal(center)

    def formula(x: Sequence[Decimal]) -> Decimal:
        gap = x[0] - x[1] - (x[2] if margin else 0)
        return -precise.log_sigmoid(gap) + c * (x[0] + x[1]) ** 2

    columns = [torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True)]
    chosen, rejected = (x.requires_grad_() for x in columns[:2])
    margins = columns[2] if margin else None
    each = reward_loss(chosen, rejected, margins, center, reduction="none")
    truth = [float(formula([Decimal(x) for x in row])) for row in rows]
    torch.testing.assert_close(each.tolist(), truth, rtol=1e-10, atol=1e-16)
    mean = reward_loss(chosen, rejected, margins, center)
    assert mean.item() == pytest.approx(sum(truth) / len(truth), rel=1e-10, abs=1e-16)
    found = torch.autograd.grad(each.sum(), (chosen, rejected))
    slopes = [precise.gradient(formula, row) for row in rows]
    for k, column in enumerate(found):
        torch.testing.assert_close(column.tolist(), [s[k] for s in slopes], rtol=1e-9, atol=1e-15)


def test_what_is_refused() -> None:
    z = torch.zeros(2)
    with pytest.raises(ValueError, match=r"center must be 0 or more; got -0.1"):
        reward_loss(z, z, center=-0.1)
    with pytest.raises(ValueError, match=r"margin must have the shape of chosen, \(2,\)"):
        reward_loss(z, z, z[:1])
