"""Choices by likelihood against a direct sum, at any boundary of tokens; files that are refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.checkpoint import load_model
from lora_core.data import Tokenizer, load_tokenizer
from lora_core.evaluate.choice import choice_accuracy, common_start
from lora_core.evaluate.choices import Choice, read_choices

WORDS = ["json", "encoder", "linear", "a", "😀", "日本", ""]
TEXTS = st.one_of(
    st.lists(st.sampled_from(["json", "encoder", "linear", "a", "😀", "日本", ""]), max_size=6).map(
        " ".join
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8),
)


class Causal(nn.Module):
    """Logits that depend on all tokens so far, and no limit of positions."""

    def __init__(self, vocabulary: int = 400) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = nn.Parameter(torch.randn(vocabulary, 12, generator=generator))
        self.out = nn.Parameter(torch.randn(12, vocabulary, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x = self.table[input_ids].cumsum(1)
        return SimpleNamespace(logits=torch.tanh(x) @ self.out)


@pytest.fixture(scope="module")
def tok(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


def by_hand(model: nn.Module, before: list[int], judged: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *judged]])).logits[0].double()
    places = range(len(before) - 1, len(before) + len(judged) - 1)
    return sum(
        float(logits[place].log_softmax(0)[token])
        for place, token in zip(places, judged, strict=True)
    )


@given(
    context=TEXTS,
    choices=st.lists(TEXTS.filter(bool), min_size=2, max_size=4),
    batch_size=st.integers(1, 5),
)
def test_equals_a_direct_sum(
    tok: Tokenizer, context: str, choices: list[str], batch_size: int
) -> None:
    """The judged part is found without offsets: token by token, by decoding to bytes."""
    model = Causal()
    found = choice_accuracy(model, tok, [Choice(context, tuple(choices), 0)], batch_size=batch_size)
    (row,) = found.rows
    alphabet = {tok.token(i): i for i in range(tok.vocab_size)}
    assert len(alphabet) == tok.vocab_size
    sizes = [[len(tok.token(i)) for i in tok.encode(context + c)] for c in choices]  # bytes
    start = len(context.encode())
    while True:  # the last place at or before the boundary where all choices have a cut
        cuts = [{sum(s[:n]) for n in range(len(s) + 1)} for s in sizes]
        if all(start in c for c in cuts) and whole(context, start):
            break
        start -= 1
    for number, (choice, size) in enumerate(zip(choices, sizes, strict=True)):
        ids = tok.encode(context + choice)
        first = next(n for n in range(len(size) + 1) if sum(size[:n]) == start)
        before = ids[:first]
        if start == 0:
            before = [tok.eos_id]
        judged = ids[first:]
        assert row.log_likelihoods[number] == pytest.approx(
            by_hand(model, before, judged), abs=1e-4
        )
        assert row.tokens[number] == len(judged)
        assert row.bytes[number] == len(choice.encode())
    for by, over in (("sum", [1] * len(choices)), ("tokens", row.tokens), ("bytes", row.bytes)):
        scores = [x / n for x, n in zip(row.log_likelihoods, over, strict=True)]
        assert row.scores(by) == scores
        assert row.pick(by) == max(range(len(choices)), key=lambda i: (scores[i], -i))


def whole(text: str, place: int) -> bool:
    """Whether so many bytes are whole characters."""
    try:
        text.encode()[:place].decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_blank_at_the_end_of_a_context(tok: Tokenizer) -> None:
    """As in lm-evaluation-harness, the blank then belongs to the choices."""
    model = Causal()
    (one,) = choice_accuracy(model, tok, [Choice("json a ", ("encoder", "linear"), 0)]).rows
    (other,) = choice_accuracy(model, tok, [Choice("json a", (" encoder", " linear"), 0)]).rows
    assert one.log_likelihoods == other.log_likelihoods
    assert one.tokens == other.tokens


def test_a_token_over_the_boundary_is_paid_by_all(tok: Tokenizer) -> None:
    """ "jso" + "n" is one token: judged by number of tokens nothing would be left of it."""
    ids = tok.encode("a json")
    assert len(tok.encode("a jso")) >= len(ids)  # what is cut off elsewhere is the whole
    model = Causal()
    (row,) = choice_accuracy(model, tok, [Choice("a jso", ("n", "lo"), 0)]).rows
    before = tok.encode("a")
    rest = [tok.encode("a json")[len(before) :], tok.encode("a jsolo")[len(before) :]]
    wanted = [by_hand(model, before, judged) for judged in rest]
    assert row.log_likelihoods == pytest.approx(wanted, abs=1e-4)
    assert min(row.tokens) > 0


def test_the_common_start() -> None:
    assert common_start([[(0, 3), (3, 5)], [(0, 3), (3, 7)]], 3) == 3
    assert common_start([[(0, 3), (3, 5)], [(0, 2), (2, 5)]], 3) == 0  # (2, 5), then (0, 3) over 2
    assert common_start([[(0, 1), (1, 2), (2, 5)], [(0, 2), (2, 3), (3, 4)]], 4) == 2
    assert common_start([[(0, 1), (0, 1), (0, 1), (1, 3)]], 1) == 1  # a character of three tokens


def test_messages_and_questions_go_through_the_template(tok: Tokenizer) -> None:
    model = Causal()
    chat = [{"role": "user", "content": "json?"}]
    text = tok.render(chat, add_generation_prompt=True)
    asked = [Choice(chat, ("a", "linear"), 0), Choice(text, ("a", "linear"), 0)]
    asked.append(Choice([*chat, {"role": "assistant", "content": "an"}], (" a", " linear"), 1))
    asked.append(Choice(text + "an", (" a", " linear"), 1))
    one, two, three, four = choice_accuracy(model, tok, asked).rows
    assert one.log_likelihoods == two.log_likelihoods
    assert three.log_likelihoods == four.log_likelihoods
    strict = load_tokenizer_with(tok, "{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="mine:3: the chat template refuses: no"):
        choice_accuracy(model, strict, [Choice(chat, ("a", "b"), 0, "mine:3")])
    with pytest.raises(ValueError, match="mine:3: the tokenizer has no chat template"):
        choice_accuracy(
            model, load_tokenizer_with(tok, None), [Choice(chat, ("a", "b"), 0, "mine:3")]
        )


def load_tokenizer_with(tok: Tokenizer, template: str | None) -> Tokenizer:
    return Tokenizer(tok.backend, tok.config, template, tok.stop_ids)


class Favourite(nn.Module):
    """The likeliest next token is always the same; the others are equally likely."""

    def __init__(self, token: int, vocabulary: int = 400) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(vocabulary).index_fill(0, torch.tensor(token), 9.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.row.expand(*input_ids.shape, -1))


def test_figures_ties_and_the_three_scores(tok: Tokenizer) -> None:
    (a,) = tok.encode("a")
    model = Favourite(a)
    questions = [
        Choice("json", ("b", "a", "c"), 1),  # right by all three
        Choice("json", ("b", "c"), 1),  # a tie, taken as the first, which is wrong
        Choice("json", ("z", "aaz"), 1),  # by sum "z"; per token and per byte "aaz"
        Choice("json", ("b", "b"), 0),  # the same choice twice ties to the bit
    ]
    done: list[tuple[int, int]] = []
    found = choice_accuracy(
        model, tok, questions, batch_size=4, progress=lambda n, of: done.append((n, of))
    )
    assert [row.pick() for row in found.rows] == [1, 0, 0, 0]
    assert [row.tied for row in found.rows] == [False, True, False, True]
    assert (found.ties, found.truncated) == (2, 0)
    assert (found.accuracy.value, found.accuracy.count) == (0.5, 4)
    assert found.accuracy_by_tokens.value == found.accuracy_by_bytes.value == 0.75
    assert (found.accuracy.method, found.accuracy.unit) == ("wilson", "questions")
    assert list(found.estimates().values()) == [
        found.accuracy,
        found.accuracy_by_tokens,
        found.accuracy_by_bytes,
    ]
    assert done[-1] == (4, 4)
    assert sorted(done) == done


def test_bytes_are_not_tokens(tok: Tokenizer) -> None:
    (row,) = choice_accuracy(Causal(), tok, [Choice("a", ("日本", "zz"), 0)]).rows
    assert row.bytes == (6, 2)
    assert row.scores("bytes")[0] == row.log_likelihoods[0] / 6


def test_a_long_context_loses_its_beginning(tok: Tokenizer) -> None:
    model = Causal()
    context = "json encoder linear " * 20
    choices = (" a", " linear layer")
    (row,) = choice_accuracy(model, tok, [Choice(context, choices, 0)], max_length=12).rows
    ids = [tok.encode(context + text) for text in choices]
    assert row.cut == max(map(len, ids)) - 12
    for number, (all_ids, tokens) in enumerate(zip(ids, row.tokens, strict=True)):
        kept = all_ids[row.cut :]
        wanted = by_hand(model, kept[:-tokens], kept[-tokens:])
        assert row.log_likelihoods[number] == pytest.approx(wanted, abs=1e-4)
    whole_context = choice_accuracy(model, tok, [Choice(context, choices, 0)])
    assert (whole_context.truncated, whole_context.rows[0].cut) == (0, 0)
    assert choice_accuracy(model, tok, [Choice(context, choices, 0)], max_length=12).truncated == 1
    with pytest.raises(ValueError, match="mine:1: a choice alone is longer than 4 tokens allow"):
        choice_accuracy(model, tok, [Choice("a", ("x" * 50, "b"), 0, "mine:1")], max_length=4)


def test_the_models_positions_are_the_limit(
    small_decoder: Callable[..., nn.Module], tok: Tokenizer
) -> None:
    model = small_decoder(vocab_size=400, max_position_embeddings=64)
    found = choice_accuracy(model, tok, [Choice("q" * 80, ("a", "b"), 0)])
    assert found.truncated == 1
    assert found.rows[0].cut == len(tok.encode("q" * 80 + "a")) - 64


def test_a_prefix_stays_in_front(tok: Tokenizer) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tok.backend.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    starting = Tokenizer(backend, tok.config | {"bos_token": "<|endoftext|>"}, None)
    model, choice = Causal(), Choice("json encoder " * 9, ("a", "linear"), 0)
    (row,) = choice_accuracy(model, starting, [choice], max_length=10).rows
    ids = [starting.encode(choice.context + text) for text in choice.choices]
    for number, (all_ids, tokens) in enumerate(zip(ids, row.tokens, strict=True)):
        kept = [0, *all_ids[row.cut :]]
        wanted = by_hand(model, kept[:-tokens], kept[-tokens:])
        assert row.log_likelihoods[number] == pytest.approx(wanted, abs=1e-4)
    assert max(len(all_ids) + 1 - row.cut for all_ids in ids) == 10


def test_what_cannot_be_chosen(tok: Tokenizer, encoder_folder: Callable[[str], Path]) -> None:
    one = Choice("a", ("b", "c"), 0)
    with pytest.raises(ValueError, match="no question to choose in"):
        choice_accuracy(Causal(), tok, [])
    with pytest.raises(ValueError, match=r"needs a decoder, .*; got an encoder \(Encoder\)"):
        choice_accuracy(load_model(encoder_folder("bert")), tok, [one])
    with pytest.raises(ValueError, match="batch_size must be 1 or more; got 0"):
        choice_accuracy(Causal(), tok, [one], batch_size=0)
    with pytest.raises(ValueError, match="max_length must be 2 or more; got 1"):
        choice_accuracy(Causal(), tok, [one], max_length=1)
    with pytest.raises(ValueError, match="mine:2: a choice needs two or more choices; got 1"):
        Choice("a", ("b",), 0, "mine:2")
    with pytest.raises(ValueError, match=r"mine:2: choices\[1\] must be a text that is not empty"):
        Choice("a", ("b", ""), 0, "mine:2")
    for answer in (-1, 2):
        with pytest.raises(
            ValueError, match=rf"mine:2: answer {answer} is out of range: 2 choices"
        ):
            Choice("a", ("b", "c"), answer, "mine:2")
    model = Causal()
    with torch.no_grad():
        model.out[0, 0] = math.nan
    with pytest.raises(ValueError, match="mine:7 or after: the loss over 2 graded tokens is NaN"):
        choice_accuracy(model, tok, [Choice("a", ("b", "c"), 0, "mine:7")])
    nameless = Tokenizer(tok.backend, {}, None)
    with pytest.raises(ValueError, match="mine:4: the context is empty and the tokenizer names"):
        choice_accuracy(Causal(), nameless, [Choice("", ("b", "c"), 0, "mine:4")])


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_files(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "left alone"},
        {"prompt": "Which? ", "choices": ["x", "y", "z"], "answer": "C"},
        {"messages": [{"role": "user", "content": "q"}], "choices": ["B", "A"], "answer": "A"},
        {"prompt": "", "choices": ["1", "2"], "answer": "1"},
    )
    one, two, three, four = read_choices(file)
    assert one == Choice([{"role": "user", "content": "Which?"}], ("x", "y"), 1, f"{file}:1")
    assert (two.context, two.answer) == ("Which? ", 2)
    assert (three.context, three.answer) == ([{"role": "user", "content": "q"}], 1)
    assert (four.context, four.answer) == ("", 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "needs one of messages, prompt and question"),
        ({"prompt": "a", "question": "b", "choices": ["a", "b"], "answer": 0}, "needs one of"),
        ({"prompt": "a", "answer": 0}, "no 'choices'; keys are"),
        ({"prompt": "a", "choices": ["a", "b"]}, "no 'answer'; keys are"),
        ({"prompt": "a", "choices": "ab", "answer": 0}, "choices must be a list of texts"),
        ({"prompt": 3, "choices": ["a", "b"], "answer": 0}, "prompt must be a text; got 3"),
        ({"prompt": "a", "choices": ["a"], "answer": 0}, "needs two or more choices; got 1"),
        ({"prompt": "a", "choices": ["a", 2], "answer": 0}, r"choices\[1\] must be a text"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": 2}, "answer 2 is out of range"),
        ({"prompt": "a", "choices": ["a", "b"], "answer": -1}, "answer -1 is out of range"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": "C"}, "answer 'C' is no choice"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": "1"}, "answer '1' is no choice"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": ""}, "answer '' is no choice"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": True}, "answer True is no choice"),
        ({"prompt": "a", "choices": ["x", "x"], "answer": "x"}, "answer 'x' is several choices"),
        ({"messages": [], "choices": ["x", "y"], "answer": 0}, "messages is an empty list"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "a", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(ValueError, match=rf"choices\.jsonl:2: .*{message}"):
        read_choices(write(tmp_path, good, row))
    with pytest.raises(FileNotFoundError, match="no data file"):
        read_choices(tmp_path / "absent.jsonl")
