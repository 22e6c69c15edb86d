"""PPO: each token's reward, advantage and value against arithmetic; three commands in a row."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter, disable_adapters
from lora_core.cli.main import main
from lora_core.data.pair_rows import PromptRow
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.policy_options import PolicyOptions
from lora_core.objectives.ppo import FILE, HEAD, PPO
from lora_core.objectives.rollout_log import LOG
from lora_core.train import TrainConfig, folder

REWARD = """
def length(completion):
    return len(completion.split()) / 4 - 0.5

def some(completion, number):
    return None if number == 1 else length(completion)
"""
PROMPTS = [PromptRow((5, 6, 1 + i), f"{i}", {"number": i}, f"p.jsonl:{i + 1}") for i in range(4)]


class Words:
    """A tokenizer of numbers."""

    eos_ids, pad_id = (12,), 0

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(folder, "plot_loss", lambda history, path: None)


@pytest.fixture
def prepared(tmp_path: Path, shake: Callable[..., nn.Module]) -> Callable[..., SimpleNamespace]:
    """A policy that differs from its base, with its value head and a rollout."""

    def make(reward: str = "length", **options: Any) -> SimpleNamespace:
        (tmp_path / "reward.py").write_text(REWARD)
        torch.manual_seed(0)
        sizes = {"vocab_size": 13, "hidden_size": 32, "intermediate_size": 32}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
        model = CausalLM(ModelConfig.from_dict({**sizes, **heads, "model_type": "llama"}))
        model.init_weights(std=0.3)
        add_adapter(model, LoRAConfig(r=2))
        shake(model)
        given = {"max_new_tokens": 5, "kl_coef": 0.3, **options}
        words = f"{tmp_path / 'reward.py'}:{reward}"
        objective = PPO(PolicyOptions(reward=words, rollout_prompts=4, **given))
        objective.rows, objective.held_out = PROMPTS, None  # type: ignore[assignment]
        setup: Any = SimpleNamespace(
            method="lora",
            continued=None,
            quantize=None,
            training=TrainConfig(batch_size=2, accumulate=2),
            settings=SimpleNamespace(train_on="assistant", model="base"),
            tok=Words(),
            device=torch.device("cpu"),
            out=tmp_path / "out",
            say=lambda line: None,
        )
        work = objective.prepare(setup, model)
        head = model.get_submodule(HEAD)
        starts_at_zero = not any(p.any() for p in head.parameters())
        with torch.no_grad():
            head.linear.weight.copy_(torch.linspace(-1, 1, 32)[None])  # type: ignore[union-attr]
            head.linear.bias.fill_(0.25)  # type: ignore[union-attr, operator]
        batches = list(work.dataset.epoch(0))
        return SimpleNamespace(
            model=model, work=work, now=work.dataset.current, batches=batches, zero=starts_at_zero
        )

    return make


def alone(model: nn.Module, prompt: Any, completion: Any) -> tuple[list[float], list[float]]:
    """A completion's log-probabilities and the head's values, by a row of its own."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        scores = out.logits[0].double().log_softmax(-1)
        values = model.get_submodule(HEAD)(out.hidden_states[-1])[0]
    first = len(prompt) - 1
    found = [scores[first + t, token].item() for t, token in enumerate(completion)]
    return found, values[first : first + len(completion)].tolist()


def test_a_value_head_expects_nothing_at_first(prepared: Callable[..., SimpleNamespace]) -> None:
    assert prepared().zero


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_advantages_against_a_loop_over_tokens(
    prepared: Callable[..., SimpleNamespace], gamma: float, lam: float
) -> None:
    made = prepared(gamma=gamma, lam=lam)
    now, expected = made.now, []
    for i, (prompt, completion) in enumerate(zip(now.prompts, now.completions, strict=True)):
        policy, values = alone(made.model, prompt, completion)
        with disable_adapters(made.model):
            reference, _ = alone(made.model, prompt, completion)
        rewards = [-0.3 * (a - b) for a, b in zip(policy, reference, strict=True)]
        assert max(map(abs, rewards)) > 1e-3
        rewards[-1] += now.tensors["rewards"][i].item()
        # every pair of tokens, apart from the recursion
        deltas = [
            r + gamma * v_next - v
            for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)
        ]
        gains = [
            sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
            for t in range(len(deltas))
        ]
        expected.append((gains, values))
    flat = torch.tensor([gain for gains, _ in expected for gain in gains], dtype=torch.float64)
    for i, (gains, values) in enumerate(expected):
        for t, (gain, value) in enumerate(zip(gains, values, strict=True)):
            white = (gain - flat.mean()) / flat.std()
            assert now.tensors["advantages"][i, t].item() == pytest.approx(float(white), abs=1e-4)
            assert now.tensors["returns"][i, t].item() == pytest.approx(gain + value, abs=1e-4)
            assert now.tensors["old_values"][i, t].item() == pytest.approx(value, abs=1e-4)


