"""A reward model: trained on pairs, saved as PEFT saves it, used on a policy's own base."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_core.adapters import (
    LoRAConfig,
    active_names,
    adapted_modules,
    add_adapter,
    disable_adapters,
)
from lora_core.checkpoint import adapter_state_dict, load_model
from lora_core.cli.main import main
from lora_core.data import load_tokenizer
from lora_core.objectives.reward_model import RewardModel
from lora_core.objectives.rewards import Rewards, Sample
from lora_core.train.report import Metrics

QUICK = ["--steps", "4", "--batch-size", "4", "--accumulate", "1", "--warmup", "0", "--lr", "1e-2"]


def finetune(model: Path, data: Path, out: Path, *more: str) -> int:
    words = ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *QUICK]
    return main([*words, "--progress", "false", "--device", "cpu", *more])


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"{i} and {i} are",
            "chosen": f" {2 * i}, so",
            "rejected": f" {i} no",
            "margin": 1,
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(llama_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward") / "rm"
    assert finetune(llama_folder, pairs, out, "--objective", "reward", "--epochs", "9") == 0
    return out


def samples() -> list[Sample]:
    return [
        Sample(f"r:{i}", f"{i} and {i} are", f" {2 * i}, so", ended=i % 2 == 0) for i in range(5)
    ]


def test_the_first_loss_is_that_of_equal_scores(trained: Path) -> None:
    first, *_, last = records(trained)
    assert first["loss"] == pytest.approx(math.log1p(math.e), abs=1e-6)  # margin 1
    assert first["margin"] == 0
    assert first["score"] == 0
    assert last["loss"] < first["loss"]
    assert last["margin"] > 0


def test_it_is_saved_as_a_classifier_s_adapter(trained: Path) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert "score" not in str(config["target_modules"])
    keys = load_file(trained / "adapter_model.safetensors")
    assert keys["base_model.model.score.weight"].shape[0] == 1


@pytest.mark.oracle
def test_peft_loads_it_with_equal_scores(
    trained: Path, llama_folder: Path, oracle: Callable[[str], ModuleType]
) -> None:
    transformers, peft = oracle("transformers"), oracle("peft")
    judge = RewardModel.open(trained)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        llama_folder, num_labels=1, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, trained).eval()
    for sample, score in zip(samples(), judge.score(samples()), strict=True):
        row = judge._row(sample)
        ids = torch.tensor([[*row.prompt, *row.completions[0]]])
        with torch.no_grad():
            expected = theirs(input_ids=ids).logits.item()
        assert score == pytest.approx(expected, abs=2e-5)
        assert abs(score) > 1e-3


def test_beside_a_policy_it_scores_alike_and_leaves_no_trace(
    trained: Path, llama_folder: Path
) -> None:
    alone = RewardModel.open(trained)
    assert "a base of its own" in alone.said
    policy = load_model(llama_folder)
    add_adapter(policy, LoRAConfig(r=2))
    policy.train()
    saved = {key: t.clone() for key, t in adapter_state_dict(policy).items()}
    trains = [name for name, p in policy.named_parameters() if p.requires_grad]
    tok = load_tokenizer(llama_folder)
    beside = RewardModel.open(trained, policy, tok, base=(str(llama_folder), None))
    assert "the policy's own base" in beside.said
    assert beside.score(samples()) == pytest.approx(alone.score(samples()), abs=1e-6)
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trains
    assert active_names(policy) == ["default"]
    assert policy.training
    now = adapter_state_dict(policy)
    assert now.keys() == saved.keys()
    assert all(torch.equal(now[key], saved[key]) for key in saved)
    twice = Rewards.open([f"{trained}:0.5"], model=policy, tok=tok, base=(str(llama_folder), None))
    (found, *_) = twice(samples())
    assert found.value == pytest.approx(0.5 * alone.score(samples())[0], abs=1e-6)
    other = RewardModel.open(trained, policy, tok, base=(str(llama_folder), "nf4"))
    assert "a base of its own" in other.said


def test_scores_do_not_depend_on_what_is_disabled(trained: Path, llama_folder: Path) -> None:
    policy, tok = load_model(llama_folder), load_tokenizer(llama_folder)
    add_adapter(policy, LoRAConfig(r=2))
    judge = RewardModel.open(trained, policy, tok, base=(str(llama_folder), None))
    outside = judge.score(samples())
    with disable_adapters(policy):
        assert judge.score(samples()) == outside
        assert not any(host.enabled for _, host in adapted_modules(policy))
    assert all(host.enabled for _, host in adapted_modules(policy))


def test_what_does_not_fit_leaves_the_policy_as_it_was(
    trained: Path, llama_folder: Path, tmp_path: Path
) -> None:
    policy, tok = load_model(llama_folder), load_tokenizer(llama_folder)
    add_adapter(policy, LoRAConfig(r=2))
    before = list(policy.state_dict())
    shutil.copytree(trained, tmp_path / "rm")
    kept = load_file(tmp_path / "rm" / "adapter_model.safetensors")
    kept.pop(next(key for key in kept if "lora_A" in key))
    save_file(kept, tmp_path / "rm" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        RewardModel.open(tmp_path / "rm", policy, tok, base=(str(llama_folder), None))
    assert list(policy.state_dict()) == before


def test_a_reward_model_writes_no_text(
    trained: Path,
    llama_folder: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["generate", "--adapter", str(trained), "--prompt", "x"]) == 1
    assert "holds a reward model, which scores answers and writes none" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(trained), "--out", str(tmp_path / "merged")]) == 1
    assert "holds a reward model" in capsys.readouterr().err
    more = ["--objective", "dpo", "--adapter", str(trained)]
    assert finetune(llama_folder, pairs, tmp_path / "out", *more) == 1
    assert "holds a reward model, which dpo cannot go on with" in capsys.readouterr().err


def test_a_stopped_run_is_resumed_bit_for_bit(
    llama_folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--objective", "reward", "--dropout", "0.1", "--save-every", "1", "--epochs", "9"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(llama_folder, pairs, whole, *more) == 0
    write = Metrics.write

    def stops(self: Metrics, record: Any) -> None:
        write(self, record)
        if record["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Metrics, "write", stops)
    assert finetune(llama_folder, pairs, parts, *more) == 130
    monkeypatch.setattr(Metrics, "write", write)
    assert finetune(llama_folder, pairs, parts, *more, "--resume") == 0
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (whole, parts))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in records(parts)]


def test_ids_of_an_answer_are_what_is_scored(trained: Path, llama_folder: Path) -> None:
    tok = load_tokenizer(llama_folder)
    policy = load_model(llama_folder)
    judge = RewardModel.open(trained, policy, tok, base=(str(llama_folder), None))
    text = Sample("r:1", "2 and 2 are", " 4, so", ended=True)
    ids = Sample(
        "r:1", "", "", {}, tuple(tok.encode_prompt("2 and 2 are")),
        (*tok.encode(" 4, so"), int(tok.eos_id or 0)),
    )  # fmt: skip
    assert judge.score([text]) == judge.score([ids])


def test_supervised_then_reward_then_ppo(
    llama_folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for name, keep in (("sft", ("prompt", "chosen")), ("prompts", ("prompt",))):
        lines = [{("completion" if k == "chosen" else k): row[k] for k in keep} for row in rows]
        (tmp_path / name).with_suffix(".jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    sft, rm, ppo = (tmp_path / name for name in ("sft", "rm", "ppo"))
    assert finetune(llama_folder, tmp_path / "sft.jsonl", sft) == 0
    more = ["--objective", "reward", "--adapter", str(sft)]
    assert finetune(llama_folder, pairs, rm, *more) == 0
    kept = load_file(rm / "adapter_model.safetensors")
    before = load_file(sft / "adapter_model.safetensors")
    assert kept.keys() - before.keys() == {"base_model.model.score.weight"}
    more = ["--objective", "ppo", "--adapter", str(sft), "--reward", str(rm)]
    more += ["--max-new-tokens", "4", "--rollout-prompts", "4", "--epochs", "2"]
    assert finetune(llama_folder, tmp_path / "prompts.jsonl", ppo, *more) == 0
    said = capsys.readouterr().err
    assert "on the policy's own base" in said
    assert "reference: a frozen copy of the adapter" in said
    assert load_file(ppo / "adapter_model.safetensors").keys() == before.keys()
    assert (ppo / "value_head.safetensors").is_file()
    found = records(ppo)
    assert all({"reward", "kl", "value_loss"} <= record.keys() for record in found)
    assert found[0]["kl"] == 0  # the copy is the adapter as it was


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "bottleneck"], "saved within a LoRA"),
        (["--method", "full"], "saved within a LoRA"),
        (["--center-rewards", "-1"], "center_rewards must be 0 or more"),
        (["--train-on", "all"], "train_on all grades the prompt"),
        (["--label-smoothing", "0.1"], "of which reward has none"),
    ],
)
def test_what_does_not_go_together(
    llama_folder: Path, pairs: Path, tmp_path: Path, more: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert finetune(llama_folder, pairs, tmp_path / "out", "--objective", "reward", *more) != 0
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_reward_model(llama_folder: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        RewardModel.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(ValueError, match="is no reward model: its adapter has no score head"):
        RewardModel.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "gone", "modules_to_save": ["score"]}'
    )
    with pytest.raises(FileNotFoundError, match="its base 'gone' is no folder here"):
        RewardModel.open(tmp_path)
