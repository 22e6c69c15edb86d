"""Tiny models and rows for the training tests."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.train import loop

VOCABULARY = 17
# what differs between a run and its repetition
TIMES = {"seconds", "tokens_per_second", "peak_memory"}


class Tiny(nn.Module):
    """A causal model small enough for thousands of steps: running mean of embeddings, dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x = self.embed(input_ids)  # (B, T, 8)
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        x = x.cumsum(dim=1) / counts
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=self.head(self.norm(x)))


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    """Make the same model each time."""

    def make(**kwargs: Any) -> Tiny:
        torch.manual_seed(7)
        return Tiny(**kwargs)

    return make


def _rows(count: int = 13, seed: int = 0, sources: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        length = int(torch.randint(2, 10, (1,), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        masked = int(torch.randint(0, length, (1,), generator=generator))
        row = {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}
        rows.append(row | ({"source": "ab"[number % 2]} if sources else {}))
    return rows


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    """Rows of different lengths and different numbers of graded tokens."""
    return _rows


@pytest.fixture(scope="session")
def without_times() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """A history without what no two runs share: times and memory."""
    return lambda history: [{k: v for k, v in r.items() if k not in TIMES} for r in history]


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave loss.png out: drawing it takes longer than the run it shows."""
    monkeypatch.setattr(loop, "plot_loss", lambda history, path: None)
