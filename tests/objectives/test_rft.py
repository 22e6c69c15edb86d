"""rft: answers sampled and accepted, or rows weighted by their rewards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.cli.main import main

REWARD = "def odd(completion): return len(completion) % 2\ndef never(completion): return 0\n"


@pytest.fixture
def run(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `finetune --objective rft` into tmp_path/out; exit code and what it said."""
    (tmp_path / "reward.py").write_text(REWARD)

    def go(rows: list[dict[str, Any]], *more: str, out: str = "out") -> tuple[int, str]:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["finetune", "--objective", "rft", "--model", str(llama_folder)]
        words += ["--data", str(data), "--out", str(tmp_path / out), "--steps", "2"]
        words += ["--batch-size", "2", "--accumulate", "1", "--progress", "false"]
        code = main([*words, *more])
        return code, capsys.readouterr().err

    return go


PROMPTS = [{"prompt": f"Say {i}:"} for i in range(4)]


def sampling(tmp_path: Path, function: str = "odd") -> list[str]:
    words = ["--reward", f"{tmp_path / 'reward.py'}:{function}", "--max-new-tokens", "5"]
    return [*words, "--keep-cut", "--group-size", "3"]


def test_accepted_answers_are_trained_on_and_not_sampled_anew(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = run(PROMPTS, *sampling(tmp_path), "--save-every", "1")
    assert code == 0
    path = tmp_path / "out" / "candidates.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    assert all(row["reward"] == 1 and len(row["completion"]) % 2 for row in rows)
    assert f"trained on {len(rows)} accepted answers" in said
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["candidates"]
    assert facts["kept"] == len(rows)
    assert facts["sampled"] == 12

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled anew")

    monkeypatch.setattr("lora_core.objectives.answers.generate_ids", refuse)
    code, said = run(PROMPTS, *sampling(tmp_path), "--steps", "2", "--resume")
    assert code == 0, said


def test_the_policy_answers_as_it_starts(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    words = sampling(tmp_path)
    assert run(PROMPTS, *words, "--lr", "0.05")[0] == 0
    assert run(PROMPTS, *words, "--method", "prompt", out="prompt")[0] == 0
    first, soft = ((tmp_path / name / "candidates.jsonl").read_text() for name in ("out", "prompt"))
    assert first == soft  # a fresh soft prompt is off while answers are sampled
    again = ["--adapter", str(tmp_path / "out")]
    assert run(PROMPTS, *words, *again, out="again")[0] == 0
    assert (tmp_path / "again" / "candidates.jsonl").read_text() != first


def test_none_accepted_is_one_line(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, said = run(PROMPTS, *sampling(tmp_path, "never"))
    assert code == 1
    (last,) = [line for line in said.splitlines() if line.startswith("lora-core finetune:")]
    assert "no answer was accepted of 12 to 4 prompts (" in last
    assert "with too low a reward" in last


def test_options_of_the_other_sense_are_refused(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, said = run(PROMPTS, *sampling(tmp_path), "--weights", "reward")
    assert code == 1
    assert "--weights is no option of rft with --reward" in said
    code, said = run(PROMPTS, "--reward-threshold", "2")
    assert "--reward-threshold is no option of rft without --reward" in said
    code, said = run(PROMPTS, "--clip-low", "0.1")
    assert "--clip-low is no option of rft" in said


def test_held_out_prompts_are_rewarded(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "Say a:"}\n{"prompt": "Say b:"}\n')
    more = ["--eval-data", str(held_out), "--eval-every", "1"]
    assert run(PROMPTS, *sampling(tmp_path), *more)[0] == 0
    records = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "eval_reward" in records


WEIGHTED = [
    {"prompt": f"What is {i}?", "completion": f" It is {i}.", "reward": i / 4} for i in range(6)
]


def test_rows_with_rewards_are_weighted(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run(WEIGHTED, "--eval-fraction", "0.2", "--reward-beta", "0.5")
    assert code == 0, said
    assert "at a mean of 1" in said


@pytest.mark.parametrize(
    ("reward", "why"),
    [
        (None, "reward must be a finite number; got None"),
        ("7", "reward must be a finite number; got '7'"),
        ("missing", "no reward; keys are ['completion', 'prompt']"),
    ],
)
def test_a_bad_reward_is_named_with_its_line(
    reward: Any, why: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    bad = {**WEIGHTED[1], "reward": reward}
    if reward == "missing":
        del bad["reward"]
    code, said = run([WEIGHTED[0], bad])
    assert code == 1
    assert "data.jsonl:2:" in said
    assert why in said
