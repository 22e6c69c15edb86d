"""Windows over plain text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import TextWindows, Tokenizer, encode_documents


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(2, 20))
def test_windows_tile_the_stream(ids: list[int], length: int) -> None:
    if len(ids) < length:
        with pytest.raises(
            ValueError, match=f"{len(ids)} tokens do not fill one window of {length}"
        ):
            TextWindows(ids, length)
        return
    windows = TextWindows(torch.tensor(ids), length)
    joined = [i for row in windows for i in row["input_ids"]]
    assert joined == ids[: len(ids) - windows.dropped]
    assert windows.dropped < length
    assert all(len(row["input_ids"]) == length for row in windows)
    assert all(row["labels"] == row["input_ids"] for row in windows)
    assert windows[-1] == windows[len(windows) - 1] == windows[-1:][0]


def test_end_token_after_each_document(tok: Tokenizer) -> None:
    stream = encode_documents(["one", "two"], tok)
    assert tok.decode(stream) == "one<|endoftext|>two<|endoftext|>"
    rows = TextWindows.from_texts(["one", "two"], tok, 2)
    assert len(rows) == len(stream) // 2


def test_errors(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match="length must be at least 2"):
        TextWindows([1, 2, 3], 1)
    with pytest.raises(IndexError, match="row 1 of 1"):
        TextWindows([1, 2, 3], 3)[1]
    with pytest.raises(ValueError, match="names no eos_token"):
        encode_documents(["a"], Tokenizer(tok.backend))
