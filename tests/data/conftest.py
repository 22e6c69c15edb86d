"""Tokenizers and files for the data tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.data import Tokenizer, builtin_template

# control tokens of each family and which of them is the tokenizer's bos and eos
FAMILIES: dict[str, tuple[list[str], str | None, str]] = {
    "alpaca": (["<s>", "</s>"], "<s>", "</s>"),
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
    "gemma": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
    ),
    "llama2": (["<s>", "</s>"], "<s>", "</s>"),
    "llama3": (
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    "mistral": (["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "phi3": (
        ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<s>",
        "<|endoftext|>",
    ),
}
CORPUS = [
    "Once upon a time the user asked: what is a function?\n\nA function maps x to y. " * 4,
    "### Instruction:\nanswer\n\n### Response:\nassistant model system [INST] [/INST]\n" * 4,
    "naïve café 東京 🙂🙃 привет\n\n\n  indented\n\ttabs " * 4,
]


def _backend(specials: list[str], trim_offsets: bool | None = None) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if trim_offsets is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def backend() -> Callable[..., Any]:
    """A byte-level BPE tokenizer with these special tokens (ids 0, 1, …)."""
    return _backend


@pytest.fixture(scope="session")
def families() -> dict[str, Tokenizer]:
    """Per built-in template a tokenizer that has its control tokens, and the template set."""
    toks = {}
    for name, (specials, bos, eos) in FAMILIES.items():
        config = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
        toks[name] = Tokenizer(_backend(specials), config, builtin_template(name))
    return toks


@pytest.fixture
def tok(families: dict[str, Tokenizer]) -> Tokenizer:
    """ChatML's tokenizer."""
    return families["chatml"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write objects (or ready lines, as strings or bytes) to a JSON Lines file."""

    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        lines = [
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        file = tmp_path / name
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return file

    return write
