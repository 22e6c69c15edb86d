"""The tables and the page: one seed, several, failures, and names that would break a table."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.compare import CompareConfig, compare, leave
from lora_core.compare.rows import rows_of
from lora_core.compare.table import (
    aligned,
    cost_columns,
    failures,
    markdown,
    notes,
    quality_columns,
    shown_measures,
)
from lora_core.evaluate.estimate import Estimate


def record(name: str, seed: int = 0, quality: float = 0.5, **more: Any) -> dict[str, Any]:
    def facts(value: float) -> dict[str, Any]:
        return Estimate(value, 10, value - 0.1, value + 0.1).facts()

    latency = {"first_token": 0.02, "per_token": 0.004, "fastest": 0, "slowest": 1, "rounds": 3}
    trained = {
        "forgetting": facts(0.25),
        "trainable": 50,
        "train_seconds": 12.34,
        "tokens_per_second": 999.6,
        "bytes": 1234,
        "mergeable": True,
        "latency": {"base": {**latency, "per_token": 0.003}, "unmerged": latency}
        | {"merged": {**latency, "per_token": 0.0031}},
    }
    plain = {"trainable": 0, "mergeable": None, "latency": {"base": latency}}
    method = name.split()[0]
    return {
        "fingerprint": f"{name}{seed}",
        "status": "done",
        "name": name,
        "method": method,
        "seed": seed,
        "swept": {},
        "settings": {"virtual_tokens": 5} if method == "prompt" else {"lr": 0.004},
        "parameters": 1000,
        "memory": 7_600_000,
        "memory_whole": 207_600_000,
        "quality": {"exact_match": facts(quality), "rouge1": facts(0.1), "rougeL": facts(0.2)},
        "loss": facts(1.5),
        "prompt_tokens": facts(70.0),
        "unmergeable": None,
        **(plain if method in ("zero-shot", "few-shot") else trained),
        **more,
    }


def failed(name: str, seed: int = 0) -> dict[str, Any]:
    whole = record(name, seed)
    kept = {k: whole[k] for k in ("fingerprint", "name", "method", "seed", "swept", "settings")}
    return {**kept, "status": "failed", "failed": "out of memory"}


def table(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table as {first cell: {heading: cell}}."""
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()]
    assert {len(line) for line in lines} == {len(lines[0])}
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_one_seed_shows_intervals() -> None:
    rows = rows_of([record("zero-shot"), record("lora", quality=0.75), record("prompt")])
    found = table(markdown(quality_columns(rows), rows))
    assert found["lora"] == {
        "variant": "lora",
        "exact_match": "0.75 [0.65, 0.85]",
        "rougeL": "0.20 [0.10, 0.30]",
        "loss (nats/token)": "1.50 [1.40, 1.60]",
        "forgetting (bits/byte)": "0.25 [0.15, 0.35]",
    }
    assert found["zero-shot"]["forgetting (bits/byte)"] == "0, as untrained"
    cost = table(markdown(cost_columns(), rows))
    assert cost["lora"] == {
        "variant": "lora",
        "trained": "50",
        "share": "5.00%",
        "rate": "0.004",
        "peak memory (MB)": "8",
        "of the whole process": "208",
        "training (s)": "12.3",
        "tokens/s": "1,000",
        "tokens a request": "70",
        "first token (ms)": "20",
        "ms a token": "4",
        "merged": "3.1",
        "adapter off": "3",
        "on disk (bytes)": "1,234",
        "mergeable": "yes",
    }
    assert cost["prompt"]["tokens a request"] == "75"  # five virtual ones
    assert cost["zero-shot"]["adapter off"] == "–"
    assert "one seed" in notes(rows)[0]


def test_several_seeds_show_their_spread() -> None:
    rows = rows_of([record("lora", 0, 0.5), record("lora", 1, 0.75), failed("lora", 2)])
    (row,) = rows
    found = table(markdown(quality_columns(rows), rows))
    assert found["lora"]["exact_match"] == "0.62 [0.50, 0.75]"
    quality = row.quality("exact_match")
    assert isinstance(quality, Estimate)
    assert (quality.count, quality.unit) == (2, "seeds")
    assert notes(rows)[0].startswith("mean over 2 seeds [least, greatest]")
    assert failures(rows) == ["lora (seed 2) failed: out of memory"]


def test_a_failure_is_a_row_that_says_so() -> None:
    rows = rows_of([failed("lora")])
    found = table(markdown(cost_columns(), rows))["lora"]
    assert found["trained"] == "failed"
    assert found["mergeable"] == "–"
    assert table(markdown(quality_columns(rows), rows))["lora"]["loss (nats/token)"] == "failed"
    assert shown_measures(rows) == []


def test_what_is_drawn_is_in_the_table() -> None:
    """Of ROUGE's kinds one is shown, and it is not the first that is measured."""
    facts = record("lora")["quality"]
    rows = rows_of(
        [record("lora", quality=0.5) | {"quality": {"rouge1": facts["rouge1"], **facts}}]
    )
    assert next(iter(rows[0].done[0]["quality"])) == "rouge1"
    assert shown_measures(rows) == ["exact_match", "rougeL"]


def test_names_do_not_break_the_table() -> None:
    name = "lora targets=a|b"
    rows = rows_of([record(name)])
    text = markdown(quality_columns(rows), rows)
    assert "lora targets=a\\|b" in text
    lines = aligned(quality_columns(rows), rows)
    assert len(lines) == 2
    assert lines[0].index("exact_match") + len("exact_match") == lines[1].index("]") + 1


@pytest.mark.filterwarnings("error")
def test_the_files(make_config: Callable[..., CompareConfig], in_process: Any) -> None:
    config = make_config(
        methods=("lora", "system-prompt"),
        sweep={"r": (1, 2), "targets": ("attention", "q_proj")},
        system="Add.\n# Not a heading",
    )
    found = compare(config, worker=in_process)
    files = {file.name for file in leave(found)}
    assert files == {
        "compare.json",
        "compare.md",
        "compare.png",
        "sweep-r.png",
        "sweep-targets.png",
        "report.html",
    }
    out = Path(config.out)
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    told = json.loads((out / "compare.json").read_text())
    assert [v["name"] for v in told["variants"]] == [
        "lora r=1 targets=attention",
        "lora r=1 targets=q_proj",
        "lora r=2 targets=attention",
        "lora r=2 targets=q_proj",
        "system-prompt",
    ]
    assert "\n* system-prompt: Add. # Not a heading\n" in (out / "compare.md").read_text()
    assert told["failed"] == []
    swept = told["variants"][0]
    assert swept["swept"] == {"r": 1, "targets": "attention"}
    assert swept["quality"]["f1"]["count"] == 3
    assert math.isfinite(swept["forgetting"]["value"])
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    for wanted in ("What each gives", "lora r=1 targets=q_proj", "It is 24.", "training loss"):
        assert wanted in page
