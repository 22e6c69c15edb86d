"""The base in 4 bits without training: its perplexity on general text, and its weights' error.

Each window of the text is a row of a paired comparison: two formats are judged on the same tokens,
so that the difference is known far better than either figure. Layers are made dense again after
they are quantized: the numbers are those of the codes, and the products are as fast as can be.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.papers.claim import Settings
from benchmarks.papers.task import general_losses
from lora_core.checkpoint import load_model
from lora_core.evaluate.estimate import Estimate, ratio
from lora_core.evaluate.perplexity import Perplexity
from lora_core.quant import dequantize_model, quantize_model


@dataclass(frozen=True)
class Format:
    """How the base's linear layers are held; code None: dense."""

    code: str | None
    block_size: int = 64
    double_quant: bool = False

    def __str__(self) -> str:
        if self.code is None:
            return "dense"
        return self.code.upper() + (" + DQ" if self.double_quant else "")


DENSE = Format(None)


@dataclass(frozen=True)
class Measured:
    """A base in one format."""

    found: Perplexity
    """on the general text, with each window's sums"""
    error: float
    """‖W - Q‖ / ‖W‖ over all layers that were quantized; 0 for a dense base"""

    @property
    def perplexity(self) -> Estimate:
        """With windows resampled."""
        return self.found.estimates()["perplexity"]


@functools.lru_cache(maxsize=64)
def measured(settings: Settings, form: Format) -> Measured:
    """Quantize the base, and judge it; once a process."""
    model = load_model(settings.model, dtype=torch.float32)
    error = 0.0 if form.code is None else quantize(model, form)
    return Measured(general_losses(model, settings), error)


@torch.no_grad()
def quantize(model: nn.Module, form: Format) -> float:
    """Put what a format leaves of each linear weight in its place; ‖W - Q‖ / ‖W‖ of them all."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}
    options: dict[str, Any] = {"block_size": form.block_size, "double_quant": form.double_quant}
    quantize_model(model, code=str(form.code), **options)
    wrong = norm = 0.0
    layers = set(dequantize_model(model, torch.float32))
    for name, weight in model.named_parameters():
        if name.rpartition(".")[0] in layers and name in before:
            wrong += float((weight - before[name]).double().square().sum())
            norm += float(before[name].double().square().sum())
    return math.sqrt(wrong / norm)


def loss_difference(after: Measured, before: Measured) -> Estimate:
    """Nats a token that one format loses more than another, windows resampled in pairs."""
    mine, theirs = after.found, before.found
    if mine.row_tokens != theirs.row_tokens:
        raise ValueError("formats are compared on the same windows, and these differ")
    differences = [a - b for a, b in zip(mine.row_nll, theirs.row_nll, strict=True)]
    return ratio(differences, mine.row_tokens, unit="tokens")
