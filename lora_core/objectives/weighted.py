r"""Reward-weighted likelihood: a row's tokens count by how good the row was found to be.

    L = − Σ_rows w(r) Σ_t log π(y_t | x, y_<t) / (graded tokens of the step)

    w(r) ∝ exp((r − max r) / β)     "exp": the exponentiated reward
    w(r) ∝ r                        "reward": the reward itself, where none is below 0

Weights have the mean 1 over the rows that are trained on, so that the loss and the learning rate
keep their size. The step is divided by its tokens and not by their weights: a step of bad rows then
moves little, as it should, and the sum over an epoch is the sum over the data whatever rows share a
step. Dividing by the step's own weights would have a step of bad rows count as much as a good one.

What a small β costs is said as the effective number of rows, (Σ w)² / Σ w².

Ref: Peters & Schaal 2007, "Reinforcement learning by reward-weighted regression for operational
space control", eq. 8; Peng et al. 2019, arXiv:1910.00177, eq. 7 (exp of the advantage over β; here
the baseline is a constant, which the normalizing takes out).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_core.data import Rows
from lora_core.data.branches import IGNORED, PADDED, Branched, branch_batch
from lora_core.data.lines import read_rows
from lora_core.data.records import rename_columns
from lora_core.objectives.scoring import completion_log_probs
from lora_core.train.step import LossResult


def read_row_rewards(path: str, columns: Mapping[str, str] | None = None) -> dict[str, float]:
    """The reward of each row of a JSON Lines file, by its file:line.

    Args:
        path: the file.
        columns: this library's name to the file's, {"reward": "score"}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: file:line of a row whose reward is missing or no finite number.
    """
    return dict(_rewards(path, columns or {}))


def _rewards(path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    for where, held in read_rows(path):
        row = rename_columns(held, columns, where)
        if "reward" not in row:
            raise ValueError(
                f"{where}: no reward; keys are {sorted(row)}: rows of prompt, completion and "
                "reward are weighted by it (another name: --columns reward=score); prompts alone "
                "need --reward FILE.py:FUNCTION"
            )
        value = row["reward"]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{where}: reward must be a finite number; got {value!r:.60}")
        yield where, float(value)


def reward_weights(
    rewards: Sequence[float], kind: Literal["exp", "reward"] = "exp", beta: float = 1.0
) -> list[float]:
    """Weights of rows by their rewards, their mean 1.

    Args:
        rewards: one a row.
        kind: see the module.
        beta: of "exp", in the reward's unit; above 0.

    Raises:
        ValueError: no rows; or for "reward" one below 0, or all of them 0.
    """
    if not rewards:
        raise ValueError("no rewards: weights need a row")
    if kind == "exp":
        best = max(rewards)
        raw = [math.exp((reward - best) / beta) for reward in rewards]
    elif (least := min(rewards)) < 0:
        raise ValueError(
            f"weights by the reward itself need rewards of 0 or more; the least is {least:g}: "
            "choose --weights exp"
        )
    else:
        raw = list(rewards)
    mean = sum(raw) / len(raw)
    if mean == 0:
        raise ValueError("every reward is 0, so that every weight is: there is nothing to learn")
    return [weight / mean for weight in raw]


def effective_rows(weights: Sequence[float]) -> float:
    """How many equally weighted rows are worth as much, (Σ w)² / Σ w²."""
    return sum(weights) ** 2 / sum(weight * weight for weight in weights)


class WeightedRows(Sequence[dict[str, Any]]):
    """Rows with their weights.

    Args:
        rows: tokenised rows.
        weights: one a row.
    """

    def __init__(self, rows: Rows, weights: Sequence[float]) -> None:
        self.rows, self.weights = rows, list(weights)
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {**self.rows[index], "weight": self.weights[index]}


def weighted_batch(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Tensor]:
    """A batch of weighted rows: `branch_batch`'s tensors, one completion a row, and `weights` (B,).

    Args:
        rows: `input_ids` and `labels` (-100 where not graded) of T each, and `weight`.
        pad_id: stands in the padding, which nothing sees.
    """
    batch = branch_batch([_branched(row) for row in rows], shared=False, pad_id=pad_id)
    return batch | {"weights": torch.tensor([row["weight"] for row in rows])}


def _branched(row: Mapping[str, Any]) -> Branched:
    """A row as its first token and the rest: what is graded is told by flags."""
    ids, labels = row["input_ids"], row["labels"]
    flags = tuple(label != IGNORED for label in labels[1:])
    return Branched(tuple(ids[:1]), (tuple(ids[1:]),), (flags,))


class WeightedLoss:
    """Negative log-likelihood of graded tokens, each row's times its weight."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], normalizer: float) -> LossResult:
        """Σ_rows weight · Σ_t −log π / normalizer; each row's own, unweighted, is reported."""
        log_probs, _ = completion_log_probs(model, batch)  # (B, L)
        rows = -log_probs.sum(dim=1)  # (B,)
        weights = batch["weights"].to(rows)
        tokens = float(self.count(batch))
        plain = rows.detach()
        figures = {
            "nll": (plain.sum(), tokens),
            "weight": (weights.sum(), float(len(weights))),
        }
        return LossResult((weights * rows).sum() / normalizer, plain, figures)

    def count(self, batch: Mapping[str, Any]) -> float:
        """The batch's graded tokens."""
        return int((batch["completions"] != PADDED).sum())
