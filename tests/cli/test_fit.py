"""A tokenizer, a template and a model that do not belong together: one line each, in every verb."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.cli.main import main
from lora_core.runs.opening import open_model

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def folder(
    tmp_path: Path, tokenizer_folder: Path, small_peer: Callable[..., Any]
) -> Callable[..., Path]:
    """A model with so many embedding rows, and the tokenizer of 400 ids."""

    def make(rows: int) -> Path:
        out = tmp_path / f"model{rows}"
        small_peer("llama", vocab_size=rows).save_pretrained(out)
        for file in tokenizer_folder.iterdir():
            (out / file.name).write_bytes(file.read_bytes())
        return out

    return make


@pytest.fixture
def finetune(tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(json.dumps(ROW) for _ in range(4)) + "\n")

    def run(model: Path, *more: str) -> tuple[int, Path]:
        words = ["finetune", "--model", str(model), "--data", str(data), "--device", "cpu"]
        quick = ["--steps", "1", "--eval-fraction", "0", "--progress", "false"]
        out = tmp_path / "out"
        return main([*words, *quick, "--out", str(out), *more]), out

    return run


def test_an_embedding_too_small(
    folder: Callable[..., Path],
    finetune: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model = folder(384)
    line = "the tokenizer has 400 ids, the model 384 embedding rows: "
    for words in (
        ["generate", "--model", str(model), "--prompt", "x"],
        ["quantize", "--model", str(model), "--out", str(tmp_path / "q")],
    ):
        assert main(words) == 1
        assert line in capsys.readouterr().err.splitlines()[-1]
    assert finetune(model)[0] == 1
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_an_embedding_much_too_large(folder: Callable[..., Path]) -> None:
    opened = open_model(folder(640), device="cpu")
    assert opened.notes == [
        "the tokenizer has 400 ids, the model 640 embedding rows: is it the model's own?"
    ]


def test_added_tokens_take_the_room_of_a_padded_embedding(
    folder: Callable[..., Path], finetune: Callable[..., tuple[int, Path]]
) -> None:
    code, out = finetune(folder(448), "--add-tokens", "<new>")
    assert code == 0
    opened = open_model(None, out, device="cpu")
    assert (opened.model.config.vocab_size, opened.notes) == (448, [])
    assert opened.tok.encode("<new>") == [400]


def test_a_template_of_another_family(folder: Callable[..., Path]) -> None:
    model = folder(400)
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|eot_id|>{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    assert open_model(model, device="cpu").notes == [
        "the chat template writes '<|eot_id|>', not one token each in this tokenizer"
    ]


def test_an_adapter_does_not_grow_a_base_that_is_one_token_short(
    folder: Callable[..., Path], finetune: Callable[..., tuple[int, Path]]
) -> None:
    """Gemma 3's text models: the tokenizer has an image token that the model has no row for."""
    model = folder(400)
    spec = json.loads((model / "tokenizer.json").read_text())
    image = {**spec["added_tokens"][0], "id": 400, "content": "<image_soft_token>"}
    spec["added_tokens"].append(image)
    (model / "tokenizer.json").write_text(json.dumps(spec))
    code, out = finetune(model)
    assert code == 0
    opened = open_model(None, out, device="cpu")
    assert opened.model.config.vocab_size == 400
    assert opened.notes[-1].endswith("'<image_soft_token>' (id 400) cannot be used")
