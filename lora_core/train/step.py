"""One optimizer step: forward and backward over a few batches, one update.

The loss of each batch is its sum divided by the graded tokens of the *whole step*, so the gradients
of the batches add up to the gradient of the mean over all of them, however the rows were cut, and
on however many processes they were computed (ranks.py).
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from lora_core.device import DtypePolicy
from lora_core.losses import IGNORE, count_graded, token_mean
from lora_core.models import EncoderModel
from lora_core.train.batches import Batch, to_device, tokens_in
from lora_core.train.parts import whole
from lora_core.train.ranks import RankError, Ranks
from lora_core.train.surgery import StepSurgery
from lora_core.train.units import Reach, count_by_unit, unit_of


class LossResult(NamedTuple):
    """A batch's loss, and what is reported beside it."""

    value: Tensor
    """sum over the batch / normalizer, a scalar"""
    rows: Tensor | None = None
    """each row's sum (B,), or each token's loss (B, T), without a gradient: reported by source"""
    figures: Mapping[str, tuple[float | Tensor, float]] = {}
    """name -> (sum, count): the record gets the sum over the step's batches / their count, and
    nothing where the count is 0. A loss that reports any reports one at least with every batch"""


Loss = Callable[[nn.Module, Batch, float], "Tensor | tuple[Tensor, Tensor] | LossResult"]
"""(model, batch, normalizer) -> the batch's sum / normalizer, a scalar; or a `LossResult`, or its
first two entries. The normalizer is the sum of `loss.count(batch)` over the step's batches; a loss
without `count` is taken to count graded tokens. One with `unit(batch)` counts several things, and
gets the sum over the step's batches of the same unit (units.py)."""


class NonFiniteError(ValueError):
    """A loss or a gradient that is NaN or infinite; holds the batches it came from."""

    def __init__(self, message: str, batches: Sequence[Batch]) -> None:
        super().__init__(message)
        self.batches = list(batches)


@dataclass(frozen=True)
class CausalLoss:
    """Next-token cross-entropy of a module that returns `.logits`, by row for reporting."""

    label_smoothing: float = 0.0
    """share of each target spread over the vocabulary"""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Any], normalizer: float
    ) -> tuple[Tensor, Tensor]:
        """Run the model on every tensor of the batch, and judge it.

        A model that `grades` does so itself, without holding its logits (models/decoder.py); of any
        other the logits are taken whole.
        """
        inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
        inner = getattr(model, "module", model)
        if isinstance(inner, EncoderModel):
            raise ValueError(
                f"next-token cross-entropy is no loss of an encoder ({type(inner).__name__}): give "
                "loss=, a function (model, batch, normalizer) that returns the batch's sum divided "
                "by the normalizer"
            )
        if "document_ids" in inputs:
            inputs = _packed(model, inputs)
        grading: dict[str, Any] = {
            "normalizer": normalizer,
            "label_smoothing": self.label_smoothing,
        }
        if getattr(getattr(model, "module", model), "grades", False):
            labels = batch["labels"].clone()
            labels[:, 0] = IGNORE  # nothing predicts it, unless a soft prompt stands before it
            out = model(**inputs, **grading, labels=labels, keep_logits=False)
            return out.loss, _by_row(out.token_losses, batch)
        logits = model(**inputs).logits  # (B, T, V)
        loss, by_token = token_mean(logits, batch["labels"], **grading)
        return loss, _by_row(by_token, batch)

    def count(self, batch: Batch) -> float:
        """The batch's graded tokens, counted after the shift."""
        if not isinstance(batch, Mapping) or "labels" not in batch:
            held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"graded tokens are counted in the batch's labels, but it holds {held}: give "
                "input_ids and labels, or a loss with a method count(batch)"
            )
        return count_graded(batch["labels"])


