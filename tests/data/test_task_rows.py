"""Rows for heads: what a file holds, where labels stand, windows, what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lora_core.data import Tokenizer, load_tokenizer
from lora_core.data.task_encoding import TaskEncoder, TaskRow, _first_pieces
from lora_core.data.task_frame import Frame
from lora_core.data.task_records import QuestionExample, WordsExample
from lora_core.data.task_rows import TaskData, graded, read_task

Write = Callable[..., Path]
WORDS = ["the", "cats", "dog", "ran", "rome", "zzz", "is", "farer"]


@pytest.fixture(scope="module")
def bert(encoder_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(encoder_tokenizer_folder)


@pytest.fixture(scope="module")
def causal(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


def shown(tok: Tokenizer, row: TaskRow) -> str:
    return " ".join(str(tok.token(i)) for i in row["input_ids"])


# --- sequences ---


def test_texts_and_pairs_in_an_encoders_frame(bert: Tokenizer, jsonl: Write) -> None:
    file = jsonl(
        {"text": "The cat sat", "label": "b"},
        {"text": "the dogs", "text_pair": "ran far", "label": "a"},
    )
    task = read_task(file, bert, "topic")
    assert (task.name, task.kind, task.labels) == ("topic", "sequence", ["a", "b"])
    assert shown(bert, task.rows[0]) == "[CLS] the cat sat [SEP]"
    assert shown(bert, task.rows[1]) == "[CLS] the dog ##s [SEP] ran far [SEP]"
    assert task.rows[1]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    batch = task.collate(task.rows)
    assert batch["task"] == "topic"
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 8]
    assert batch["token_type_ids"].tolist() == [[0] * 8, [0] * 5 + [1] * 3]
    assert graded(batch) == 2


def test_a_decoders_texts_stand_alone_and_pairs_are_joined(causal: Tokenizer, jsonl: Write) -> None:
    file = jsonl(
        {"text": "ab", "label": 10},
        {"text": "ab", "text_pair": "c", "label": 9},
        {"text": "x", "label": 9},
    )
    task = read_task(file, causal)
    assert task.labels == ["9", "10"]  # integers by value
    assert "token_type_ids" not in task.rows[0]
    assert causal.decode(task.rows[0]["input_ids"]) == "ab"
    assert causal.decode(task.rows[1]["input_ids"]) == "ab\nc<|im_end|>"
    assert task.name == "data"


def test_several_labels_and_numbers(bert: Tokenizer, jsonl: Write) -> None:
    many = read_task(
        jsonl({"text": "cat", "label": ["x", "y"]}, {"text": "dog", "label": []}), bert
    )
    assert (many.labels, many.problem) == (["x", "y"], "multi_label_classification")
    assert many.collate(many.rows)["labels"].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    numbers = read_task(jsonl({"text": "cat", "label": 1}, {"text": "dog", "label": 2.5}), bert)
    assert (numbers.labels, numbers.problem) == ([], "regression")
    batch = numbers.collate(numbers.rows)
    assert batch["labels"].tolist() == [1.0, 2.5]
    assert graded(batch) == 2


def test_long_texts_are_cut_the_longer_one_first(bert: Tokenizer, jsonl: Write) -> None:
    file = jsonl(
        {"text": "the cat sat on a mat", "text_pair": "dog ran", "label": "a"},
        {"text": "the cat sat on a mat", "label": "b"},
    )
    task = read_task(file, bert, max_length=7)
    assert shown(bert, task.rows[0]) == "[CLS] the cat [SEP] dog ran [SEP]"
    assert shown(bert, task.rows[1]) == "[CLS] the cat sat on a [SEP]"
    assert str(task) == "data (sequence of 2 labels): 2 texts; 2 texts were cut to max_length"


def test_a_control_token_in_a_text_is_text(bert: Tokenizer, jsonl: Write) -> None:
    task = read_task(jsonl({"text": "[SEP]", "label": "a"}, {"text": "cat", "label": "b"}), bert)
    assert task.rows[0]["input_ids"].count(2) == 1  # the frame's own
    assert bert.encode("[SEP]") == [2]  # and the tokenizer is as it was


# --- tokens ---


def test_a_words_label_stands_on_its_first_piece(bert: Tokenizer, jsonl: Write) -> None:
    task = read_task(jsonl({"tokens": ["cats", "ran", "far"], "tags": ["B-X", "O", "I-X"]}), bert)
    assert task.labels == ["B-X", "I-X", "O"]
    assert shown(bert, task.rows[0]) == "[CLS] cat ##s ran far [SEP]"
    assert task.rows[0]["labels"] == [-100, 0, -100, 2, 1, -100]
    assert task.rows[0]["words"] == [-1, 0, -1, 1, 2, -1]
    assert graded(task.collate(task.rows)) == 3


def test_words_are_read_as_text_with_its_spaces(causal: Tokenizer, jsonl: Write) -> None:
    task = read_task(jsonl({"tokens": ["module", "weights"], "tags": ["A", "B"]}), causal)
    assert task.rows[0]["input_ids"] == causal.encode("module weights")


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=16), length=st.integers(6, 9))
@example(words=["cats", "cats", "farer", "dog", "cats", "rome", "cats", "cats"], length=6)
@example(words=["the", "cats", "the", "cats", "cats"], length=7)
def test_every_word_is_graded_once_however_rows_are_cut(
    encoder_tokenizer_folder: Path, words: list[str], length: int
) -> None:
    tok = load_tokenizer(encoder_tokenizer_folder)
    encoder = TaskEncoder(tok, length, ["a", "b"], "single_label_classification", None, 0)
    tags = tuple("ab"[i % 2] for i in range(len(words)))
    rows = encoder.rows(WordsExample("f:1", tuple(words), tags), 0)
    seen = [word for row in rows for word in row["words"] if word >= 0]
    assert seen == list(range(len(words)))
    for row in rows:
        assert len(row["input_ids"]) <= length
        assert row["words"][1] >= 0  # cut between words
        for word, label in zip(row["words"], row["labels"], strict=True):
            assert label == (-100 if word < 0 else word % 2)
    inner = [i for row in rows for i in row["input_ids"][1:-1]]
    assert inner == tok.encode(" ".join(words))


def test_a_token_over_two_words_is_the_first_ones() -> None:
    assert _first_pieces(["ab", "cd", "e"], [(0, 5), (5, 7)]) == [0, 2]


def test_a_word_without_a_token_is_counted(bert: Tokenizer, jsonl: Write) -> None:
    file = jsonl({"tokens": ["cat", "\u200b", "dog"], "tags": ["A", "B", "A"]})
    task = read_task(file, bert)
    assert task.rows[0]["labels"] == [-100, 0, 0, -100]
    assert "1 words have no token of their own" in str(task)


# --- spans ---

CONTEXT = "the cat sat on a mat . the dogs ran far in rome"


def question(answer: str | None, context: str = CONTEXT) -> dict[str, Any]:
    answers = [] if answer is None else [{"text": answer, "start": context.index(answer)}]
    return {"question": "who ?", "context": context, "answers": answers}


def test_answers_become_tokens_of_both_ways_of_writing(bert: Tokenizer, jsonl: Write) -> None:
    squad = {"text": ["dogs ran"], "answer_start": [CONTEXT.index("dogs")]}
    file = jsonl(question("dogs ran"), {**question(None), "answers": squad}, question(None))
    task = read_task(file, bert)
    assert (task.kind, task.labels) == ("span", [])
    first, second, none = task.rows
    tokens = shown(bert, first).split()
    assert tokens[:4] == ["[CLS]", "who", "?", "[SEP]"]
    assert tokens[first["start"] : first["end"] + 1] == ["dog", "##s", "ran"]
    assert (second["start"], second["end"]) == (first["start"], first["end"])
    assert (none["start"], none["end"]) == (0, 0)
    assert graded(task.collate(task.rows)) == 3


def test_a_decoder_without_an_answer_points_to_its_last_token(
    causal: Tokenizer, jsonl: Write
) -> None:
    task = read_task(jsonl(question(None), question("dogs ran")), causal)
    row, last = task.rows[0], len(task.rows[0]["input_ids"]) - 1
    assert row["input_ids"][-1] == causal.eos_id
    assert (row["start"], row["end"]) == (last, last)
    begin, end = task.rows[1]["start"], task.rows[1]["end"]
    assert causal.decode(task.rows[1]["input_ids"][begin : end + 1]).strip() == "dogs ran"


@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=20),
    at=st.integers(0, 19),
    length=st.integers(9, 14),
    overlap=st.integers(0, 8),
)
@example(
    words=["the", "dog", "cats", "is", "cats", "ran", "the", "rome"], at=4, length=9, overlap=1
)
@example(words=["dog"] * 16 + ["cats"], at=16, length=9, overlap=8)
def test_windows_cover_the_context_and_find_the_answer(
    encoder_tokenizer_folder: Path, words: list[str], at: int, length: int, overlap: int
) -> None:
    tok = load_tokenizer(encoder_tokenizer_folder)
    context = " ".join(words)
    word = words[at % len(words)]
    start = len(" ".join(words[: at % len(words)])) + (at % len(words) > 0)
    encoder = TaskEncoder(tok, length, [], "", None, overlap)
    asked = QuestionExample("f:1", "who ?", context, ((word, start),))
    rows = encoder.rows(asked, 0)
    # each window goes on by half its room at least
    assert len(rows) <= 2 + len(tok.encode(context)) // ((length - 5) // 2)
    covered = set()
    for row in rows:
        assert len(row["input_ids"]) == len(row["offsets"]) <= length
        places = [place for place in row["offsets"] if place[0] >= 0]
        covered |= {i for a, b in places for i in range(a, b)}
        if row["start"]:
            begin, end = row["offsets"][row["start"]][0], row["offsets"][row["end"]][1]
            assert (begin, context[begin:end]) == (start, word)
        else:  # it is not whole in here
            assert (row["start"], row["end"]) == (0, 0)
            assert not {*range(start, start + len(word))} <= {
                i for a, b in places for i in range(a, b)
            }
    assert {i for i, char in enumerate(context) if char != " "} <= covered


# --- evaluation data, predictions, splits ---


def test_evaluation_has_the_labels_of_training(bert: Tokenizer, jsonl: Write) -> None:
    train = read_task(
        jsonl({"text": "cat", "label": "pet"}, {"text": "rome", "label": "place"}), bert
    )
    held = read_task(jsonl({"text": "oslo", "label": "place"}, name="e.jsonl"), bert, like=train)
    assert (held.name, held.labels, held.rows[0]["label"]) == ("data", ["pet", "place"], 1)
    bad = jsonl(
        {"text": "oslo", "label": "place"}, {"text": "cat", "label": "pets"}, name="f.jsonl"
    )
    with pytest.raises(ValueError, match=r"f\.jsonl:2: label 'pets' is not among the 2 .*'pet'"):
        read_task(bad, bert, like=train)
    with pytest.raises(ValueError, match=r"holds rows for a token head; data is a sequence task"):
        read_task(jsonl({"tokens": ["a"], "tags": ["O"]}, name="g.jsonl"), bert, like=train)


def test_predictions_need_no_labels(bert: Tokenizer, jsonl: Write) -> None:
    task = read_task(jsonl({"text": "cat", "label": 3}, {"text": "dog"}), bert, labelled=False)
    assert task.labels == []
    assert "labels" not in task.collate(task.rows)
    assert graded(task.collate(task.rows)) == 0


def test_a_split_goes_by_example_and_keeps_equal_texts_together(
    bert: Tokenizer, jsonl: Write
) -> None:
    rows = [question("rome"), question("cat"), *(question(None, f"the {w} sat") for w in WORDS)]
    task = read_task(jsonl(*rows), bert, max_length=12, overlap=0)
    assert len(task.rows) > len(task.examples)
    train, held = task.split(0.2, seed=3)
    contexts = [{e.context for e in part.examples} for part in (train, held)]  # type: ignore[union-attr]
    assert contexts[0].isdisjoint(contexts[1])
    assert len(train.examples) + len(held.examples) == len(task.examples)
    assert len(train.rows) + len(held.rows) == len(task.rows)
    for part in (train, held):
        assert {row["example"] for row in part.rows} == set(range(len(part.examples)))
    one = read_task(jsonl(question("rome"), question("cat")), bert)
    with pytest.raises(ValueError, match="nothing would be left to train on"):
        one.split(0.5)


def test_names_without_dots_and_other_columns(bert: Tokenizer, jsonl: Write) -> None:
    file = jsonl(
        {"sentence": "cat", "class": "a"}, {"sentence": "dog", "class": "b"}, name="my.topic.jsonl"
    )
    task = read_task(file, bert, columns={"text": "sentence", "label": "class"})
    assert (task.name, task.labels) == ("my_topic", ["a", "b"])


# --- what is refused ---

TEXT = {"text": "cat", "label": "a"}
TAGS = {"tokens": ["a", "b"], "tags": ["O", "O"]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x"}], r":1: keys \['prompt'\] are for no head \(text/label, tokens/tags,"),
        ([{"text": "x"}], r":1: text without label"),
        ([TEXT, TAGS], r":2: a row for a token head in a file of rows for a sequence head"),
        ([TEXT, TEXT], r":1: 'a' is the only label: there is nothing to tell apart"),
        ([{"text": 3, "label": "a"}], r":1: text must be a string; got int"),
        ([TEXT, {"text": "x", "label": True}], r":2: label must be text or an integer; got bool"),
        ([TEXT, {"text": "x", "label": ""}], r":2: label is empty"),
        ([TEXT, {"text": "x", "label": ["b"]}], r":1: label must be a list, as in other rows"),
        ([{"text": "x", "label": ["b", "b"]}], r":1: label names one twice"),
        ([{"text": "x", "label": 0.5}, TEXT], r":2: label must be a number, as in other rows"),
        ([{"text": "x", "label": math.inf}], r":1: label is inf: a value to predict must be"),
        ([{"tokens": ["a"], "tags": ["O", "O"]}], r":1: 1 tokens but 2 tags"),
        ([{"tokens": ["a", " "], "tags": ["O", "O"]}], r":1: tokens\[1\] must be a word; got ' '"),
        ([{"tokens": [], "tags": []}], r":1: tokens is empty"),
        ([{"tokens": "ab", "tags": ["O"]}], r":1: tokens must be a list; got str"),
        ([{**question(None), "question": " "}], r":1: question is empty"),
        ([{**question(None), "answers": "rome"}], r":1: answers must be an object or a list"),
        ([{**question(None), "answers": {"text": ["a"]}}], r':1: answers must hold lists "text"'),
        (
            [{**question(None), "answers": {"text": ["a"], "answer_start": []}}],
            r":1: answers has 1 texts but 0 starts",
        ),
        ([{**question(None), "answers": ["a"]}], r":1: answers\[0\] must be an object"),
        ([{**question(None), "answers": [{"text": "a"}]}], r"\[0\]: its start must be a character"),
        ([{**question(None), "answers": [{"text": " ", "start": 0}]}], r"\[0\] must be text"),
        (
            [question("cat"), {**question(None), "answers": [{"text": "cat", "start": 5}]}],
            r":2: answers\[0\] 'cat' is not at character 5 \('at '\): it stands at 4",
        ),
        (
            [{**question(None), "answers": [{"text": "bird", "start": 5}]}],
            r"it stands nowhere in the context",
        ),
    ],
)
def test_bad_rows_are_named(rows: list[Any], message: str, bert: Tokenizer, jsonl: Write) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl" + r".*" * (message[0] != ":") + message):
        read_task(jsonl(*rows), bert)


def test_settings_that_leave_no_room(bert: Tokenizer, jsonl: Write) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 5: this tokenizer puts 3"):
        read_task(jsonl(TEXT, {"text": "x", "label": "b"}), bert, max_length=4)
    with pytest.raises(ValueError, match="overlap must not be negative; got -1"):
        read_task(jsonl(question(None)), bert, overlap=-1)
    with pytest.raises(ValueError, match="a batch needs at least one row"):
        TaskData("a", "sequence", [], []).collate([])


def test_an_empty_text_of_a_decoder_is_refused(causal: Tokenizer, jsonl: Write) -> None:
    file = jsonl({"text": "x", "label": "a"}, {"text": "", "label": "b"})
    with pytest.raises(ValueError, match=r":2: the text has no tokens"):
        read_task(file, causal)


def test_the_frame_is_the_tokenizers_own(bert: Tokenizer) -> None:
    frame = Frame.of(bert)
    for texts in (["cat"], ["cats", "ran far"]):
        own = bert.backend.encode(*texts, add_special_tokens=True)
        parts = [bert.encode(text) for text in texts]
        assert frame.ids(*parts) == own.ids
        assert (frame.types(*parts) or [0] * len(own.ids)) == own.type_ids
    assert torch.tensor(frame.extra(2)) == 3
