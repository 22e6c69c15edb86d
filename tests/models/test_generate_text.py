"""Text from tokens: pieces, stop strings, batches of texts, sessions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core import base_model_path, load_tokenizer
from lora_core.adapters import LoRAConfig, PromptTuningConfig, adapter_rows, add_adapter
from lora_core.models import (
    CausalLM,
    Sampling,
    Session,
    TextStream,
    generate,
    generate_batch,
    generate_ids,
)
from lora_core.models.rows import Rows

Make = Callable[..., CausalLM]


class Letters:
    """A tokenizer of one token a letter; `.` ends a text."""

    eos_ids = (26,)
    letters = "abcdefghijklmnopqrstuvwxyz."

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[i] for i in ids)

    def render(self, messages: Any, add_generation_prompt: bool = False) -> str:
        return "".join(message["content"] for message in messages)


class Pieces:
    """A tokenizer whose tokens are given strings; bytes that make no character show as U+FFFD."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def base_tok() -> Any:
    """The shipped base's tokenizer: bytes, so that tokens hold halves of characters."""
    return load_tokenizer(base_model_path())


def streamed(tok: Any, ids: list[int], stop: list[str] | None = None) -> tuple[list[str], bool]:
    stream = TextStream(tok, stop or [])
    pieces = [stream.feed(token) for token in ids]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces, stream.stopped


@given(st.lists(st.integers(0, 4095), max_size=40))
def test_pieces_of_any_tokens_are_the_whole_text(base_tok: Any, ids: list[int]) -> None:
    assert "".join(streamed(base_tok, ids)[0]) == base_tok.decode(ids)


