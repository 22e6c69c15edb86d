r"""Perplexity over graded tokens: exp(Σ NLL / Σ tokens), both sums over the whole data set.

The exponential of a mean of batches' means, as often printed, weighs a token by how few its batch
has, and depends on the batch size. Perplexities of two models compare only where the tokens are the
same; bits per byte divides by the text's bytes instead and compares across tokenizers.

Each row's sums are kept, since the tokens of a row belong together: intervals resample rows, and
two models on the same rows are compared row by row (retention.py). A model's logits are there
whole, one batch at a time; what is made of them (float32 copies, the first choice) is made for some
rows at a time.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.data import collate
from lora_core.evaluate.estimate import Estimate, ratio
from lora_core.losses import IGNORE, shift_labels, token_cross_entropy

_LOGITS_AT_ONCE = 1 << 24  # 64 MiB in float32


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of the graded tokens of a data set."""

    loss: float
    """nats per graded token: nll / tokens"""
    perplexity: float
    """exp(loss); infinity beyond the range of a float"""
    accuracy: float
    """share of graded tokens that were the model's first choice, in [0, 1]"""
    tokens: int
    """graded tokens"""
    nll: float
    """summed -log p of the graded tokens, in nats"""
    bits_per_byte: float | None
    """nll / (ln 2 · bytes of graded text), where the bytes were given"""
    row_nll: tuple[float, ...] = field(default=(), repr=False)
    """each row's summed -log p, in nats"""
    row_tokens: tuple[int, ...] = field(default=(), repr=False)
    """each row's graded tokens"""
    row_correct: tuple[int, ...] = field(default=(), repr=False)
    """of these, how many were the model's first choice"""
    row_bytes: tuple[int, ...] | None = field(default=None, repr=False)
    """UTF-8 bytes of each row's graded text, where the rows said it"""
    graded_bytes: int | None = None
    """of all rows together, where they were given"""

    def estimates(self) -> dict[str, Estimate]:
        """The measures with their intervals, rows resampled.

        Returns:
            loss, perplexity, accuracy, and bits_per_byte where the bytes are known. Where they are
            known in sum alone, a row's bytes are taken as proportional to its tokens.

        Raises:
            ValueError: no row's sums are kept, as in an object made by hand.
        """
        if not self.row_nll:
            raise ValueError("intervals need each row's sums: take them from perplexity()")
        loss = ratio(self.row_nll, self.row_tokens, unit="tokens")
        found = {
            "loss": loss,
            "perplexity": loss.map(exp_nats),
            "accuracy": ratio(self.row_correct, self.row_tokens, unit="tokens"),
        }
        if self.row_bytes is not None:
            bits = [nats / math.log(2) for nats in self.row_nll]
            found["bits_per_byte"] = ratio(bits, self.row_bytes, unit="bytes")
        elif self.graded_bytes is not None:
            scale = self.tokens / self.graded_bytes / math.log(2)  # of nats per token to bits
            found["bits_per_byte"] = loss.map(lambda nats: nats * scale)
        return found


