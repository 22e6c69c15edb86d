"""Evaluation within a run: when it is due, what it measures, and what follows from it.

The loss is the sum over all graded tokens of the evaluation data, divided by their number: a mean
of batches' means would weigh a short batch's tokens more. (Of a loss of several units, the sum of
each unit's mean.) The best evaluation's weights come back
at the end of the run, from its checkpoint, or from memory where the run has no folder.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.device import DtypePolicy
from lora_core.train.batches import BatchSource, ReadyBatches, to_device
from lora_core.train.config import TrainConfig
from lora_core.train.ranks import Ranks
from lora_core.train.report import Record
from lora_core.train.snapshot import restore_weights
from lora_core.train.sources import batched
from lora_core.train.state import Checkpoints, Loaded, Progress
from lora_core.train.step import (
    Figures,
    Loss,
    NonFiniteError,
    SourceMeans,
    counter,
    loss_result,
)
from lora_core.train.units import count_by_unit, unit_of


@dataclass
class Evaluation:
    """The evaluations of one run."""

    source: BatchSource | None
    """data to evaluate on, in their own order; None: there are none"""
    loss: Loss
    """without label smoothing"""
    config: TrainConfig
    """eval_every, patience, keep_best and out are used"""
    best_weights: dict[str, Tensor] | None = None
    """those of the best evaluation, where no folder keeps them"""

    def check(self) -> None:
        """Find out now, not after an epoch, that there is nothing to evaluate on.

        Raises:
            ValueError: data that can be read only once, or that grade nothing.
        """
        source = self.source
        if source is None:
            return
        if isinstance(source, ReadyBatches) and isinstance(source.batches, Iterator):
            raise ValueError(
                "the evaluation data can be read only once and are read at each evaluation: "
                "give a list, or an object that can be iterated again"
            )
        if not any(map(counter(self.loss), source.epoch(0))):
            raise ValueError("no token of the evaluation data is graded, so it has no loss")

    def due(self, progress: Progress, epoch_ends: bool) -> bool:
        """Whether to evaluate after the step just done."""
        if self.source is None:
            return False
        every = self.config.eval_every
        if every is None:
            return epoch_ends
        return progress.step >= progress.total or progress.step % every == 0

    @torch.no_grad()
    def measure(self, model: nn.Module, policy: DtypePolicy, ranks: Ranks) -> Record:
        """Mean loss over all graded tokens: sum of sums / sum of counts, unit by unit.

        Args:
            model: evaluated in eval mode, left in training mode.
            policy: where and in which dtype to compute.
            ranks: the processes that share the batches.

        Returns:
            eval_loss, `eval_loss/<source>` where the batches name their rows' sources, and
            `eval_<figure>` of the loss's own figures.

        Raises:
            NonFiniteError: a batch's loss is NaN or infinite.
        """
        assert self.source is not None  # it is due only where there is one
        graded: dict[str, float] = {}
        own: dict[str, float] = {}
        by_source, figures = SourceMeans(), Figures()
        failure: NonFiniteError | None = None
        model.eval()
        for group in batched(self.source.epoch(0), ranks.world):
            for unit, count in count_by_unit(self.loss, counter(self.loss), group).items():
                graded[unit] = graded.get(unit, 0) + count
                own.setdefault(unit, 0.0)
            by_source.expect(group)
            for batch, counts in ranks.own(group):
                moved = to_device(batch, policy.device)
                with policy.autocast():
                    value, rows, named = loss_result(self.loss(model, moved, 1))
                figures.add(named, counts)
                number = value.item()
                if not math.isfinite(number):
                    failure = failure or NonFiniteError(f"the evaluation loss is {number}", [batch])
                if counts:
                    own[unit_of(self.loss, batch)] += number
                    by_source.add(batch, rows)
            if failure is not None and ranks.world == 1:
                break
        ranks.agree(failure)
        sums = zip(own, ranks.sum(*own.values()), strict=True)
        total = sum(value / graded[unit] for unit, value in sums if graded[unit])
        by_source.over(ranks, 0.0)
        figures.over(ranks)
        model.train()
        measured = {"eval_loss": total} | by_source.means("eval_loss/")
        return measured | figures.means("eval_")

    def note(self, loss: float, progress: Progress, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Write down what follows from an evaluation.

        Args:
            loss: it measured.
            progress: gets the best loss and its step, and whether patience ran out.
            parameters: the trained ones, by name.

        Returns:
            Whether this is the best evaluation so far.
        """
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.since_best = loss, progress.step, 0
            if self.config.out is None and self.config.keep_best:
                self.best_weights = {k: p.detach().clone() for k, p in parameters.items()}
            return True
        progress.since_best += 1
        progress.stopped_early = self.out_of_patience(progress)
        return False

    def out_of_patience(self, progress: Progress) -> bool:
        """Whether there were too many evaluations without a better loss."""
        patience = self.config.patience
        return patience is not None and progress.since_best >= patience

    def put_back_best(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        checkpoints: Checkpoints | None,
    ) -> None:
        """Give the model the weights of the best evaluation.

        Args:
            progress: of the finished run.
            parameters: the trained ones, by name.
            checkpoints: where the weights are; None: in memory.
        """
        best = progress.best_step
        if best is None or best == progress.step:
            return
        if checkpoints is None:
            weights, where = self.best_weights, Path("memory")
        else:
            where = checkpoints.path(best)
            try:
                weights = Loaded.read(where).weights
            except (ValueError, OSError) as error:
                warnings.warn(
                    f"the best checkpoint, {where.name}, is damaged ({error}); the model keeps the "
                    "weights of the last step",
                    stacklevel=2,
                )
                return
        assert weights is not None  # kept when the evaluation was made
        restore_weights(parameters, weights, where)
