"""Rows: labels, truncation, dropping, mixing and the report that counts all of it."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_core.data import SFTDataset, Tokenizer, mix
from lora_core.data.fit import split_text, truncate
from lora_core.data.grading import Graded

USER = {"role": "user", "content": "what is a function?"}
BOT = {"role": "assistant", "content": "A function maps x to y."}
CHAT = {"messages": [USER, BOT]}
Write = Callable[..., Path]


def graded(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def build(tok: Tokenizer, *rows: dict[str, Any], **options: Any) -> SFTDataset:
    return SFTDataset(rows, tok, **options)


def test_chat_rows(tok: Tokenizer, jsonl: Write) -> None:
    file = jsonl(
        CHAT, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    )
    ds = SFTDataset.from_jsonl(file, tok)
    assert len(ds) == 2
    for row, (question, answer) in zip(
        ds, [(USER["content"], BOT["content"]), ("q", "a")], strict=True
    ):
        header = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert row["input_ids"] == tok.encode(f"{header}{answer}<|im_end|>\n")
        start, end = len(tok.encode(header)), len(row["input_ids"]) - 1
        assert row["labels"] == [-100] * start + row["input_ids"][start:end] + [-100]
    assert row.keys() == {"input_ids", "labels"}
    assert ds.where == [f"{file}:1", f"{file}:2"]
    total = ds.report.total
    assert (total.read, total.kept, total.tokens) == (2, 2, sum(ds.lengths))
    assert total.graded == sum(ds.graded_counts) == sum(len(graded(row)) for row in ds)
    assert json.loads(json.dumps(ds.report.as_dict()))["sources"][0]["methods"] == {"marks": 2}


def test_rows_in_memory_equal_rows_of_a_file(tok: Tokenizer, jsonl: Write) -> None:
    rows = [CHAT, {"text": "a"}, {"prompt": "q", "completion": "a"}]
    assert list(build(tok, *rows)) == list(SFTDataset.from_jsonl(jsonl(*rows), tok))


def test_alpaca_rows_use_the_template(families: dict[str, Tokenizer]) -> None:
    row = {"instruction": "answer", "input": "this", "output": "done"}
    (made,) = build(families["alpaca"], row)
    assert "### Input:\nthis\n\n" in families["alpaca"].decode(made["input_ids"])
    (made,) = build(families["chatml"], row)
    assert "user\nanswer\n\nthis<|im_end|>" in families["chatml"].decode(made["input_ids"])


def test_completions_are_tokenised_together_and_end(tok: Tokenizer) -> None:
    ds = build(tok, {"prompt": "user asked:", "completion": " what?"})
    assert ds[0]["input_ids"] == [*tok.encode("user asked: what?"), tok.eos_id]
    assert graded(ds[0]) == [*tok.encode(" what?"), tok.eos_id]
    # a token that reaches from the prompt into the completion is not graded, and counted
    assert len(tok.encode(" function")) == 1
    ds = build(tok, {"prompt": "a func", "completion": "tion maps"})
    assert graded(ds[0]) == [*tok.encode(" maps"), tok.eos_id]
    assert ds.report.total.straddles == 1
    ds = build(tok, {"prompt": "ab", "completion": "c"}, train_on="all")
    assert ds[0]["labels"] == ds[0]["input_ids"]


def test_prompts_rendered_beforehand(tok: Tokenizer) -> None:
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    row = {"prompt": prompt, "completion": "a<|endoftext|>"}
    with pytest.raises(ValueError, match=r"no row is left.*prompt holds the control token"):
        build(tok, row)
    ds = build(tok, row, control_text="keep")
    assert ds[0]["input_ids"] == tok.encode(prompt + "a<|endoftext|>")  # one end token, not two
    assert graded(ds[0]) == tok.encode("a<|endoftext|>")


def test_bos_in_front_of_raw_text_only_once(backend: Callable[..., Any]) -> None:
    from tokenizers import processors

    made = backend(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tok = Tokenizer(made, {"bos_token": "<s>", "eos_token": "</s>"})
    ds = build(tok, {"prompt": "q", "completion": "a"}, {"text": "t"})
    assert [row["input_ids"][0] for row in ds] == [0, 0]
    assert [row["input_ids"].count(0) for row in ds] == [1, 1]
    assert ds[0]["input_ids"][:2] == tok.encode_prompt("q")  # training and serving meet
    kept = build(tok, {"prompt": "<s>q", "completion": "a"}, control_text="keep")
    assert kept[0] == ds[0]


def test_plain_text_is_graded_whole_and_split(tok: Tokenizer) -> None:
    text = "Once upon a time the user asked " * 9
    whole = [*tok.encode(text), tok.eos_id]
    ds = build(tok, {"text": text}, max_length=16)
    assert all(len(row["input_ids"]) <= 16 for row in ds)
    # every token but the very first is predicted exactly once
    assert [i for row in ds for i in graded({"labels": row["labels"][1:]})] == whole[1:]
    assert [row["labels"][0] for row in ds[1:]] == [-100] * (len(ds) - 1)
    assert (ds.report.total.split, ds.report.total.graded) == (1, len(whole) - 1)


def test_ready_tokens(tok: Tokenizer) -> None:
    ds = build(tok, {"input_ids": [5, 6, 7]}, {"input_ids": [5, 6], "labels": [-100, 6]})
    assert [row["labels"] for row in ds] == [[5, 6, 7], [-100, 6]]
    with pytest.raises(
        ValueError, match=rf"records\[0\]: input_ids\[1\] is 999; .* {len(tok)} ids"
    ):
        build(tok, {"input_ids": [1, 999]})


def test_rows_that_teach_nothing_are_dropped_counted_and_named(
    tok: Tokenizer, jsonl: Write
) -> None:
    file = jsonl(
        CHAT,
        {"messages": [USER]},
        {"messages": [USER, {**BOT, "train": False}]},
        {"input_ids": [7]},  # one token: nothing before it to predict it from
        {"messages": [{**USER, "content": "<|im_end|>"}, BOT]},
    )
    ds = SFTDataset.from_jsonl(file, tok)
    assert len(ds) == 1
    assert ds.report.total.dropped == {"no graded token": 3, "control token in the content": 1}
    assert f"3 x no graded token ({file}:2; {file}:3; {file}:4)" in str(ds.report)
    assert f"({file}:5: messages.0.content holds the control token '<|im_end|>' as text)" in str(
        ds.report
    )
    with pytest.raises(ValueError, match=r"no row is left to train on\. Left out: 1 x no graded"):
        build(tok, {"messages": [USER]})


def test_errors_carry_file_and_line(tok: Tokenizer, jsonl: Write) -> None:
    file = jsonl(CHAT, {"messages": [{"role": "user", "content": 1}]})
    with pytest.raises(ValueError, match=r"data\.jsonl:2: messages\[0\]\.content must be a string"):
        SFTDataset.from_jsonl(file, tok)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: the chat template refuses: gemma wants"):
        SFTDataset.from_jsonl(jsonl({"messages": [BOT]}), tok, template="gemma")
    with pytest.raises(
        ValueError, match=r"data\.jsonl:1: the template writes .*'<\|eot_id\|>'.*--add"
    ):
        SFTDataset.from_jsonl(jsonl(CHAT), tok, template="llama3")


def test_wrong_settings(tok: Tokenizer, jsonl: Write) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens; got 1"):
        build(tok, CHAT, max_length=1)
    with pytest.raises(ValueError, match="control_text must be drop or keep; got 'x'"):
        build(tok, CHAT, control_text="x")
    with pytest.raises(ValueError, match="template 'nope' is neither a built-in name"):
        build(tok, {"text": "a"}, template="nope")
    with pytest.raises(
        ValueError, match=r"records\[0\]: the tokenizer names no eos_token.*; name one in tok"
    ):
        build(Tokenizer(tok.backend), {"text": "a"})
    with pytest.raises(ValueError, match="no data file given"):
        SFTDataset.from_jsonl([], tok)


# --- truncation ---


@st.composite
def graded_rows(draw: st.DrawFn) -> Graded:
    flags = draw(st.lists(st.booleans(), min_size=3, max_size=40))
    flags[draw(st.integers(1, len(flags) - 1))] = True
    return Graded(list(range(100, 100 + len(flags))), flags)


@given(row=graded_rows(), length=st.integers(2, 20), keep_first=st.booleans())
def test_truncation_keeps_graded_tokens(row: Graded, length: int, keep_first: bool) -> None:
    if len(row.ids) <= length:
        return
    cut = truncate(row, length, keep_first)
    assert len(cut.ids) == length
    assert any(cut.graded[1:])
    # ids stay with their grades, in order; none is invented
    assert all(row.graded[i - 100] == keep for i, keep in zip(cut.ids, cut.graded, strict=True))
    assert cut.ids == sorted(set(cut.ids))
    body = cut.ids[1:] if keep_first else cut.ids
    assert body == list(range(body[0], body[0] + len(body)))
    assert not keep_first or cut.ids[0] == 100
    places = [i for i, keep in enumerate(row.graded) if keep and i > 0]
    if places[-1] - places[0] + 1 < length:
        kept = {i - 100 for i, keep in zip(cut.ids[1:], cut.graded[1:], strict=True) if keep}
        assert kept == set(places)


def test_which_end_is_cut(tok: Tokenizer, families: dict[str, Tokenizer]) -> None:
    long = {"role": "user", "content": "time " * 50}
    ds = build(tok, {"messages": [long, BOT]}, max_length=24)
    assert tok.decode(graded(ds[0])) == "A function maps x to y.<|im_end|>"
    assert (
        ds[0]["input_ids"][-1] == tok.encode("<|im_end|>")[0]
    )  # the line break after it went first
    assert (ds.report.total.truncated, ds.report.total.graded_cut) == (1, 0)
    # an answer that cannot fit: a quarter of prompt, then its beginning, and no end token made up
    ds = build(tok, {"messages": [long, {**BOT, "content": "x y " * 50}]}, max_length=24)
    assert ds[0]["labels"][:6] == [-100] * 6
    assert graded(ds[0]) == tok.encode("x y " * 50)[:18]
    assert ds.report.total.graded_cut == len(tok.encode("x y " * 50 + "<|im_end|>")) - 18
    # BOS stays in front
    llama = families["llama3"]
    ds = build(llama, {"messages": [long, BOT]}, max_length=24)
    assert ds[0]["input_ids"].count(llama.bos_id) == 1
    assert ds[0]["input_ids"][0] == llama.bos_id


@given(st.integers(2, 60), st.integers(2, 20))
def test_split_text_grades_every_token_once(count: int, length: int) -> None:
    parts = split_text(Graded(list(range(count)), [True] * count), length)
    assert all(2 <= len(part.ids) <= length for part in parts)
    predicted = [i for part in parts for i in part.ids[1:]]
    assert predicted == list(range(1, count))
    assert all(part.ids[0] == before.ids[-1] for before, part in pairwise(parts))


# --- mixing ---


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 4)), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_mix_shows_each_row_weight_times(sources: list[tuple[int, float]], seed: int) -> None:
    assume(all(round(weight * length) for length, weight in sources if weight < 1))
    lengths, weights = zip(*sources, strict=True)
    order = mix(lengths, weights, seed)
    assert order == mix(lengths, weights, seed)
    times = Counter(order)
    for source, (length, weight) in enumerate(sources):
        per_row = [times[source, row] for row in range(length)]
        assert sum(per_row) == int(weight) * length + round((weight - int(weight)) * length)
        assert set(per_row) <= {int(weight), int(weight) + 1}


def test_mix_orders() -> None:
    assert mix([3], [1.0]) == [(0, 0), (0, 1), (0, 2)]
    assert sorted(mix([2, 2], [1.0, 1.0])) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert mix([20, 20], [1.0, 1.0], 0) != mix([20, 20], [1.0, 1.0], 1)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a data weight must be positive; got"):
            mix([1], [bad])
    with pytest.raises(ValueError, match=r"0\.01 shows none of the 10 rows of source 1; raise it"):
        mix([3, 10], [1.0, 0.01])
    assert mix([3, 0], [1.0, 0.01]) != []  # what has no rows is reported elsewhere


def test_sources_are_named_and_weighted(tok: Tokenizer, jsonl: Write) -> None:
    one = jsonl(*[{"text": f"one {i}"} for i in range(10)], name="one.jsonl")
    two = jsonl(*[{"text": f"two {i}"} for i in range(4)], name="two.jsonl")
    ds = SFTDataset.from_jsonl([(one, 0.5), (two, 3)], tok, seed=1)
    assert Counter(row["source"] for row in ds) == {"one.jsonl": 5, "two.jsonl": 12}
    assert [ds.names[i] for i in ds.source] == [row["source"] for row in ds]
    assert all(tok.decode(row["input_ids"]).startswith(row["source"][:3]) for row in ds)
    assert list(ds) == list(SFTDataset.from_jsonl([(one, 0.5), (two, 3)], tok, seed=1))
    assert list(ds) != list(SFTDataset.from_jsonl([(one, 0.5), (two, 3)], tok, seed=2))
    assert [s.read for s in ds.report.sources] == [10, 4]
    joined = SFTDataset.from_jsonl([one, two], tok)
    assert len(joined) == 14
    assert "source" not in SFTDataset.from_jsonl((one, 2.0), tok)[0]
    assert SFTDataset.from_jsonl([one, one], tok).names == [f"{one}#0", f"{one}#1"]


def test_views(tok: Tokenizer) -> None:
    ds = build(tok, *[{"text": str(i)} for i in range(5)])
    assert list(ds.select([3, 1])) == [ds[3], ds[1]]
    assert list(ds[1:4:2]) == [ds[1], ds[3]]
    assert ds[-1] == ds[4]
    assert ds[1:][1:].where == ["records[2]", "records[3]", "records[4]"]
    with pytest.raises(IndexError):
        ds[5]


def test_progress_wraps_the_records(tok: Tokenizer, jsonl: Write) -> None:
    seen = []

    def watch(records: Any) -> Any:
        for record in records:
            seen.append(record.where)
            yield record

    ds = SFTDataset.from_jsonl(jsonl(CHAT, CHAT), tok, progress=watch)
    assert seen == ds.where


def test_a_dated_template_is_noted(tok: Tokenizer) -> None:
    dated = "{{ strftime_now('%Y') }}" + str(tok.chat_template)
    assert "writes today's date" in str(build(tok, CHAT, template=dated).report)
