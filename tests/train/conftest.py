"""Tiny models and rows for the training tests."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    add_adapter,
    set_adapters,
)
from lora_core.models import CausalLM, ModelConfig
from lora_core.quant import quantize_model
from lora_core.train import folder

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
    monkeypatch.setattr(folder, "plot_loss", lambda history, path: None)


LINEARS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Any] = {
    "full": [],
    "lora": [LoRAConfig(r=2, dropout=0.1)],
    "qlora": [LoRAConfig(r=2, dropout=0.1)],
    "dora": [LoRAConfig(r=2, use_dora=True, targets=LINEARS)],
    "tokens": [LoRAConfig(r=2, targets=["q_proj"], trainable_token_indices=[1, 3])],
    "houlsby": [BottleneckConfig(reduction=4, placement="houlsby")],
    "pfeiffer": [BottleneckConfig(reduction=4, placement="pfeiffer")],
    "parallel": [BottleneckConfig(reduction=4, placement="parallel")],
    "prompt": [PromptTuningConfig(num_virtual_tokens=3)],
    "p-tuning": [PTuningConfig(num_virtual_tokens=3)],
    "prefix": [PrefixTuningConfig(num_virtual_tokens=3)],
    "flat prefix": [PrefixTuningConfig(num_virtual_tokens=3, projection=False)],
    "several": [LoRAConfig(r=r, targets=LINEARS, dropout=0.1) for r in (2, 3)],
}


@dataclass(frozen=True)
class Method:
    """A way to train, and the decoder that it trains."""

    name: str

    def model(self, layers: int = 1, **options: Any) -> CausalLM:
        """The same model each time, in training mode."""
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
        model = CausalLM(ModelConfig(**sizes | options))
        model.init_weights()
        if self.name == "qlora":
            quantize_model(model)
        names = [f"a{number}" for number in range(len(METHODS[self.name]))]
        for name, config in zip(names, METHODS[self.name], strict=True):
            add_adapter(model, config, name=name)
        if len(names) > 1:
            set_adapters(model, names, trainable=names)
        return model.train()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Each way to train; `indirect=True` picks some by name."""
    return Method(request.param)
