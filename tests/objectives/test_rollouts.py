"""Rollouts: the same answers whatever the cut, nothing lost, and resumed bit for bit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.data.pair_rows import PromptRow
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.policy import GRPO, RLOO
from lora_core.objectives.policy_options import PolicyOptions
from lora_core.objectives.ppo import PPO
from lora_core.objectives.rollout_log import LOG
from lora_core.objectives.scoring import completion_log_probs
from lora_core.train import TrainConfig, TrainResult, folder, train
from lora_core.train.sources import SourceError

END = 12
PROMPTS = [
    PromptRow((5, 6, 7 + i % 3, 1 + i), f"prompt {i}", {"number": i}, f"p.jsonl:{i + 1}")
    for i in range(4)
]
HELD_OUT = [PromptRow((9, i), f"held out {i}", {"number": i}, f"e.jsonl:{i + 1}") for i in range(3)]
REWARD = """
def low(completion):
    numbers = [int(word) for word in completion.split()]
    return sum(number < 6 for number in numbers) / max(len(numbers), 1)

def odd_prompts_alone(completion, number):
    if number % 2 == 0:
        raise RuntimeError("an even prompt")
    return low(completion)

def equal(completion):
    return 0.1

def broken(completion):
    return float("nan")

def breaks(completion, calls=[]):
    calls.append(completion)
    return low(completion) if len(calls) <= 16 else None

def later_none(prompt, calls=[]):
    calls.append(prompt)
    return 1.0 if not prompt.startswith("held") or calls.count(prompt) < 2 else None
