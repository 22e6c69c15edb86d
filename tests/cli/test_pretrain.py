"""`lora-core pretrain`: text in, a model folder with its recipe out; resumed and repeated."""

import json
import math
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_core.checkpoint import base_model_path, load_model
from lora_core.cli.main import main
from lora_core.cli.pretrain import PretrainConfig, measure, streams
from lora_core.data import load_tokenizer
from lora_core.data.corpus import read_text_files

SHAPE = ["--vocab-size", "300", "--hidden", "16", "--intermediate", "32", "--layers", "2"]
SHAPE += ["--heads", "2", "--kv-heads", "1", "--context", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    lines = [f"Once {i} upon {i * i} a time, there was a {i % 7}.\n\n" for i in range(1500)]
    path.write_text("".join(lines))
    return path


def pretrain(out: Path, *more: str) -> int:
    return main(["pretrain", "--out", str(out), *more])


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "model"
    assert pretrain(out, "--text", str(text), *SHAPE, "--steps", "30") == 0
    return out


def test_the_folder_holds_a_model_a_tokenizer_and_the_recipe(made: Path, text: Path) -> None:
    model, tok = load_model(made), load_tokenizer(made)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 32
    assert tok.eos_ids == [0, 2] == list(model.config.eos_token_ids)
    assert tok.chat_template is not None
    recipe = json.loads((made / "recipe.json").read_text())
    assert recipe["model"]["hidden"] == 16
    assert (recipe["train"]["steps"], recipe["train"]["weight_decay"]) == (30, 0.1)
    assert recipe["data"]["corpus_sha256"] == read_text_files([text]).sha256
    assert recipe["data"]["held_out"]
    result = recipe["result"]
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    uniform = math.log2(300) * recipe["data"]["held_out_tokens"] / recipe["data"]["held_out_bytes"]
    assert 0 < result["held_out_bits_per_byte"] < 0.9 * uniform  # it has learnt something
    assert recipe["versions"]["python"]


def test_bits_per_byte_are_those_of_the_saved_weights(made: Path, text: Path) -> None:
    recipe = json.loads((made / "recipe.json").read_text())
    corpus, tok = read_text_files([text]), load_tokenizer(made)
    _, ids = streams(corpus, tok)
    model = load_model(made, dtype="float32")
    nll = 0.0
    for end in range(1, len(ids)):  # one token at a time, in its window
        row = 0 if end < 32 else (end - 16) // 16
        window = torch.tensor([ids[row * 16 : end]])
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, -1].double()
        nll -= logits.log_softmax(-1)[ids[end]].item()
        if end == 200:
            break
    found = measure(made, ids[: end + 1], 1000, 32)
    assert found["held_out_loss"] == pytest.approx(nll / end, abs=1e-4)
    assert found["held_out_bits_per_byte"] == pytest.approx(nll / math.log(2) / 1000, abs=1e-4)
    whole = measure(made, ids, corpus.held_out_bytes, 32)
    assert whole["held_out_bits_per_byte"] == recipe["result"]["held_out_bits_per_byte"]


def test_streams_begin_and_end_every_document_with_the_end_token(made: Path, text: Path) -> None:
    corpus, tok = read_text_files([text]), load_tokenizer(made)
    train, held_out = streams(corpus, tok)
    assert isinstance(train, array)
    assert train.count(0) == len(corpus.train) + 1
    assert held_out[0] == held_out[-1] == 0
    pieces = tok.decode(list(held_out)).split("<|endoftext|>")
    assert pieces == ["", *corpus.held_out, ""]


def test_resuming_a_finished_run_changes_nothing(made: Path, text: Path) -> None:
    before = (made / "model.safetensors").read_bytes()
    again = pretrain(made, "--text", str(text), *SHAPE, "--steps", "30", "--resume")
    assert again == 0
    assert (made / "model.safetensors").read_bytes() == before


def test_a_recipe_is_repeated_bit_for_bit(made: Path, text: Path, tmp_path: Path) -> None:
    words = ["--recipe", str(made / "recipe.json"), "--text", str(text)]
    assert pretrain(tmp_path / "twin", *words) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "twin" / name).read_bytes() == (made / name).read_bytes()
    # flags come before the recipe
    assert pretrain(tmp_path / "other", *words, "--steps", "2", "--seed", "1") == 0
    recipe = json.loads((tmp_path / "other" / "recipe.json").read_text())
    assert (recipe["result"]["steps"], recipe["train"]["seed"]) == (2, 1)
    assert recipe["model"]["hidden"] == 16


def test_a_tokenizer_that_is_given_is_kept(made: Path, text: Path, tmp_path: Path) -> None:
    words = ["--text", str(text), "--tokenizer", str(made), *SHAPE, "--steps", "1", "--json"]
    assert pretrain(tmp_path, *words) == 0
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()


def test_mistakes_are_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str) -> str:
        assert pretrain(tmp_path / "out", "--text", str(text), *words) == 1
        found = capsys.readouterr().err.strip().splitlines()[-1]
        return found.removeprefix("lora-core pretrain: ")

    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"model": {"width": 3}, "train": {}}')
    (tmp_path / "broken.json").write_text("{")
    assert 'has no object "model"' in error("--recipe", str(tmp_path / "list.json"))
    assert '"model" has unknown entries width' in error("--recipe", str(tmp_path / "odd.json"))
    assert "broken.json is no recipe" in error("--recipe", str(tmp_path / "broken.json"))
    assert "context must be at least 8" in error("--context", "4")
    assert "held_out must be a percentage" in error("--held-out", "100")
    with pytest.raises(ValueError, match="held_out must be a percentage above 0; got 0"):
        PretrainConfig(held_out=0)


def test_the_shipped_model_is_small_complete_and_well_under_its_baseline() -> None:
    folder = base_model_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    model, tok = load_model(folder), load_tokenizer(folder)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert tok.vocab_size == model.config.vocab_size
    for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tok.is_token(mark)
    recipe = json.loads((folder / "recipe.json").read_text())
    ours = recipe["result"]["held_out_bits_per_byte"]
    assert ours == recipe["baseline"]["model_bits_per_byte"]
    assert ours <= 0.9 * recipe["baseline"]["kneser_ney_5gram_bits_per_byte"]


def test_an_installation_without_the_model_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import lora_core.checkpoint.base_model as place

    monkeypatch.setattr(place, "__file__", str(tmp_path / "checkpoint" / "base_model.py"))
    with pytest.raises(FileNotFoundError, match=r"no base model in .*: install lora-core anew"):
        base_model_path()


@pytest.mark.oracle
def test_transformers_loads_the_shipped_model_with_equal_logits_and_tokens(
    oracle: Callable,
) -> None:
    transformers = oracle("transformers")
    folder = base_model_path()
    tok, theirs_tok = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What does `len(obj)` do?\n\n    café 12345"}]
    text = tok.render(messages, add_generation_prompt=True)
    assert text == theirs_tok.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    ids = tok.encode(text)
    assert ids == theirs_tok.encode(text, add_special_tokens=False)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mine = load_model(folder, dtype="float32")
    with torch.no_grad():
        truth = theirs.double()(torch.tensor([ids])).logits
        error = (mine(torch.tensor([ids])).logits - truth).abs().max()
        peer = (theirs.float()(torch.tensor([ids])).logits - truth).abs().max()
    assert error <= 2 * peer + 2 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert set(theirs.generation_config.eos_token_id) == {0, 2}
