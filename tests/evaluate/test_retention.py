"""Windows that judge every token and count every byte once; forgetting as a paired figure."""

import hashlib
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter, disable_adapters
from lora_core.checkpoint import load_model
from lora_core.data import Tokenizer, load_tokenizer, stdlib
from lora_core.data.corpus import is_held_out
from lora_core.evaluate import Perplexity, perplexity
from lora_core.evaluate.retention import (
    GeneralText,
    forgetting,
    general_loss,
    general_text,
    windows,
)

TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
    st.lists(st.sampled_from(["json", "😀", "日本", "\n", "  "]), min_size=1).map(" ".join),
)


@pytest.fixture(scope="module")
def tok(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def model(small_decoder: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    made = small_decoder(vocab_size=400, max_position_embeddings=64)
    made.init_weights(0.3)
    return made


@pytest.fixture
def text(tmp_path: Path) -> GeneralText:
    file = tmp_path / "general.txt"
    file.write_text("".join(f"line {i}: json has an encoder, naïve or not\n" for i in range(200)))
    return general_text(file, limit_bytes=3000)


@given(text=TEXTS, length=st.integers(2, 20))
def test_every_token_is_judged_once(tok: Tokenizer, text: str, length: int) -> None:
    rows = list(windows(tok, text, length))
    judged = [label for row in rows for label in row["labels"] if label != -100]
    assert judged == tok.encode(text)
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) <= length
        assert row["labels"][0] == -100  # judged from what stands before it
        assert row["labels"][1:] == row["input_ids"][1:]
        if after is not None:
            assert len(row["input_ids"]) == length
            assert after["input_ids"][0] == row["input_ids"][-1]
    assert rows[0]["input_ids"][0] == tok.eos_id
    assert sum(row["graded_bytes"] for row in rows) == len(text.encode())


@given(text=TEXTS, length=st.integers(2, 20))
def test_bytes_are_those_of_the_windows_own_text(tok: Tokenizer, text: str, length: int) -> None:
    """Where no character is split over windows; byte-level tokens are as long as their text."""
    done = 0
    for row in windows(tok, text, length):
        kept = [label for label in row["labels"] if label != -100]
        size = sum(len(str(tok.token(i))) for i in kept)
        ends = text.encode()[: done + size], text.encode()[:done]
        done += size
        if all(end.decode(errors="ignore").encode() == end for end in ends):
            assert row["graded_bytes"] == size


def test_white_space_that_no_token_covers_is_counted(encoder_folder: Callable[[str], Path]) -> None:
    """A tokenizer that drops white space: the bytes are the text's all the same."""
    dropping = load_tokenizer(encoder_folder("bert"))
    text = "  \n json  a encoder "
    rows = list(windows(dropping, text, 4))
    assert len(rows) > 1
    assert sum(row["graded_bytes"] for row in rows) == len(text.encode())


def test_a_tokenizer_that_names_no_start(tok: Tokenizer) -> None:
    nameless = Tokenizer(tok.backend, {}, None)
    (row,) = windows(nameless, "json encoder", 50)
    ids = tok.encode("json encoder")
    assert row["input_ids"] == ids
    assert row["labels"] == [-100, *ids[1:]]
    first = len(str(tok.token(ids[0])))
    assert row["graded_bytes"] == len("json encoder") - first
    assert list(windows(nameless, "a", 50)) == []


def test_the_loss_is_that_of_the_windows(
    model: nn.Module, tok: Tokenizer, text: GeneralText
) -> None:
    found = general_loss(model, tok, text, window=20)
    rows = [row for passage in text.texts for row in windows(tok, passage, 20)]
    size = sum(len(passage.encode()) for passage in text.texts)
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    again = perplexity(model, plain, graded_bytes=size)
    assert found.bits_per_byte == again.bits_per_byte
    assert found.tokens == sum(len(tok.encode(passage)) for passage in text.texts)
    assert len(found.row_nll) == len(rows)
    assert found.estimates()["bits_per_byte"].count == size


def test_window_and_limit(model: nn.Module, tok: Tokenizer, text: GeneralText) -> None:
    usual = general_loss(model, tok, text)
    assert max(usual.row_tokens) == 63  # the model's 64 positions, the first not judged
    assert general_loss(model, tok, text, window=64) == usual
    few = general_loss(model, tok, text, limit_tokens=100)
    assert few.row_nll == usual.row_nll[:2]
    assert sum(few.row_tokens[:1]) < 100 <= few.tokens


def test_forgetting_by_an_adapter(
    small_decoder: Callable[..., nn.Module],
    tok: Tokenizer,
    text: GeneralText,
    shake: Callable[..., nn.Module],
) -> None:
    tuned = small_decoder(vocab_size=400, max_position_embeddings=64)
    tuned.init_weights(0.3)
    before = general_loss(tuned, tok, text)
    add_adapter(tuned, LoRAConfig(r=2, targets="all-linear"))
    fresh = forgetting(before, general_loss(tuned, tok, text))
    assert (fresh.value, fresh.low, fresh.high) == (0, 0, 0)
    shake(tuned)
    with disable_adapters(tuned):
        assert general_loss(tuned, tok, text) == before
    after = general_loss(tuned, tok, text)
    lost = forgetting(before, after)
    assert lost.value == pytest.approx(after.bits_per_byte - before.bits_per_byte, rel=1e-9)
    assert lost.value != 0
    assert lost.low < lost.value < lost.high
    assert (lost.count, lost.unit) == (before.graded_bytes, "bytes")
    back = forgetting(after, before)
    assert back.value == pytest.approx(-lost.value)


def test_pairs_know_more_than_two_intervals() -> None:
    """Windows differ much, the loss on each grows by the same bits a byte."""
    sizes = (10, 10, 10, 10, 10, 10)
    nats = [10.0, 60.0, 20.0, 50.0, 30.0, 40.0]
    before = measured(nats, sizes)
    after = measured([x + 10 * math.log(2) * 0.5 for x in nats], sizes)
    lost = forgetting(before, after)
    assert (lost.value, lost.low, lost.high) == pytest.approx((0.5, 0.5, 0.5))
    wide = before.estimates()["bits_per_byte"]
    assert wide.high - wide.low > 1


def measured(nats: list[float], sizes: tuple[int, ...] | None, tokens: int = 3) -> Perplexity:
    counts = (tokens,) * len(nats)
    return Perplexity(
        1.0, 1.0, 0.0, sum(counts), sum(nats), None, tuple(nats), counts, counts, sizes
    )


def test_what_cannot_be_compared() -> None:
    two = measured([1.0, 2.0], (4, 5))
    for other in (measured([1.0], (4,)), measured([1.0, 2.0], (4, 6)), measured([1, 2], (4, 5), 2)):
        with pytest.raises(ValueError, match="forgetting compares the same windows; got 2 windows"):
            forgetting(two, other)
    with pytest.raises(ValueError, match="forgetting needs the bytes of each window"):
        forgetting(two, measured([1.0, 2.0], None))


def test_what_cannot_be_measured(
    model: nn.Module, tok: Tokenizer, text: GeneralText, encoder_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=r"on general text needs a decoder, .* encoder \(Encoder"):
        general_loss(load_model(encoder_folder("bert")), tok, text)
    with pytest.raises(ValueError, match="window must be 2 or more tokens; got 1"):
        general_loss(model, tok, text, window=1)
    with pytest.raises(ValueError, match="limit_tokens must be 1 or more; got 0"):
        general_loss(model, tok, text, limit_tokens=0)
    broken = load_model_with_nan(model)
    with pytest.raises(ValueError, match="graded tokens is NaN"):
        general_loss(broken, tok, text)


def load_model_with_nan(model: nn.Module) -> nn.Module:
    import copy

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3, 0] = math.nan
    return broken


