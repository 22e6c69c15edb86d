"""`lora-core sample`: what is kept, how it goes on, and rows that `finetune` takes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_core.cli.main import main
from lora_core.models import generate_ids
from lora_core.objectives import answers
from lora_core.objectives.reward_model import RewardModel
from lora_core.objectives.rewards import Sample

ROWS: list[dict[str, Any]] = [
    *({"prompt": f"Say {i}:", "wanted": i} for i in range(5)),
    {"messages": [{"role": "user", "content": "Hello?"}]},
]
REWARD = (
    "def length(completion, wanted=0): return len(completion) - wanted\n"
    "def fails(completion): return 1 / (len(completion) % 2)\n"
    "def broken(completion): raise RuntimeError('no')\n"
)


@pytest.fixture
def sample(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run `sample` into tmp_path/NAME; exit code, summary, and what it said."""
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def go(*more: str, out: str = "rows.jsonl") -> tuple[int, dict[str, Any], str]:
        words = ["sample", "--model", str(llama_folder), "--prompts", str(prompts), "--json"]
        words += ["--out", str(tmp_path / out), "--max-new-tokens", "6", "--keep-cut"]
        code = main([*words, *more])
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]) if code == 0 else {}, said.err

    return go


Run = Callable[..., tuple[int, dict[str, Any], str]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_teacher_s_answers_are_rows_to_train_on(
    sample: Run, tmp_path: Path, llama_folder: Path
) -> None:
    code, facts, _ = sample("--samples", "3")
    rows = rows_of(tmp_path / "rows.jsonl")
    assert code == 0
    assert facts["kept"] == len(rows) > 6
    assert facts["sampled"] == 18
    assert {"prompt", "completion", "seed", "where", "fields"} == rows[0].keys()
    assert rows[0]["where"].endswith("prompts.jsonl:1")
    assert [m["role"] for m in rows[-1]["messages"]] == ["user", "assistant"]
    words = ["finetune", "--model", str(llama_folder), "--data", str(tmp_path / "rows.jsonl")]
    words += ["--out", str(tmp_path / "student"), "--steps", "1", "--progress", "false"]
    assert main(words) == 0
    assert (tmp_path / "student" / "adapter_model.safetensors").is_file()


def test_answers_are_the_same_however_they_are_batched(sample: Run, tmp_path: Path) -> None:
    sample("--samples", "2")
    sample("--samples", "2", "--batch-size", "3", out="other.jsonl")
    sample("--samples", "2", "--seed", "1", out="seed.jsonl")
    one, other, seed = (
        (tmp_path / name).read_text() for name in ("rows.jsonl", "other.jsonl", "seed.jsonl")
    )
    assert one == other
    assert one != seed


def test_a_killed_call_is_gone_on_with(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = ["--reward", f"{tmp_path / 'reward.py'}:length", "--samples", "2", "--batch-size", "4"]
    whole = sample(*reward, out="whole.jsonl")[1]
    sample(*reward)
    path, beside = tmp_path / "rows.jsonl", tmp_path / "rows.progress.jsonl"
    lines = beside.read_text().splitlines(keepends=True)
    # the third prompt's rows were written, its line not yet; and half a line of the next
    beside.write_text("".join(lines[:3]) + lines[3][:20])
    asked: list[int] = []

    def counted(*args: Any, **more: Any) -> Any:
        asked.append(len(more["seed"]))
        return generate_ids(*args, **more)

    monkeypatch.setattr(answers, "generate_ids", counted)
    again = sample(*reward)[1]
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert {**again, "out": ""} == {**whole, "out": ""}
    assert sum(asked) == 8  # four prompts were left
    assert sample(*reward)[1] == again
    assert sum(asked) == 8


def test_other_settings_do_not_share_a_file(sample: Run, tmp_path: Path) -> None:
    sample("--samples", "2")
    code, _, said = sample("--samples", "3")
    assert code == 1
    assert "samples was 2, is 3" in said
    (tmp_path / "mine.jsonl").write_text("{}\n")
    code, _, said = sample(out="mine.jsonl")
    assert code == 1
    assert "holds rows, and no mine.progress.jsonl" in said
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"
    (tmp_path / "rows.jsonl").write_text("")
    assert "it was changed since" in sample("--samples", "2")[2]
    assert "no folder" in sample(out="nowhere/rows.jsonl")[2]


def test_rewards_choose(sample: Run, tmp_path: Path) -> None:
    reward = ["--reward", f"{tmp_path / 'reward.py'}:length", "--samples", "4", "--dedupe", "0"]
    every = rows_of_run(sample, tmp_path, *reward, out="all.jsonl")
    best = rows_of_run(sample, tmp_path, *reward, "--keep", "best", out="best.jsonl")
    good = ["--keep", "verified", "--threshold", "8"]
    high = rows_of_run(sample, tmp_path, *reward, *good, out="high.jsonl")
    best_of_high = ["--keep", "best", "--threshold", "8"]
    both = rows_of_run(sample, tmp_path, *reward, *best_of_high, out="both.jsonl")
    verified = rows_of_run(sample, tmp_path, *reward, "--keep", "verified", out="verified.jsonl")
    by_prompt: dict[str, list[float]] = {}
    for row in every:
        by_prompt.setdefault(row["where"], []).append(row["reward"])
    assert [row["reward"] for row in best] == [max(found) for found in by_prompt.values()]
    assert high == [row for row in every if row["reward"] >= 8]
    assert any(row["reward"] == 8 for row in high)
    assert both == [row for row in best if row["reward"] >= 8]
    assert verified == [row for row in every if row["reward"] >= 1]
    assert 0 < len(high) < len(every)
    assert every[0]["parts"] == {"length": every[0]["reward"]}


def rows_of_run(sample: Run, tmp_path: Path, *words: str, out: str) -> list[dict[str, Any]]:
    assert sample(*words, out=out)[0] == 0
    return rows_of(tmp_path / out)


def test_failing_rewards_cost_their_answers_alone(sample: Run, tmp_path: Path) -> None:
    _, facts, _ = sample("--reward", f"{tmp_path / 'reward.py'}:fails")
    assert facts["dropped"]["without a reward"] > 0
    assert facts["kept"] > 0
    assert "prompts.jsonl:" in facts["first_failure"]
    assert "ZeroDivisionError" in facts["first_failure"]
    code, _, said = sample("--reward", f"{tmp_path / 'reward.py'}:broken", out="no.jsonl")
    assert code == 1
    assert "could be rewarded" in said


def test_cut_and_alike_answers_are_counted(sample: Run, llama_folder: Path, tmp_path: Path) -> None:
    _, facts, _ = sample("--dedupe", "0.01")
    assert facts["dropped"]["near duplicate of kept answers"] > 0
    words = ["sample", "--model", str(llama_folder), "--prompts", str(tmp_path / "prompts.jsonl")]
    words += ["--out", str(tmp_path / "cut.jsonl"), "--max-new-tokens", "2"]
    assert main(words) == 0
    lines = rows_of(tmp_path / "cut.progress.jsonl")[1:]
    assert sum(line["dropped"].get("cut at max_new_tokens", 0) for line in lines) > 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--keep", "best"], "keep best goes by a reward: give --reward"),
        (["--threshold", "1"], "a threshold goes by a reward: give --reward"),
        (
            ["--threshold", "nan", "--reward", "no:f"],
            "least reward must be a finite number; got nan",
        ),
        (["--max-new-tokens", "600"], "positions: lower --max-new-tokens"),
        (["--reward", "nothing.py:f"], "no file nothing.py"),
        (["--samples", "0"], "samples must be 1 or more; got 0"),
        (["--temperature", "0"], "set samples to 1"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--max-new-tokens", "0"], "max_new_tokens must be 1 or more; got 0"),
        (["--dedupe", "2"], "dedupe must be in (0, 1]"),
    ],
)
def test_bad_flags_are_one_line(words: list[str], why: str, sample: Run) -> None:
    code, _, said = sample(*words)
    assert code == 1
    assert why in said


def test_ctrl_c_is_130_and_loses_nothing(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--samples", "2", "--batch-size", "4"]
    assert sample(*words, out="whole.jsonl")[0] == 0
    calls: list[None] = []

    def stop(*given: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate_ids(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(answers, "generate_ids", stop)
        assert sample(*words)[0] == 130
    kept = (tmp_path / "rows.jsonl").read_text()
    assert kept
    assert sample(*words)[0] == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    assert whole.startswith(kept)
    assert len(whole) > len(kept)
    assert (tmp_path / "rows.jsonl").read_text() == whole


def test_an_adapter_answers_and_a_reward_adapter_judges(
    sample: Run, tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Say 1:", "chosen": "something good", "rejected": "bad"}
    pairs.write_text("".join(json.dumps({**pair, "prompt": f"Say {i}:"}) + "\n" for i in range(4)))
    for objective, out in (("reward", "judge"), ("dpo", "policy")):
        words = ["finetune", "--objective", objective, "--model", str(llama_folder), "--lr", "0.05"]
        words += ["--data", str(pairs), "--out", str(tmp_path / out), "--steps", "2"]
        assert main([*words, "--batch-size", "4", "--accumulate", "1", "--progress", "false"]) == 0
    judged: list[Sample] = []
    real = RewardModel.score

    def noted(model: RewardModel, samples: Sequence[Sample]) -> list[float]:
        judged.extend(samples)
        return real(model, samples)

    monkeypatch.setattr(RewardModel, "score", noted)
    judge = ["--reward", str(tmp_path / "judge"), "--samples", "2", "--dedupe", "0"]
    code, _, said = sample(*judge, out="base.jsonl")
    assert code == 0
    assert "on the policy's own base" in said
    code, _, _ = sample(*judge, "--adapter", str(tmp_path / "policy"), out="policy.jsonl")
    assert code == 0
    base, policy = (rows_of(tmp_path / f"{name}.jsonl") for name in ("base", "policy"))
    assert [row.get("completion") for row in base] != [row.get("completion") for row in policy]
    # of the very tokens that were sampled, a judge on a base of its own says the same
    apart = RewardModel.open(tmp_path / "judge")
    apart.own_ids = False
    rewards = [row["reward"] for row in policy]
    assert rewards == pytest.approx(real(apart, judged[-len(policy) :]), rel=1e-4)
    assert len(set(rewards)) > 4


def test_a_template_renders_the_messages(sample: Run, tmp_path: Path) -> None:
    words = ["--samples", "1", "--dedupe", "0"]
    assert sample(*words)[0] == 0
    template = "{% for m in messages %}{{ m.content }}{% endfor %}!"
    assert sample(*words, "--template", template, out="other.jsonl")[0] == 0
    own, other = (rows_of(tmp_path / name) for name in ("rows.jsonl", "other.jsonl"))
    assert own[:-1] == other[:-1], "raw prompts have no template"
    assert own[-1]["messages"] != other[-1]["messages"]
    assert "template was" in sample(*words, "--template", template)[2]