def test_policy_and_value_share_the_trunk(prepared: Callable[..., SimpleNamespace]) -> None:
    made = prepared(value_coef=0.0)
    batch, loss = made.batches[0], made.work.loss

    def gradients() -> dict[str, torch.Tensor]:
        made.model.zero_grad()
        loss(made.model, batch, loss.count(batch)).value.backward()
        return {
            name: p.grad.clone()
            for name, p in made.model.named_parameters()
            if p.requires_grad and p.grad is not None
        }

    policy = gradients()
    object.__setattr__(loss.options, "value_coef", 1.0)
    both = gradients()
    assert not policy[f"{HEAD}.linear.weight"].any()
    assert both[f"{HEAD}.linear.weight"].any()
    assert any(not torch.equal(policy[name], both[name]) for name in policy if HEAD not in name)


def test_an_answer_without_a_reward_counts_nowhere(
    prepared: Callable[..., SimpleNamespace],
) -> None:
    made = prepared(reward="some")
    failed = made.now.tensors["rewards"].isnan()
    assert failed.sum() == 1
    assert not made.now.tensors["advantages"][failed].any()
    lengths = torch.tensor([len(ids) for ids in made.now.completions])
    counts = sum(made.work.loss.count(batch) for batch in made.batches)
    assert counts == lengths[~failed].sum()


def test_a_target_moves_the_coefficient(prepared: Callable[..., SimpleNamespace]) -> None:
    made = prepared(kl_target=1e-3, kl_horizon=4.0)
    controller = made.work.dataset.controller
    log_ratio = made.now.tensors["old_log_probs"] - made.now.tensors["ref_log_probs"]
    error = min(max(log_ratio.sum(1).mean().item() / 1e-3 - 1, -0.2), 0.2)
    assert controller.coef == pytest.approx(0.3 * (1 + error), rel=1e-6)
    # and a checkpoint holds it
    _, plain = made.work.dataset.state()
    controller.coef = 7.0
    made.work.dataset.restore(*made.work.dataset.state()[:1], json.loads(json.dumps(plain)))
    assert controller.coef == pytest.approx(0.3 * (1 + error), rel=1e-6)


def finetune(model: Path, data: Path, out: Path, *more: str) -> int:
    words = ["finetune", "--model", str(model), "--data", str(data), "--out", str(out)]
    words += ["--batch-size", "4", "--accumulate", "1", "--warmup", "0", "--lr", "1e-2"]
    return main([*words, "--progress", "false", "--device", "cpu", *more])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sft_reward_and_ppo_are_three_commands(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"{i} and {i} are" for i in range(8)]
    answers = [{"prompt": p, "completion": f" {2 * i}."} for i, p in enumerate(asked)]
    pairs = [{"prompt": p, "chosen": f" {i}.", "rejected": " no"} for i, p in enumerate(asked)]
    sft, judge, ppo = (tmp_path / name for name in ("sft", "judge", "ppo"))
    base, none = llama_folder, ["--eval-fraction", "0"]
    assert finetune(base, write(tmp_path / "a.jsonl", answers), sft, "--steps", "2", *none) == 0
    pair_file = write(tmp_path / "b.jsonl", pairs)
    assert finetune(base, pair_file, judge, "--objective", "reward", "--steps", "3", *none) == 0
    prompts = write(tmp_path / "c.jsonl", [{"prompt": p} for p in asked])
    words = ["--objective", "ppo", "--adapter", str(sft), "--reward", str(judge), "--passes", "2"]
    words += ["--max-new-tokens", "4", "--eval-data", str(prompts), "--kl-target", "1.0"]
    assert finetune(base, prompts, ppo, *words, "--steps", "4") == 0
    said = capsys.readouterr()
    assert "reference: a frozen copy of the adapter" in said.out + said.err
    records = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert records[0]["kl"] == 0.0  # the policy is its reference before the first step
    assert records[1]["kl"] > 0
    assert "eval_reward" in records[-1]
    answers_seen = [json.loads(line) for line in (ppo / LOG).read_text().splitlines()]
    assert len(answers_seen) == 8  # 4 prompts x 1 answer, of 2 passes each
    assert set(answers_seen[0]["parts"]) == {"judge"}
    # what was trained, and nothing of reward and reference, is in the folder
    trained = load_file(ppo / "adapter_model.safetensors")
    assert trained.keys() == load_file(sft / "adapter_model.safetensors").keys()
    head = load_file(ppo / FILE)
    assert head["linear.weight"].any()
    # a run that goes on begins with the head it left
    again = tmp_path / "again"
    words[words.index(str(sft))] = str(ppo)
    assert finetune(base, prompts, again, *words, "--steps", "1") == 0
    said = capsys.readouterr()
    assert f"value head: of {ppo / FILE}" in said.out + said.err
