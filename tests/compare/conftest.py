"""A task that takes a second: a random model, a dozen short conversations, a page of text."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.compare import CompareConfig, Compared, compare
from lora_core.compare.worker import main as work


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(number: int) -> dict[str, Any]:
    question = f"What is {number} + {number}?"
    turns = [("user", question), ("assistant", f"It is {2 * number}.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A decoder of random weights: hidden size 32, 2 layers, 4 heads over 2, vocabulary 400."""
    from lora_core.checkpoint import save_model
    from lora_core.models import CausalLM, ModelConfig

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = CausalLM(
        ModelConfig(vocab_size=400, max_position_embeddings=512, eos_token_id=2, **sizes, **heads)
    )
    model.init_weights(0.1, torch.Generator().manual_seed(7))
    save_model(model, folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rows to train on, rows held out, general text; as fields of CompareConfig."""
    folder = tmp_path_factory.mktemp("task")
    text = folder / "general.txt"
    text.write_text(str(json.__doc__) * 2, encoding="utf-8")
    return {
        "data": str(write(folder / "train.jsonl", [chat(n) for n in range(12)])),
        "eval_data": str(write(folder / "held.jsonl", [chat(n) for n in range(12, 15)])),
        "general_text": str(text),
    }


@pytest.fixture(scope="session")
def config_in(tiny_model: Path, task_files: dict[str, str]) -> Callable[..., CompareConfig]:
    """A comparison of two steps each in a folder, and further options."""
    quick = {"steps": 2, "batch_size": 4, "r": 2, "virtual_tokens": 3, "max_new_tokens": 4}
    quick |= {"latency_runs": 1, "latency_tokens": 2, "general_bytes": 600}

    def make(folder: Path, **options: Any) -> CompareConfig:
        usual = {"out": str(folder / "out"), "model": str(tiny_model), "device": "cpu"}
        return CompareConfig(**{**usual, **task_files, **quick, **options})

    return make


@pytest.fixture
def make_config(
    tmp_path: Path, config_in: Callable[..., CompareConfig]
) -> Callable[..., CompareConfig]:
    """The same in the test's own folder."""
    return partial(config_in, tmp_path)


class InProcess:
    """The worker without a process, which counts and may be told to fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: dict[str, BaseException] = {}

    def __call__(self, spec: Path, result: Path, log: Path) -> int:
        variant = json.loads(spec.read_text())["variant"]
        name = "base" if variant is None else variant["method"]
        self.ran.append(name)
        if name in self.fails:
            raise self.fails[name]
        return work([str(spec), str(result)])


@pytest.fixture
def in_process() -> InProcess:
    return InProcess()


@pytest.fixture(scope="session")
def every(
    tmp_path_factory: pytest.TempPathFactory, config_in: Callable[..., CompareConfig]
) -> Compared:
    """All methods on the tiny task."""
    folder = tmp_path_factory.mktemp("every")
    return compare(config_in(folder, system="Add."), worker=InProcess())