# --- the text ---


def test_passages_are_whole_lines_at_equal_distances(tmp_path: Path) -> None:
    file = tmp_path / "general.txt"
    lines = [f"{i:05} " + "é" * (i % 90) + "\n" for i in range(2000)]
    file.write_text("".join(lines), encoding="utf-8")
    text = general_text(file, limit_bytes=20_000)
    assert text == general_text(file, limit_bytes=20_000)
    size = sum(len(passage.encode()) for passage in text.texts)
    assert 17_000 < size < 23_000
    firsts = []
    for passage in text.texts:
        assert 1024 <= len(passage) < 1024 + 100
        assert passage in "".join(lines)
        assert passage.endswith("\n")
        firsts.append(int(passage[:5]))
    steps = [b - a for a, b in pairwise(firsts)]
    assert max(steps) - min(steps) < 50  # about a passage
    assert firsts[0] == 0
    assert firsts[-1] > 1600  # from all of the file
    digest = hashlib.sha256("\0".join(text.texts).encode()).hexdigest()
    assert text.sha256 == digest
    assert (
        text.source == f"{len(text.texts)} passages ({size} bytes) of {file}, sha256 {digest[:12]}"
    )
    whole = general_text(file, limit_bytes=10**9)
    assert "".join(whole.texts) == "".join(lines)


def test_lines_without_end_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "general.txt"
    file.write_text("x" * 5000 + "\n\n   \n")
    text = general_text(file)
    assert [len(passage) for passage in text.texts] == [1024] * 4 + [910]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "marked.txt"
    file.write_bytes(b"\xef\xbb\xbfone line\n")
    assert general_text(file).texts == ("one line\n",)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "general.jsonl"
    file.write_text('{"text": "one"}\n{"text": " "}\n{"text": "two", "more": 1}\n')
    assert general_text(file).texts == ("one", "two")
    file.write_text('{"text": "one"}\n{"messages": []}\n')
    with pytest.raises(ValueError, match=r"general\.jsonl:2: each line needs a 'text'"):
        general_text(file)


def test_text_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "general.txt"
    with pytest.raises(FileNotFoundError, match="no text file"):
        general_text(file)
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no text to measure on"):
        general_text(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        general_text(file)
    with pytest.raises(ValueError, match="limit_bytes must be 1 or more; got 0"):
        general_text(file, limit_bytes=0)


def test_the_default_is_held_out_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else of the library is even opened."""
    held = [name for name in (f"part{i}" for i in range(200)) if is_held_out(name)]
    for i in range(200):
        if f"part{i}" in held:
            (tmp_path / f"part{i}.py").write_text(f"# part{i}\n")
        else:
            (tmp_path / f"part{i}.py").symlink_to("absent")  # opening it would fail
    monkeypatch.setattr(stdlib, "library_root", lambda: tmp_path)
    text = general_text()
    assert sorted(text.texts) == sorted(f"# {name}\n" for name in held)
    assert 0 < len(held) < 30
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"of {len(held)} held-out modules of Python {version}'s standard library" in text.source
