"""`lora-core inspect`, called as the dispatcher calls it."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.cli import inspect
from lora_core.data import Tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "é🙂\n"},
    ]
}


@pytest.fixture
def folder(tok: Tokenizer, tmp_path: Path) -> Path:
    tok.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args([str(word) for word in words]))


def test_samples_token_by_token(
    folder: Path, jsonl: Callable[..., Path], tok: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(CHAT, CHAT)
    assert run("--model", folder, "--data", file, "--limit", 1) == 0
    out = capsys.readouterr().out
    assert out.count("graded\n") == 1 + sum(
        label != -100 for label in tok.encode("é🙂\n<|im_end|>")
    )
    assert "'<|im_start|>'" in out
    assert "\033[" not in out  # colour only on a terminal
    rows = [line.split() for line in out.splitlines() if line.startswith("  '<|im_end|>'")]
    assert [row[1:] for row in rows] == [["2", "-100"], ["2", "2", "graded"]]
    assert "2 records, 2 rows" in out


def test_colour_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.print_sample(
        "x:1", [{"token": "'a'", "id": 1, "label": 1, "graded": True}], colour=True
    )
    assert "\033[32m  'a'" in capsys.readouterr().out


def test_json(
    folder: Path, jsonl: Callable[..., Path], tok: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(CHAT, {"messages": CHAT["messages"][:1]}, CHAT, {"text": "other text"})
    run("--model", folder, "--data", file, "--json", "--summary", "--limit", 1)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    (sample,) = found["samples"]
    assert sample["where"] == f"{file}:1"
    assert [token["id"] for token in sample["tokens"]] == tok.encode(tok.render(CHAT["messages"]))
    assert all(
        token["graded"] == (token["label"] == token["id"]) == (token["label"] != -100)
        for token in sample["tokens"]
    )
    summary = found["summary"]
    assert (summary["rows"], summary["duplicate_groups"], summary["duplicate_rows"]) == (3, 1, 1)
    assert summary["eval_rows_in_train"] == 0
    assert summary["lengths"]["100%"] == max(
        len(tok.encode(tok.render(CHAT["messages"]))), len(tok.encode("other text")) + 1
    )
    assert found["report"]["sources"][0]["dropped"] == {"no graded token": 1}


def test_summary_finds_overlap_between_files(
    folder: Path, jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, held_out = jsonl(CHAT, CHAT, name="a.jsonl"), jsonl(CHAT, name="b.jsonl")
    run("--model", folder, "--data", data, "--eval-data", held_out, "--summary")
    out = capsys.readouterr().out
    assert "eval rows in train      1" in out
    assert "eval prompts in train   1" in out
    assert f"overlap at              {held_out}:1" in out
    assert "token  " not in out  # a summary alone prints no samples
    run("--model", folder, "--data", data, "--summary")
    assert "eval rows               0" in capsys.readouterr().out
    run("--model", folder, "--data", data, "--summary", "--max-length", 12)
    out = capsys.readouterr().out
    assert "truncated rows          2" in out
    assert "2 rows cut to 12 tokens (0 graded tokens lost); the longest has" in out


def test_options_reach_the_data(folder: Path, jsonl: Callable[..., Path], capsys: Any) -> None:
    file = jsonl({"q": "x", "a": "y"})
    run("--model", folder, "--data", f"{file}:2", "--columns", "prompt=q,completion=a", "--json")
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 2
    chat = jsonl(CHAT)
    with pytest.raises(ValueError, match=r"--add-tokens '<end_of_turn>,<start_of_turn>'"):
        run("--model", folder, "--data", chat, "--template", "gemma")
    words = ["--template", "gemma", "--add-tokens", "<end_of_turn>,<start_of_turn>"]
    assert run("--model", folder, "--data", chat, *words) == 0
    with pytest.raises(ValueError, match="--limit must be 0 or more"):
        run("--model", folder, "--data", chat, "--limit", -1)
    with pytest.raises(FileNotFoundError, match="no folder"):
        run("--model", folder / "no", "--data", chat)
