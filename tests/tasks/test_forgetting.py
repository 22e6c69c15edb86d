"""Forgetting and backward transfer against the papers' formulas, on matrices worked by hand."""

import math

import pytest

from lora_core.tasks import average_score, backward_transfer, forgetting
from lora_core.tasks.forgetting import score

# R, tasks a, b, c in turn: a is best after b, b right after itself
R = [[0.8, 0.2, 0.1], [0.9, 0.7, 0.2], [0.5, 0.6, 0.9]]


def stages(rows: int = 40) -> list[dict[str, list[float]]]:
    """Rows whose means are R's entries, as many ones as it takes."""
    return [
        {
            t: [float(n < round(mean * rows)) for n in range(rows)]
            for t, mean in zip("abc", line, strict=True)
        }
        for line in R
    ]


def test_the_papers_formulas() -> None:
    lost = forgetting(stages())
    assert lost.value == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    moved = backward_transfer(stages())
    assert moved.value == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert average_score(stages()[-1]).value == pytest.approx((0.5 + 0.6 + 0.9) / 3)
    for estimate, count in ((lost, 80), (moved, 80), (average_score(stages()[-1]), 120)):
        assert estimate.low < estimate.value < estimate.high
        assert estimate.count == count


def test_every_task_counts_alike_however_many_rows_it_has() -> None:
    uneven = {"a": [1.0] * 90 + [0.0] * 10, "b": [1.0, 0.0] * 2}
    assert average_score(uneven).value == pytest.approx((0.9 + 0.5) / 2)


def test_rows_are_resampled_with_all_their_stages() -> None:
    """The same rows right before and after: nothing is forgotten, and the interval knows it."""
    same = [{"a": [1.0, 0.0] * 10, "b": [0.5] * 4}] * 2
    estimate = backward_transfer(same)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_learning_more_later_is_no_forgetting() -> None:
    better = [{"a": [0.0] * 5, "b": [0.0] * 5}, {"a": [1.0] * 5, "b": [1.0] * 5}]
    assert forgetting(better).value == -1
    assert backward_transfer(better).value == 1


def test_scores_of_one_kind_and_of_another() -> None:
    assert score([1.0, 0.0, 1.0, 1.0]).method == "wilson"
    assert score([0.5, 0.0]).method == "bootstrap"
    assert math.isnan(score([0.5]).low)


def test_what_is_no_matrix_is_refused() -> None:
    for bad, told in (([], "0 tasks and 0"), ([{"a": [1.0]}], "1 tasks and 1")):
        for figure in (forgetting, backward_transfer):
            with pytest.raises(ValueError, match=f"two tasks or more .* got {told} stages"):
                figure(bad)
    with pytest.raises(ValueError, match="got 3 tasks and 1 stages"):
        forgetting(stages()[:1])
