"""The benchmark of generation: it runs, refuses wrong tokens, and its figures are what they say."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def generation(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("generation")


@pytest.fixture
def case(generation: ModuleType, tmp_path: Path) -> Any:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    where = str(tmp_path)
    return generation.Case(
        "made up", "dense", where, where, "none", where, "float32", (2,), 10, 5, 3
    )


def result(tokens: list[list[int]]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "prefill": [0.1, 0.1, 0.1],
        "all": [0.5, 0.5, 0.5],
        "peak_bytes": 100,
        "above_bytes": 7,
    }


@pytest.mark.oracle
def test_the_smoke_run_compares_both_stacks(
    generation: ModuleType,
    oracle: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("transformers", "peft", "bitsandbytes"):
        oracle(name)
    monkeypatch.setattr("sys.argv", ["generation", "--smoke", "--only", "lora"])
    assert generation.main() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert all(row[0] == "random" and len(row) == 10 for row in rows)
    found = {tuple(row[1:5]) for row in rows}
    assert found == {
        (weights, "lora", batch, stack)
        for weights in ("dense", "nf4")
        for batch in "12"
        for stack in ("transformers", "lora_core")
    }
    ours = [row for row in rows if row[4] == "lora_core"]
    assert all(row[-1] == "100%" for row in ours)


def test_wrong_tokens_are_not_reported(
    generation: ModuleType, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"transformers": [[1, 2, 3], [4, 5, 6]], "lora_core": [[1, 2, 3], [4, 5, 7]]}
    assert generation.compare(case, lambda stack, _: {"2": result(answers[stack])}) == []
    assert "batch 2: not reported: row 1, token 2: 7 and 6" in capsys.readouterr().out


def test_a_peer_that_fails_leaves_ours_checked_against_equal_weights(
    generation: ModuleType, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    case = dataclasses.replace(case, weights="nf4", equal=case.folder + "/.")
    asked = []

    def run(stack: str, given: Any) -> dict[str, Any]:
        asked.append((stack, given.folder == given.equal))
        if stack == "transformers" and given.folder != given.equal:
            raise RuntimeError("no kernel")
        return {"2": result([[1], [2]])}

    rows = generation.compare(case, run)
    assert [row["stack"] for row in rows] == ["lora_core"]
    assert asked == [("transformers", False), ("lora_core", False), ("transformers", True)]
    assert "transformers: not timed: no kernel" in capsys.readouterr().out


def test_figures_are_tokens_a_second(generation: ModuleType, case: Any) -> None:
    row = generation.summary(case, "lora_core", 2, result([[1], [2]]), 1.0)
    assert row["prefill_tokens_per_second"] == pytest.approx(2 * 10 / 0.1)
    assert row["decode_tokens_per_second"] == pytest.approx(2 * 4 / 0.4)
    assert (row["peak_bytes"], row["above_bytes"], row["in_common"]) == (100, 7, 1.0)


def test_the_share_in_common_ends_where_a_row_parts(generation: ModuleType) -> None:
    assert generation.in_common([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 3, 4], [5, 6, 7, 8]]) == 5 / 8
    assert generation.first_difference([[1]], [[1]]) is None
