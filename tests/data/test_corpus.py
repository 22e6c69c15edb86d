"""Plain text to documents, a tokenizer made from them, and rows that judge each token once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import load_tokenizer
from lora_core.data.corpus import (
    SPECIAL_TOKENS,
    Corpus,
    is_held_out,
    overlapping_rows,
    read_text_files,
    train_tokenizer,
)

TEXTS = ["The quick brown fox jumps.\n\n    over(the, lazy) = 'dog'  # 12345\n" * 20] * 3


def test_holding_out_follows_the_name_and_about_the_share() -> None:
    names = [f"module.{i}" for i in range(4000)]
    held = [name for name in names if is_held_out(name, 5.0)]
    assert 140 < len(held) < 260  # 200 expected, four deviations of 13.8 are 55
    assert held == [name for name in names if is_held_out(name, 5.0)]
    # a larger share holds out the same and more
    assert set(held) <= {name for name in names if is_held_out(name, 9.0)}


def test_files_are_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " * 30 for i in range(300)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short\n")
    corpus = read_text_files([tmp_path / "a.txt", tmp_path / "b.txt"], percent=30)
    assert len(corpus.train) + len(corpus.held_out) > 4
    pieces = [p for p in corpus.train + corpus.held_out if p != "short\n"]
    assert sum(map(len, pieces)) == len(text)
    assert all(piece.endswith("\n") and piece.startswith("paragraph") for piece in pieces)


def test_the_last_document_is_held_out_where_the_hash_takes_none(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    corpus = read_text_files([tmp_path / "a.txt", tmp_path / "b.txt"], percent=0.01)
    assert (corpus.train, corpus.held_out, corpus.held_out_names) == (
        ["a.txt"],
        ["b.txt"],
        ["b.txt#0"],
    )


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text file .*missing"):
        read_text_files([tmp_path / "missing.txt"])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes.txt is not UTF-8 text"):
        read_text_files([tmp_path / "bytes.txt"])
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        read_text_files([tmp_path / "one.txt"])
    with pytest.raises(ValueError, match="leaves nothing to hold out"):
        Corpus(["text"], [], [])


def test_the_hash_tells_corpora_and_their_halves_apart() -> None:
    corpora = [
        Corpus(["a", "b"], ["c"], ["c"]),
        Corpus(["a"], ["b", "c"], ["b", "c"]),
        Corpus(["ab"], ["c"], ["c"]),
        Corpus(["a", "b"], ["d"], ["d"]),
    ]
    assert len({corpus.sha256 for corpus in corpora}) == len(corpora)
    assert Corpus(["é"], ["né"], ["x"]).held_out_bytes == 3


def test_a_tokenizer_writes_every_text_and_knows_its_marks(tmp_path: Path) -> None:
    tok = train_tokenizer(TEXTS, vocab_size=300, max_length=64)
    assert tok.vocab_size == 300
    assert [tok.encode(mark) for mark in SPECIAL_TOKENS] == [[0], [1], [2]]
    assert (tok.eos_id, tok.pad_id, tok.eos_ids) == (0, 0, [0, 2])
    for text in [*TEXTS, "naïve 東京 🙂\r\n\t x", "<|im_start|>user\nhi<|im_end|>\n", ""]:
        assert tok.decode(tok.encode(text)) == text
    assert tok.render([{"role": "user", "content": "hi"}], add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXTS[0]) == tok.encode(TEXTS[0])
    assert again.chat_template == tok.chat_template
    assert "{%- generation -%}" in tok.chat_template


def test_a_quoted_name_is_cut_as_a_name_at_the_start_of_a_line() -> None:
    """What the quickstart's questions rest on: copying needs the same tokens."""
    tok = train_tokenizer([*TEXTS, "email.message json.decoder " * 50], 310, 64)
    for name in ("email.message", "json.decoder", "over", "jumps"):
        inside = tok.encode(f"`{name}`")
        assert tok.encode(f"{name}") == inside[1:-1]


def test_a_vocabulary_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        train_tokenizer(TEXTS, 258, 64)
    with pytest.raises(ValueError, match=r"yields only \d+ tokens, vocab_size asks for 5000"):
        train_tokenizer(TEXTS, 5000, 64)


@given(ids=st.lists(st.integers(0, 9), min_size=2, max_size=80), length=st.integers(2, 17))
def test_every_token_but_the_first_is_graded_once_with_half_a_row_before_it(
    ids: list[int], length: int
) -> None:
    rows = overlapping_rows(ids, length)
    graded = [label for row in rows for label in row["labels"] if label != -100]
    assert graded == ids[1:]
    for number, row in enumerate(rows):
        assert len(row["input_ids"]) == len(row["labels"]) <= length
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)
        assert first >= (1 if number == 0 else length - length // 2)