def _packed(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that a model takes of a packed batch; ValueError if it would mix documents."""
    module = getattr(model, "module", model)
    names = inspect.signature(module.forward).parameters
    if "document_ids" not in names:
        raise ValueError(
            "packed rows need a model that keeps documents apart by document_ids; "
            f"{type(module).__name__}.forward has no such argument: leave packing out"
        )
    return {k: v for k, v in inputs.items() if k != "document_bounds" or k in names}


def _by_row(losses: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Each row's sum (B,), or of packed rows the tokens' losses (B, T) as they are."""
    return losses if "document_ids" in batch else losses.sum(dim=1)


def train_step(  # noqa: PLR0913  # a step's parts, each with a default
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    policy: DtypePolicy,
    *,
    loss: Loss,
    clip: float | None = 1.0,
    check: bool | Reach = True,
    ranks: Ranks | None = None,
    surgery: StepSurgery | None = None,
) -> dict[str, Any]:
    """Update the weights once.

    Args:
        model: any module the loss can call.
        parameters: the trained ones, by name.
        batches: the step's batches, on any device; all of them on every process.
        optimizer: holds `parameters`; its learning rate is set already.
        scaler: of the loss, enabled for float16 alone.
        policy: where and in which dtype to compute.
        loss: see `Loss`.
        clip: largest norm of the gradient, or None.
        check: refuse a trained parameter without a gradient. The loop checks its first step (the
            first ones, of a loss of several units): later an expert may get no token, or an
            adapter no row.
        ranks: the processes that share the batches; by default there is this one.
        surgery: changes the gradients between the backward passes and the update (surgery.py).

    Returns:
        loss (mean over graded tokens; the units' means summed), grad_norm (before clipping),
        graded, tokens, `loss/<source>` where the batches name their rows' sources, and the figures
        of the loss and of the surgery.

    Raises:
        NonFiniteError: the loss or the gradient is NaN or infinite; the weights did not move.
        RankError: it is so on another process, which says more.
        ValueError: a trained parameter got no gradient, or surgery on several processes.
    """
    ranks = ranks or Ranks()
    if surgery is not None and ranks.world > 1:
        raise ValueError(
            f"gradient surgery works on one process, and there are {ranks.world}: start without "
            "torchrun, or leave it out"
        )
    graded = count_by_unit(loss, counter(loss), batches)
    own, by_source, figures, failure = 0.0, SourceMeans(), Figures(), None
    by_source.expect(batches)
    for batch, counts in ranks.own(batches):
        moved = to_device(batch, policy.device)
        with policy.autocast():
            normalizer = graded[unit_of(loss, batch)]
            value, rows, named = loss_result(loss(model, moved, normalizer))
        figures.add(named, counts)
        if not counts:
            value, rows = value * 0, None
        number = value.item()
        if not math.isfinite(number):
            # others wait for this one's gradients: it goes on, and all stop together
            failure = failure or NonFiniteError(f"the loss is {number}", [batch])
            if ranks.world == 1:
                break
        torch.autograd.backward(scaler.scale(value))
        if surgery is not None:
            surgery.take(batch)
        own += number
        by_source.add(batch, rows)
    ranks.agree(failure)
    total = by_source.over(ranks, own)
    figures.over(ranks)
    ranks.reduce_gradients(parameters.values())
    operated = {} if surgery is None else surgery.finish()
    if check:
        (Reach(loss) if check is True else check).see(batches, parameters)
    scaler.unscale_(optimizer)
    norm = clip_gradients(parameters.values(), clip)
    # with loss scaling an overflow is expected now and then: the scaler skips the step and halves
    if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
        error = NonFiniteError(f"the gradient's norm is {norm}", batches)
        # the sum is everybody's: one is enough to say so and to write the batches
        raise error if ranks.first else RankError(f"rank 0: {error}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(tokens_in(batch) for batch in batches)
    return {
        "loss": total,
        "grad_norm": norm if math.isfinite(norm) else None,
        "graded": sum(graded.values()),
        "tokens": tokens,
        **by_source.means(),
        **figures.means(),
        **operated,
    }


def counter(loss: Loss) -> Callable[[Batch], float]:
    """What a loss counts in a batch: its own `count`, else graded tokens."""
    return getattr(loss, "count", CausalLoss().count)


def loss_result(result: Tensor | tuple[Tensor, Tensor] | LossResult) -> LossResult:
    """What a loss returned, with nothing in the places of what it left out."""
    return LossResult(*result) if isinstance(result, tuple) else LossResult(result)


def clip_gradients(parameters: Iterable[nn.Parameter], clip: float | None) -> float:
    """Scale the gradients to a norm of at most `clip`.

    Args:
        parameters: with their gradients; those without one are left out.
        clip: the largest norm; None: measure only.

    Returns:
        The norm before.
    """
    moved = [p for p in parameters if p.grad is not None]
    if clip is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in moved if p.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(moved, clip)
    return float(whole(norm))


class Figures:
    """What a loss reports beside itself: sums and counts by name."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, named: Mapping[str, tuple[float | Tensor, float]], counts: bool = True) -> None:
        """Take a batch's figures; of one that does not count the names alone."""
        for name, (value, count) in named.items():
            pair = self.sums.setdefault(name, [0.0, 0.0])
            if counts and count:
                pair[0] += float(value)
                pair[1] += float(count)

    def over(self, ranks: Ranks) -> None:
        """Sum over all processes; names that another one has are added."""
        if ranks.world == 1 or not self.sums:
            return
        named: list[list[str]] = [[]] * ranks.world
        distributed.all_gather_object(named, list(self.sums))
        for name in (name for names in named for name in names):
            self.sums.setdefault(name, [0.0, 0.0])
        pairs = [self.sums[name] for name in sorted(self.sums)]
        summed = ranks.sum(*(number for pair in pairs for number in pair))
        for number, pair in enumerate(pairs):
            pair[:] = summed[2 * number : 2 * number + 2]

    def means(self, prefix: str = "") -> dict[str, float]:
        """`<prefix><name>` -> mean, of what was counted."""
        return {prefix + name: total / n for name, (total, n) in self.sums.items() if n}


class SourceMeans:
    """Mean loss per graded token for each source of the rows seen."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, batch: Batch, rows: Tensor | None) -> None:
        """Take the sums (B,) of a batch's rows; a batch that names no sources is passed over.

        Of packed rows it takes tokens' losses (B, T), and the sources are the documents'.
        """
        if rows is None or not isinstance(batch, Mapping) or "source" not in batch:
            return
        sums = self._sums(batch, rows)
        counts = self._sums(batch, F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1)))
        for source, value, n in zip(batch["source"], sums, counts, strict=True):
            pair = self.sums.setdefault(str(source), [0.0, 0])
            pair[0] += value
            pair[1] += n

    @staticmethod
    def _sums(batch: Mapping[str, Any], numbers: Tensor) -> list[float]:
        """Numbers (B,), or (B, T) summed by row or by document; padding has the id -1."""
        if numbers.dim() == 1:
            return numbers.tolist()
        ids = batch.get("document_ids")
        if ids is None:
            return numbers.sum(dim=1).tolist()
        # on the CPU, where the order of the sums is fixed
        sums = torch.zeros(len(batch["source"]) + 1, dtype=torch.float64)
        sums.index_add_(0, ids.cpu().flatten() + 1, numbers.cpu().double().flatten())
        return sums[1:].tolist()

    def expect(self, batches: Sequence[Batch]) -> None:
        """Learn the names of sources, those of other processes' batches too."""
        for batch in batches:
            for source in batch.get("source", ()) if isinstance(batch, Mapping) else ():
                self.sums.setdefault(str(source), [0.0, 0])

    def over(self, ranks: Ranks, total: float) -> float:
        """Sum over all processes, which expect the same sources; `total` is summed on the way."""
        if ranks.world == 1:
            return total
        pairs = [self.sums[source] for source in sorted(self.sums)]
        total, *summed = ranks.sum(total, *(number for pair in pairs for number in pair))
        for number, pair in enumerate(pairs):
            pair[:] = summed[2 * number : 2 * number + 2]
        return total

    def means(self, prefix: str = "loss/") -> dict[str, float]:
        """`<prefix><source>` -> mean, for sources with a graded token."""
        return {f"{prefix}{s}": total / n for s, (total, n) in sorted(self.sums.items()) if n}
