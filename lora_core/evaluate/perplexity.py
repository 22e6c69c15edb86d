r"""Perplexity over graded tokens: exp(Σ NLL / Σ tokens), both sums over the whole data set.

The exponential of a mean of batches' means, as often printed, weighs a token by how few its batch
has, and depends on the batch size. Perplexities of two models compare only where the tokens are the
same; bits per byte divides by the text's bytes instead and compares across tokenizers.
"""

import contextlib
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
            yield collate(rows)
            rows = []
    if rows:
        yield collate(rows)


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
            anything else the model takes.
        batch_size: rows in one forward pass.
        graded_bytes: UTF-8 bytes of the text that the graded tokens stand for.

    Returns:
        The measures, each over the whole data set.

    Raises:
        ValueError: rows without labels, no graded token, a NaN for a loss, or `batch_size` or
            `graded_bytes` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    if graded_bytes is not None and graded_bytes < 1:
        raise ValueError(f"graded_bytes must be 1 or more; got {graded_bytes}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    nll, tokens, correct = 0.0, 0, 0
    with modes_kept(model):
        model.eval()
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
    if tokens == 0:
        raise ValueError("no token of the data is graded, so it has no perplexity")
    if math.isnan(nll):
        raise ValueError(
            f"the loss over {tokens} graded tokens is NaN: the weights or the adapter hold NaN, or "
            "the dtype is too narrow for the logits"
        )
    return Perplexity(
        loss=nll / tokens,
        # exp overflows a float from 710 on
        perplexity=math.exp(nll / tokens) if nll / tokens < 709 else math.inf,
        accuracy=correct / tokens,
        tokens=tokens,
        nll=nll,
        bits_per_byte=None if graded_bytes is None else nll / math.log(2) / graded_bytes,
    )
