r"""Perplexity over graded tokens: exp(Σ NLL / Σ tokens), both sums over the whole data set.

The exponential of a mean of batches' means, as often printed, weighs a token by how few its batch
has, and depends on the batch size. Perplexities of two models compare only where the tokens are the
same; bits per byte divides by the text's bytes instead and compares across tokenizers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.data import collate
from lora_core.losses import IGNORE, shift_labels, token_cross_entropy


@dataclass(frozen=True)
class Perplexity:
    """Sums over a data set, and the measures made of them."""

    nll: float
    """summed -log p of the graded tokens, in nats"""
    tokens: int
    """graded tokens"""
    correct: int
    """graded tokens that were the model's first choice"""

    @property
    def loss(self) -> float:
        """Nats per graded token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinity beyond the range of a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of graded tokens that were the model's first choice, in [0, 1]."""
        return self.correct / self.tokens

    def bits_per_byte(self, graded_bytes: int) -> float:
        """Bits per byte of the graded text.

        Args:
            graded_bytes: UTF-8 bytes of the text that the graded tokens stand for.

        Returns:
            Σ NLL / (ln 2 · bytes).

        Raises:
            ValueError: no bytes.
        """
        if graded_bytes < 1:
            raise ValueError(f"graded_bytes must be 1 or more; got {graded_bytes}")
        return self.nll / math.log(2) / graded_bytes


def as_batches(data: Iterable[Mapping[str, Any]], batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Batches of `data`: rows are put together `batch_size` at a time, batches pass through."""
    rows: list[Mapping[str, Any]] = []
    for item in data:
        if getattr(item["input_ids"], "ndim", 1) == 2:
            yield item
            continue
        rows.append(item)
        if len(rows) == batch_size:
            yield collate(rows)
            rows = []
    if rows:
        yield collate(rows)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
) -> Perplexity:
    """Judge a model on graded tokens.

    Args:
        model: returns `.logits` (B, T, V); it is put into eval mode for the time, dropout off.
        data: rows `{"input_ids", "labels"}`, or batches of tensors under those names (B, T), with
            anything else the model takes.
        batch_size: rows in one forward pass.

    Returns:
        The sums; `.perplexity`, `.loss`, `.accuracy` and `.bits_per_byte(n)`.

    Raises:
        ValueError: no token is graded.
    """
    was_training = model.training
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    nll, tokens, correct = 0.0, 0, 0
    try:
        for batch in as_batches(data, batch_size):
            moved = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            labels = moved.pop("labels")  # (B, T)
            logits = model(**moved).logits  # (B, T, V)
            # summed in float64: a data set has more tokens than float32 has digits for
            nll += float(token_cross_entropy(logits, labels).sum(dtype=torch.float64))
            targets = shift_labels(labels)
            graded = targets != IGNORE
            tokens += int(graded.sum())
            correct += int(((logits.argmax(dim=-1) == targets) & graded).sum())
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError("no token of the data is graded, so it has no perplexity")
    return Perplexity(nll, tokens, correct)