"""
TIMES = {"seconds", "tokens_per_second", "peak_memory"}


class Words:
    """A tokenizer of numbers, with one that ends an answer."""

    eos_ids, pad_id = (END,), 0

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr(folder, "plot_loss", lambda history, path: None)


def policy_model() -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "llama"}
    made = CausalLM(ModelConfig.from_dict({**sizes, **heads}))
    made.init_weights(std=0.3)
    add_adapter(made, LoRAConfig(r=2))
    return made


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    return file


@pytest.fixture
def run(tmp_path: Path, rewards: Path) -> Callable[..., SimpleNamespace]:
    """Train one objective; `stop` interrupts after so many steps."""

    def go(
        kind: Any = GRPO,
        reward: str = "low",
        out: str = "out",
        stop: int = 0,
        held_out: Any = None,
        steps: int = 6,
        training: Any = None,
        prompts: Any = PROMPTS,
        **options: Any,
    ) -> SimpleNamespace:
        sizes = {"batch_size": 4, "accumulate": 2, "lr": 0.05, "progress": False, "steps": steps}
        sizes |= training or {}
        config = TrainConfig(out=str(tmp_path / out), **sizes)
        given = {"group_size": 4, "rollout_prompts": 2, "max_new_tokens": 4, **options}
        objective = kind(PolicyOptions(reward=f"{rewards}:{reward}", **given))
        objective.rows, objective.held_out = prompts, held_out
        said: list[str] = []
        setup: Any = SimpleNamespace(
            method="lora",
            continued=None,
            training=config,
            settings=SimpleNamespace(train_on="assistant", model="base"),
            quantize=None,
            tok=Words(),
            device=torch.device("cpu"),
            out=tmp_path / out,
            say=said.append,
        )
        model = policy_model()
        objective.check(setup)
        work = objective.prepare(setup, model)
        losses: list[dict[str, Any]] = []

        def on_step(record: dict[str, Any]) -> None:
            losses.append(record)
            if record["step"] == stop:
                raise KeyboardInterrupt

        more = {"eval_dataset": work.eval_dataset, "loss": work.loss, "facts": work.facts}
        result = train(model, work.dataset, config, on_step=on_step, **more)
        return SimpleNamespace(
            model=model, work=work, result=result, said=said, out=setup.out, objective=objective
        )

    return go


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def without_times(result: TrainResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in result.history]


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"kind": GRPO, "kl_coef": 0.1, "passes": 2},
    "rloo": {"kind": RLOO, "passes": 2},
    # the coefficient moves after each rollout, and the value head has its own optimizer state
    "ppo": {"kind": PPO, "passes": 2, "kl_target": 0.01, "kl_horizon": 16.0, "rollout_prompts": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    run: Callable[..., SimpleNamespace], name: str, full_run: bool
) -> None:
    held_out = HELD_OUT if name == "grpo" else None
    # two steps a pass and two passes: a rollout is in progress at three of four steps
    options = {**SETTINGS[name], "training": {"accumulate": 1, "save_every": 100}}
    whole = run(out="whole", held_out=held_out, **options)
    assert not whole.result.interrupted
    stops = range(1, 6) if full_run or name == "ppo" else (3,)
    for stop in stops:
        first = run(out=f"stop{stop}", stop=stop, held_out=held_out, **options)
        assert first.result.interrupted
        again = {**options, "training": {**options["training"], "resume": True}}
        second = run(out=f"stop{stop}", held_out=held_out, **again)
        assert second.result.resumed_from == stop
        assert without_times(second.result) == without_times(whole.result)
        for key, value in weights(whole.model).items():
            assert torch.equal(value, weights(second.model)[key]), (stop, key)
        assert logged(second.out) == logged(whole.out)


def test_the_policy_that_sampled_is_the_one_that_is_trained(
    run: Callable[..., SimpleNamespace],
) -> None:
    history = run().result.history
    # one pass, one step a rollout: every ratio is 1, and as advantages sum to 0 so does the loss
    assert [r["ratio"] for r in history] == [1.0] * 6
    assert [r["clipped"] for r in history] == [0.0] * 6
    assert all(r["grad_norm"] > 0 for r in history if r["flat_groups"] < 1)
    # a second pass is off-policy
    history = run(out="twice", passes=2).result.history
    assert [r["ratio"] == 1.0 for r in history] == [True, False] * 3


def test_old_log_probs_are_of_the_model_that_sampled(run: Callable[..., SimpleNamespace]) -> None:
    # against the answers scored one by one, in rows of their own, by the weights at that time
    found = run(steps=1, training={"lr": 1e-12})
    now = found.work.dataset.current
    for i, (prompt, completion) in enumerate(zip(now.prompts, now.completions, strict=True)):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            rows = found.model(ids).logits[0].double().log_softmax(-1)
        first = len(prompt)
        for t, token in enumerate(completion):
            want = rows[first + t - 1, token].item()
            assert now.tensors["old_log_probs"][i, t].item() == pytest.approx(want, abs=1e-5)


def test_what_is_sampled_depends_on_seed_and_number_alone(
    run: Callable[..., SimpleNamespace],
) -> None:
    first, other = (
        run(out=f"batch{size}", steps=2, training={"batch_size": size, "accumulate": 8 // size})
        for size in (8, 4)
    )
    texts = [[line["completion"] for line in logged(each.out)] for each in (first, other)]
    assert texts[0][:8] == texts[1][:8]
    reseeded = run(out="reseeded", steps=1, training={"seed": 1})
    assert [line["completion"] for line in logged(reseeded.out)] != texts[0][:8]
    # two answers to a prompt are two draws
    assert len(set(texts[0][:4])) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"kind": GRPO, "aggregation": "dapo"},
        {"kind": GRPO, "aggregation": "grpo", "ratio": "sequence", "kl_coef": 0.3},
        {"kind": GRPO, "aggregation": "dr_grpo", "mask_truncated": True, "kl_coef": 0.3},
        {"kind": RLOO},
        {"kind": PPO, "group_size": 2, "rollout_prompts": 4},
    ],
    ids=["dapo", "grpo", "dr_grpo", "rloo", "ppo"],
)
def test_the_gradient_does_not_depend_on_the_cut(
    run: Callable[..., SimpleNamespace], options: dict[str, Any], full_run: bool
) -> None:
    gradients = []
    for size in (8, 4, 1) if full_run else (8, 1):
        cut = {"batch_size": size, "accumulate": 8 // size, "lr": 1e-12, "clip": None}
        found = run(out=f"cut{size}", steps=1, training=cut, **options)
        batches = list(found.work.dataset.epoch(0))[: 8 // size]
        loss = found.work.loss
        count = sum(map(loss.count, batches))
        found.model.zero_grad()
        # away from the policy that sampled, so that ratios and values matter
        with torch.no_grad():
            torch.manual_seed(1)
            for p in weights(found.model).values():
                p.add_(torch.randn_like(p) * 0.1)
        for batch in batches:
            loss(found.model, batch, count).value.backward()
        gradients.append({n: p.grad for n, p in found.model.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, whole in gradients[0].items():
            close = {"rtol": 0.0, "atol": 1e-5 * max(1.0, whole.abs().max().item())}
            torch.testing.assert_close(other[name], whole, **close)
    assert any(g.abs().max() > 1e-4 for g in gradients[0].values())


def test_a_failed_reward_is_left_out_and_named(run: Callable[..., SimpleNamespace]) -> None:
    found = run(reward="odd_prompts_alone", steps=2)
    lines = logged(found.out)
    failed = [line for line in lines if line["reward"] is None]
    assert {line["where"] for line in failed} <= {"p.jsonl:1", "p.jsonl:3"}
    assert all(line["why"].startswith(f"{line['where']}: ") for line in failed)
    assert all("an even prompt" in line["why"] for line in failed)
    rates = [record["failed_rewards"] for record in found.result.history]
    assert sum(rates) * 8 == len(failed) == 8
    assert any("p.jsonl:" in line and "an even prompt" in line for line in found.said)


def test_where_every_reward_fails_the_run_stops_and_keeps_what_it_has(
    run: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"rollout 0: none of 8 answers .*no checkpoint"):
        run(reward="broken")
    assert [line["reward"] for line in logged(tmp_path / "out")] == [None] * 8
    with pytest.raises(SourceError, match=r"rollout 2: none of 8 .*step-00000002.*--resume"):
        run(reward="breaks", out="later")
    # the two steps that were made are there, and so is what was sampled after them
    assert len(logged(tmp_path / "later")) == 24
    again = run(reward="breaks", out="later", steps=4, training={"resume": True})
    assert again.result.resumed_from == 2
    assert again.result.steps == 4


def test_held_out_prompts_without_a_reward_stop_the_run_with_what_it_has(
    run: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    held_out = [PromptRow((9, 1), "held out", {"number": 0}, "e.jsonl:1")]
    with pytest.raises(SourceError, match=r"^held-out prompts: none of 1 answers .*e\.jsonl:1"):
        run(reward="odd_prompts_alone", held_out=held_out)
    # the first is asked for before the run begins, the second after its first step
    given = {"held_out": held_out, "steps": 2, "training": {"eval_every": 1}}
    with pytest.raises(SourceError, match=r"^held-out .*step-00000001; resume with --resume"):
        run(reward="later_none", out="later", **given)
    assert len((tmp_path / "later" / "checkpoints" / "latest").read_text()) > 0


def test_the_parts_of_a_sum_are_reported(
    run: Callable[..., SimpleNamespace], rewards: Path
) -> None:
    found = run(reward=f"low,{rewards}:equal:2", steps=1)
    (record,) = found.result.history
    assert record["reward/equal"] == pytest.approx(0.1)
    assert record["reward"] == pytest.approx(record["reward/low"] + 0.2)


def test_groups_of_equal_rewards_teach_nothing(run: Callable[..., SimpleNamespace]) -> None:
    found = run(reward="equal", steps=2)
    assert [r["flat_groups"] for r in found.result.history] == [1.0, 1.0]
    assert [r["grad_norm"] for r in found.result.history] == [0.0, 0.0]
    assert any("equal rewards" in line for line in found.objective.report(found.result))


def test_one_answer_has_no_group_to_be_equal_in(run: Callable[..., SimpleNamespace]) -> None:
    found = run(kind=PPO, group_size=1, rollout_prompts=4, steps=2, training={"accumulate": 1})
    assert not any("equal rewards" in line for line in found.objective.report(found.result))


def test_held_out_prompts_are_answered_with_the_same_seeds(
    run: Callable[..., SimpleNamespace],
) -> None:
    found = run(held_out=HELD_OUT, steps=3, training={"eval_every": 1, "lr": 1e-12})
    measured = [r["eval_reward"] for r in found.result.history]
    assert measured == [measured[0]] * 3
    assert [r["eval_loss"] for r in found.result.history] == [-m for m in measured]
    assert not math.isnan(measured[0])


def test_the_log_names_everything_of_an_answer(run: Callable[..., SimpleNamespace]) -> None:
    found = run(steps=1)
    lines = logged(found.out)
    assert len(lines) == 8
    now = found.work.dataset.current
    for line, ids, gain in zip(lines, now.completions, now.tensors["advantages"], strict=True):
        ended = ids[-1] == END
        assert line["completion"] == Words().decode(ids[:-1] if ended else ids)
        assert line["ended"] is ended
        assert line["reward"] == line["parts"]["low"]
        assert line["advantage"] == pytest.approx(gain.item())
        assert line["prompt"] == f"prompt {int(line['where'].split(':')[1]) - 1}"


def test_prompts_come_once_an_epoch(run: Callable[..., SimpleNamespace]) -> None:
    found = run(steps=4)
    places = [line["where"] for line in logged(found.out)][::4]
    assert len(set(places[:4])) == len(set(places[4:])) == 4
    assert places[:4] != places[4:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 1}, r"group_size must be 2 or more; got 1"),
        ({"rollout_prompts": 3}, r"= 12 does not fill whole steps .* = 8 answers"),
        ({"training": {"probe": True}}, r"probe runs the longest batch first"),
        ({"training": {"label_smoothing": 0.1}}, r"label_smoothing smooths labels"),
        ({"lam": 0.5}, r"--lam is no option of grpo"),
        ({"kind": PPO, "kl_target": 1.0, "kl_coef": 0.0}, r"kl_target moves kl_coef"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Callable[..., SimpleNamespace], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(**given)


def test_scoring_leaves_the_policy_as_it_was(run: Callable[..., SimpleNamespace]) -> None:
    found = run(kl_coef=0.1, steps=1)
    model, batch = found.model, next(found.work.dataset.epoch(0))
    model.train()
    before = completion_log_probs(model, batch)[0]
    list(found.work.dataset.epoch(1))
    assert model.training
    assert torch.equal(completion_log_probs(model, batch)[0], before)
