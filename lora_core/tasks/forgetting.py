r"""What a model forgets while it learns one task after another.

Trained on k tasks in turn and scored on all of them after each, a model gives a matrix: R[i][j] is
the score on task j after training on task i. Two figures sum it up, over the tasks before the last:

    forgetting           mean over j of  max_{i < k} R[i][j] − R[k][j]
    backward transfer    mean over j of  R[k][j] − R[j][j]

Forgetting compares with the best score there ever was, so it is rarely below 0; backward transfer
with the score right after the task was learned, so it is above 0 where later tasks helped.

The scores of R are means over held-out rows, and the rows are kept: intervals come from drawing the
rows anew, all stages of a row together, since the same rows are scored at each stage. Runs with
other seeds would spread further; the interval says what the rows allow.

Ref: Lopez-Paz and Ranzato 2017, arXiv:1706.08840, section 2 (R, backward transfer); Chaudhry et al.
2018, arXiv:1801.10112, section 3.2 (forgetting).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_core.evaluate.estimate import Estimate, bootstrap, mean, proportion

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Scores = Mapping[str, Sequence[float]]
"""Task -> its held-out rows' scores, higher is better, the same rows each time."""


def score(rows: Sequence[float]) -> Estimate:
    """A task's score: the mean of its rows, as a share where each is 0 or 1."""
    if set(rows) <= {0.0, 1.0}:
        return proportion(sum(rows), len(rows))
    return mean(rows)


def average_score(scores: Scores) -> Estimate:
    """The mean over tasks of their scores; every task counts alike."""
    return _over_tasks([scores], list(scores), lambda r: math.fsum(r[0]) / len(r[0]))


def forgetting(stages: Sequence[Scores]) -> Estimate:
    """How much worse tasks are in the end than they were at their best.

    Args:
        stages: after each task in the order of training, the scores of all; the keys of each are
            the tasks in that order.

    Returns:
        The mean over all tasks but the last, in units of the score; above 0 is loss.

    Raises:
        ValueError: fewer than two tasks, or not as many stages as tasks.
    """
    earlier = _checked(stages)

    def figure(r: list[list[float]]) -> float:
        lost = [max(r[i][j] for i in range(len(r) - 1)) - r[-1][j] for j in range(len(earlier))]
        return math.fsum(lost) / len(lost)

    return _over_tasks(stages, earlier, figure)


def backward_transfer(stages: Sequence[Scores]) -> Estimate:
    """How much better tasks are in the end than right after they were learned.

    Args:
        stages: as for `forgetting`.

    Returns:
        The mean over all tasks but the last, in units of the score; below 0 is loss.

    Raises:
        ValueError: as `forgetting`.
    """
    earlier = _checked(stages)

    def figure(r: list[list[float]]) -> float:
        return math.fsum(r[-1][j] - r[j][j] for j in range(len(earlier))) / len(earlier)

    return _over_tasks(stages, earlier, figure)


def _checked(stages: Sequence[Scores]) -> list[str]:
    """The tasks but the last; ValueError where the matrix is not square or has one task."""
    tasks = list(stages[0]) if stages else []
    if len(tasks) < 2 or len(stages) != len(tasks):
        raise ValueError(
            "forgetting takes two tasks or more and the scores after each of them; got "
            f"{len(tasks)} tasks and {len(stages)} stages"
        )
    return tasks[:-1]


def _over_tasks(
    stages: Sequence[Scores], tasks: Sequence[str], figure: Callable[[list[list[float]]], float]
) -> Estimate:
    """A figure of the matrix of means (stages, tasks), its rows resampled within the whole."""
    import numpy as np

    parts = [np.array([stage[task] for stage in stages], np.float64) for task in tasks]
    ends = np.cumsum([part.shape[1] for part in parts]).tolist()

    def statistic(drawn: "npt.NDArray[np.int64]") -> float:
        columns, start = [], 0
        for part, end in zip(parts, ends, strict=True):
            own = drawn[(drawn >= start) & (drawn < end)] - start
            if not len(own):  # this draw says nothing of the task
                return math.nan
            columns.append(part[:, own].mean(axis=1).tolist())
            start = end
        return figure([list(row) for row in zip(*columns, strict=True)])

    return bootstrap(ends[-1], statistic)
