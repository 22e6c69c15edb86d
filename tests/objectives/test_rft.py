"""rft: answers sampled and accepted, or rows weighted by their rewards."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_core.adapters import adapter_names
from lora_core.cli.main import main
from lora_core.models import generate_ids
from lora_core.objectives import answers
from lora_core.objectives.reward_model import RewardModel
from lora_core.objectives.rewards import Sample
from lora_core.runs import open_model
from lora_core.train import loop, train_step

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
    records = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    answers_alone = {len(row["completion_ids"]) for row in rows}
    for record in map(json.loads, records):  # two rows a step, their prompts not graded
        assert 2 * min(answers_alone) <= record["graded"] <= 2 * max(answers_alone)
        assert record["graded"] < record["tokens"]
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


JUDGED = [{"prompt": f"Say {i}:", "chosen": "something good", "rejected": "bad"} for i in range(4)]


def test_a_reward_adapter_judges_on_the_policy_s_base(
    run: Callable[..., tuple[int, str]], llama_folder: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in JUDGED))
    words = ["finetune", "--objective", "reward", "--model", str(llama_folder), "--lr", "0.05"]
    words += ["--data", str(pairs), "--out", str(tmp_path / "judge"), "--steps", "4"]
    assert main([*words, "--batch-size", "4", "--accumulate", "1", "--progress", "false"]) == 0
    words = ["--reward", str(tmp_path / "judge"), "--reward-threshold", "-1000", "--keep-cut"]
    code, said = run(PROMPTS, *words, "--max-new-tokens", "5")
    assert code == 0, said
    assert "on the policy's own base" in said
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()
    ]
    apart = RewardModel.open(tmp_path / "judge")  # a second model, of the adapter alone
    samples = [
        Sample(
            row["where"],
            row["prompt"],
            row["completion"],
            prompt_ids=tuple(row["prompt_ids"]),
            completion_ids=tuple(row["completion_ids"]),
            ended=False,
        )
        for row in rows
    ]
    apart.own_ids = False  # the very tokens that were sampled
    assert [row["reward"] for row in rows] == pytest.approx(apart.score(samples), rel=1e-4)
    assert len({row["reward"] for row in rows}) > 4
    model = open_model(None, tmp_path / "out").model
    assert adapter_names(model) == ["default"]


def test_a_run_gone_on_with_is_the_uninterrupted_one(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*sampling(tmp_path), "--steps", "4", "--save-every", "1"]
    assert run(PROMPTS, *words, out="whole")[0] == 0
    stopping = itertools.count(1)
    real = train_step

    def stop(*args: Any, **more: Any) -> Any:
        if next(stopping) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", stop)
        run(PROMPTS, *words)
    assert run(PROMPTS, *words, "--resume")[0] == 0
    names = ("adapter_model.safetensors", "candidates.jsonl")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sampling_that_was_stopped_goes_on(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*sampling(tmp_path), "--group-size", "40"]  # a chunk for each prompt
    assert run(PROMPTS, *words, out="whole")[0] == 0
    real, calls = generate_ids, itertools.count(1)

    def stop(*args: Any, **more: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(answers, "generate_ids", stop)
        assert run(PROMPTS, *words)[0] == 130
    done = (tmp_path / "out" / "candidates.progress.jsonl").read_text()
    assert done.count('"sampled"') == 2
    assert run(PROMPTS, *words)[0] == 0
    for name in ("candidates.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_full_fine_tuning_samples_the_base(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    words = [*sampling(tmp_path), "--best-only"]
    assert run(PROMPTS, *words, "--method", "full", out="full")[0] == 0
    assert run(PROMPTS, *words)[0] == 0
    full, lora = ((tmp_path / name / "candidates.jsonl").read_text() for name in ("full", "out"))
    assert full == lora
    assert 1 <= len(full.splitlines()) <= len(PROMPTS)


def test_weights_reach_the_loss(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Rows of no weight are as good as absent: what is learned from the others is the same."""
    rows = [{**row, "reward": float(i % 2)} for i, row in enumerate(WEIGHTED)]
    words = ["--weights", "reward", "--eval-fraction", "0", "--batch-size", "6", "--steps", "1"]
    assert run(rows, *words)[0] == 0
    other = [{**row, "completion": " no"} if not row["reward"] else row for row in rows]
    assert run(other, *words, out="other")[0] == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "other")]
    first, second = (load_file(file) for file in files)
    for name, tensor in first.items():
        # the step is divided by its tokens, which Adam takes out of its first step
        assert torch.allclose(tensor, second[name], atol=1e-5), name
    same = [{**row, "reward": 1.0} for row in other]
    assert run(same, *words, out="same")[0] == 0
    third = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert not all(torch.allclose(first[name], third[name], atol=1e-5) for name in first)