def as_batches(data: Iterable[Mapping[str, Any]], batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Batches of `data`: rows are put together `batch_size` at a time, batches pass through."""
    rows: list[Mapping[str, Any]] = []
    for item in data:
        if not {"input_ids", "labels"} <= item.keys():
            raise ValueError(f"data to judge needs input_ids and labels; got {sorted(item)}")
        if getattr(item["input_ids"], "ndim", 1) == 2:
            yield item
            continue
        rows.append(item)
        if len(rows) == batch_size:
            yield _together(rows)
            rows = []
    if rows:
        yield _together(rows)


def _together(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    batch = collate(rows)
    if any("graded_bytes" in row for row in rows):
        batch["graded_bytes"] = torch.tensor([row.get("graded_bytes", -1) for row in rows])  # (B,)
    return batch


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After the block every module is in the mode (train or eval) it was in before.

    Args:
        model: any module; a part that was put in eval by itself stays so.

    Yields:
        None.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def perplexity(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    graded_bytes: int | None = None,
) -> Perplexity:
    """Judge a model on graded tokens.

    Args:
        model: returns `.logits` (B, T, V); it is put into eval mode for the time, dropout off.
        data: rows `{"input_ids", "labels"}`, or batches of tensors under those names (B, T), with
            anything else the model takes. `graded_bytes` beside them, an integer a row or a tensor
            (B,), says how many UTF-8 bytes of text a row's graded tokens stand for.
        batch_size: rows in one forward pass.
        graded_bytes: the bytes of all rows together, where the rows do not say.

    Returns:
        The measures, each over the whole data set.

    Raises:
        ValueError: rows without labels, no graded token, a NaN for a loss, `batch_size` or
            `graded_bytes` below 1, or bytes that some rows alone say or that are said twice.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    if graded_bytes is not None and graded_bytes < 1:
        raise ValueError(f"graded_bytes must be 1 or more; got {graded_bytes}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums = _Sums()
    with modes_kept(model):
        model.eval()
        for batch in as_batches(data, batch_size):
            moved = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            labels = moved.pop("labels")  # (B, T)
            sums.note_bytes(moved.pop("graded_bytes", None))
            sums.add(model(**moved).logits, labels)
    return sums.measures(graded_bytes)


def row_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch's rows add up to.

    Args:
        logits: (B, T, V), any floating dtype.
        labels: integers (B, T), unshifted, -100 where not graded.

    Returns:
        Per row, (B,) each: summed -log p in nats, float64; graded tokens; how many of them were
        the model's first choice.
    """
    targets = shift_labels(labels)  # (B, T)
    graded = targets != IGNORE
    nll, right = [], []
    step = max(1, _LOGITS_AT_ONCE // max(1, logits[0].numel()))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        # summed in float64: a data set has more tokens than float32 has digits for
        nll.append(token_cross_entropy(logits[part], labels[part]).sum(1, dtype=torch.float64))
        right.append(((logits[part].argmax(dim=-1) == targets[part]) & graded[part]).sum(1))
    return torch.cat(nll), graded.sum(1), torch.cat(right)


class _Sums:
    """Sums of rows, as batches come."""

    def __init__(self) -> None:
        self.nll: list[float] = []
        self.tokens: list[int] = []
        self.correct: list[int] = []
        self.bytes: list[int] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        nll, tokens, correct = row_sums(logits, labels)
        self.nll += nll.tolist()
        self.tokens += tokens.tolist()
        self.correct += correct.tolist()

    def note_bytes(self, counts: Tensor | None) -> None:
        self.bytes += [] if counts is None else counts.tolist()

    def measures(self, graded_bytes: int | None) -> Perplexity:
        tokens, nll = sum(self.tokens), math.fsum(self.nll)
        if tokens == 0:
            raise ValueError("no token of the data is graded, so it has no perplexity")
        if math.isnan(nll):
            raise ValueError(
                f"the loss over {tokens} graded tokens is NaN: the weights or the adapter hold "
                "NaN, or the dtype is too narrow for the logits"
            )
        in_all = self._bytes(graded_bytes)
        return Perplexity(
            loss=nll / tokens,
            perplexity=exp_nats(nll / tokens),
            accuracy=sum(self.correct) / tokens,
            tokens=tokens,
            nll=nll,
            bits_per_byte=None if in_all is None else nll / math.log(2) / in_all,
            row_nll=tuple(self.nll),
            row_tokens=tuple(self.tokens),
            row_correct=tuple(self.correct),
            row_bytes=tuple(self.bytes) or None,
            graded_bytes=in_all,
        )

    def _bytes(self, graded_bytes: int | None) -> int | None:
        """Bytes of the graded text, None where nobody says."""
        if not self.bytes:
            return graded_bytes
        if graded_bytes is not None:
            raise ValueError("the rows say their graded_bytes themselves: leave the sum out")
        if len(self.bytes) != len(self.nll) or min(self.bytes) < 0 or not any(self.bytes):
            raise ValueError(
                f"graded_bytes must be an integer in each row, 0 or more, and above 0 in one; got "
                f"{self.bytes[:8]} for the first of {len(self.nll)} rows (-1: absent)"
            )
        return sum(self.bytes)


def exp_nats(nats: float) -> float:
    """exp, and infinity from where it overflows a float (710)."""
    return math.inf if nats >= 709 else math.exp(nats)  # NaN, an interval's absent end, stays
