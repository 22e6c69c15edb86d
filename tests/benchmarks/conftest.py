"""Fixtures of the benchmarks' tests."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import CausalLM, ModelConfig, base_model_path, save_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXT = "def spam(eggs):\n    return eggs + 1  # the parrot is resting\n\n" * 40


@pytest.fixture(scope="session")
def papers(load_benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a module of `benchmarks.papers`."""
    return lambda name: load_benchmark(f"papers.{name}")


@pytest.fixture(scope="session")
def papers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: hidden size 32, 2 layers, the shipped base's tokenizer."""
    made = tmp_path_factory.mktemp("tiny")
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = CausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    save_model(model, made / "model")
    for name in TOKENIZER:
        shutil.copy(base_model_path() / name, made / "model" / name)
    (made / "text.txt").write_text(TEXT)
    return made


@pytest.fixture
def papers_settings(
    papers: Callable[[str], ModuleType],
    papers_folder: Path,
    papers_rows: Callable[[int], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """Settings of toy counts over the tiny model and made-up rows."""
    task = papers("task")
    monkeypatch.setattr(task, "_functions", lambda: tuple(papers_rows(40)))
    monkeypatch.setattr(task, "ANSWER_TOKENS", 4)
    yield papers("claim").Settings(
        model=papers_folder / "model",
        out=tmp_path,
        seeds=(0, 1),
        steps=2,
        held_out=4,
        text=papers_folder / "text.txt",
        quick=True,
    )
    task.text_of.cache_clear()
    papers("quantized").measured.cache_clear()


@pytest.fixture(scope="session")
def papers_rows() -> Callable[[int], list[Any]]:
    """Made-up rows of the claims' task."""

    def rows(count: int) -> list[Any]:
        return [
            {
                "messages": [
                    {"role": "user", "content": f"What is `f{i}`?"},
                    {"role": "assistant", "content": json.dumps({"name": f"f{i}"})},
                ],
                "module": "m",
                "name": f"f{i}",
            }
            for i in range(count)
        ]

    return rows
