"""Schedules against their closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.train import make_schedule


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 300),
    st.one_of(st.floats(0, 0.99), st.integers(1, 20)),
    st.floats(0, 1),
)
def test_closed_form(shape: str, total: int, warmup: float, floor: float) -> None:
    factor = make_schedule(shape, warmup, floor)
    ramp = round(warmup * total) if warmup < 1 else warmup
    for step in range(total):
        if step < ramp:
            expected = (step + 1) / ramp
        else:
            p = (step - ramp) / (total - ramp)
            expected = {
                "cosine": floor + (1 - floor) * (1 + math.cos(math.pi * p)) / 2,
                "linear": floor + (1 - floor) * (1 - p),
                "constant": 1.0,
            }[shape]
        assert factor(step, total) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert 0 < factor(step, total) <= 1 or (floor == 0 and step >= ramp)


def test_the_first_step_moves_and_the_peak_is_reached() -> None:
    factor = make_schedule("cosine", warmup=4)
    assert [factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(99, 100) > 0


def test_past_the_end_it_stays_at_the_floor() -> None:
    assert make_schedule("linear", 0, 0.1)(500, 100) == pytest.approx(0.1)


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of cosine, linear, constant; got"):
        make_schedule("sine")