@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character(base_tok: Any, text: str) -> None:
    ids = base_tok.encode(text)
    pieces, _ = streamed(base_tok, ids)
    assert "".join(pieces) == base_tok.decode(ids) == text
    # each piece is whole characters of the text, in its order
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_a_character_comes_when_its_last_byte_does() -> None:
    tok = Pieces([b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b", b"\xff"])
    assert streamed(tok, [0, 1, 2, 3, 4])[0] == ["a", "", "", "\U0001f600", "b", ""]
    # bytes that never become one are given out at the end, or with what follows
    assert streamed(tok, [0, 1])[0] == ["a", "", "\ufffd"]
    assert streamed(tok, [5, 0])[0] == ["", "\ufffda", ""]


def cut_by_definition(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read character by character; the first stop string that is complete ends the text."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    text=st.text("abé", max_size=30),
    cuts=st.lists(st.integers(1, 4), min_size=40, max_size=40),
    stops=st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_do_not_care_how_text_was_cut(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    data, pieces = text.encode(), list[bytes]()
    for size in cuts:
        pieces.append(data[:size])
        data = data[size:]
    wanted, stopped = cut_by_definition(text, stops)
    got, found = streamed(Pieces(pieces), list(range(len(pieces))), stops)
    assert ("".join(got), found) == (wanted, stopped)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    tok = Letters()
    stream = TextStream(tok, ["xyz", "yq"])
    assert [stream.feed(t) for t in tok.encode("axyaxy")] == ["a", "", "", "xya", "", ""]
    assert stream.finish() == "xy"
    stream = TextStream(tok, ["xyz", "yq"])
    assert [stream.feed(t) for t in tok.encode("xyqab")] == ["", "", "x", "", ""]
    assert (stream.stopped, stream.finish(), stream.text) == (True, "", "x")


def test_of_two_stop_strings_in_one_token_the_first_to_be_complete_counts() -> None:
    assert streamed(Pieces([b"xabcde"]), [0], ["abcd", "bc"]) == (["xa", ""], True)
    assert streamed(Pieces([b"xabcde"]), [0], ["abc", "bc"]) == (["x", ""], True)


def test_stop_strings_that_are_none() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(Letters(), ["a", ""])
    with pytest.raises(TypeError, match="stop must be strings; got 3"):
        TextStream(Letters(), [3])  # type: ignore[list-item]


def test_a_batch_of_texts_is_its_texts(make_model: Make) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    prompts = ["hello", "a", [{"role": "user", "content": "you"}], "zz"]
    seeds = [1, 0, 3, 3]  # a row that goes on to the limit, and some that end
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.2, "top_k": 20}
    free = [
        generate(model, tok, p, seed=seed, **options)
        for p, seed in zip(prompts, seeds, strict=True)
    ]
    assert generate_batch(model, tok, prompts, seed=seeds, **options) == free
    assert len(free[0]) > 7
    stop = free[0][5:7]
    cut = [text.split(stop)[0] for text in free]
    assert cut[0] == free[0][:5] != free[0]
    seen: dict[int, str] = {}

    def on_text(row: int, piece: str) -> None:
        assert piece
        seen[row] = seen.get(row, "") + piece

    found = generate_batch(model, tok, prompts, seed=seeds, stop=stop, on_text=on_text, **options)
    assert found == cut
    assert seen == {row: text for row, text in enumerate(cut) if text}
    assert generate(model, tok, "hello", seed=1, stop=[stop], **options) == cut[0]


def test_a_stop_string_ends_the_computation(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    text = generate(model, tok, "hello", max_new_tokens=20, temperature=1.0, seed=0)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    stop = text[3]
    cut = generate(model, tok, "hello", max_new_tokens=20, temperature=1.0, seed=0, stop=stop)
    assert cut == text.split(stop)[0]
    assert len(calls) == len(cut) + 1


def test_rows_can_be_ended_from_outside(make_model: Make) -> None:
    model, ids = make_model(std=0.3), torch.tensor([[1, 2], [3, 4], [5, 6]])
    free = generate_ids(model, ids, max_new_tokens=6)
    seen: list[list[int | None]] = []

    def on_tokens(tokens: list[int | None]) -> list[int]:
        seen.append(tokens)
        return [1] if len(seen) == 2 else []

    found = generate_ids(model, ids, max_new_tokens=6, on_tokens=on_tokens)
    assert found == [free[0], free[1][:2], free[2]]
    assert [tokens[1] for tokens in seen] == [*free[1][:2], None, None, None, None]
    assert [tokens[2] for tokens in seen] == free[2]


def test_a_row_that_has_ended_is_fed_the_pad_token() -> None:
    rows = Rows(torch.zeros(2, 1, dtype=torch.int64), None, 3, Sampling(), eos_ids=[2], pad_id=7)
    for best in ([2, 3], [4, 5], [6, 2]):
        rows.take(torch.nn.functional.one_hot(torch.tensor(best), 9).float())
    assert rows.tokens.tolist() == [[2, 7, 7], [3, 5, 2]]
    assert rows.answers() == [[2], [3, 5, 2]]
    assert rows.all_ended()


def test_streaming_gives_what_is_returned(make_model: Make, base_tok: Any) -> None:
    model, tok = make_model(vocab_size=4096, std=0.3), base_tok
    pieces: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    text = generate(model, tok, "def", on_text=pieces.append, **options)
    assert "".join(pieces) == text == generate(model, tok, "def", **options)
    assert len(pieces) > 20


def test_prompts_under_their_adapters(make_model: Make, shake: Callable[..., Any]) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    for name in ("a", "b"):
        add_adapter(model, LoRAConfig(r=4), name)
    shake(model)
    names, prompts = ["b", None, "a"], ["hello", "a", "you"]
    with adapter_rows(model, names):
        found = generate_batch(model, tok, prompts, max_new_tokens=15)
    for name, prompt, text in zip(names, prompts, found, strict=True):
        with adapter_rows(model, [name]):
            assert generate(model, tok, prompt, max_new_tokens=15) == text


def test_a_session_changes_nothing_but_the_work(make_model: Make) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    ran: list[int] = []
    model.register_forward_hook(lambda _, args, __: ran.append(args[0].shape[1]))
    session, text = Session(), "hello"
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0}
    for turn, more in enumerate(("abc", "x", "you", "")):
        alone = generate(model, tok, text, seed=turn, **options)
        ran.clear()
        assert generate(model, tok, text, seed=turn, session=session, **options) == alone
        assert session.reused == (len(text) - ran[0])
        assert (session.reused > 0) == (turn > 0)
        assert session.ids == tok.encode(text + alone)[: len(session.ids)]
        text += alone + more
    # another beginning: what is the same is kept, and no more
    other = text[:4] + "qq"
    alone = generate(model, tok, other, seed=1, **options)
    assert generate(model, tok, other, seed=1, session=session, **options) == alone
    assert session.reused == 4
    # the very same prompt: its last token is run again
    assert generate(model, tok, other, seed=1, session=session, **options) == alone
    assert session.reused == 5


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_session_goes_on_right(make_model: Make, at: int) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    session, calls = Session(), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tok, "hello", session=session, temperature=1.0, seed=1)
    handle.remove()
    alone = generate(model, tok, "hellothere", temperature=1.0, seed=1)
    assert generate(model, tok, "hellothere", temperature=1.0, seed=1, session=session) == alone


def test_a_model_that_grows_has_no_session(make_model: Make) -> None:
    model, tok = make_model(vocab_size=27, std=0.3), Letters()
    session = Session()
    generate(model, tok, "hello", session=session)
    assert session.ids
    add_adapter(model, PromptTuningConfig(2))
    text = generate(model, tok, "hello", session=session)
    assert (session.reused, session.ids) == (0, [])
    assert text == generate(model, tok, "hello")


def test_one_text_is_no_batch(make_model: Make, base_tok: Any) -> None:
    with pytest.raises(TypeError, match="takes a list of prompts; got one text: use generate"):
        generate_batch(make_model(), base_tok, "hello")
