"""What answers weigh and what their loss is, against sums written out answer by answer."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter, disable_adapters
from lora_core.data.branches import Branched, branch_batch
from lora_core.device import dtype_policy
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.policy_loss import PolicyLoss, Scoring, Weighing
from lora_core.objectives.policy_options import PolicyOptions
from lora_core.objectives.reference import Reference
from lora_core.objectives.rollouts import Rollout, Rollouts

TEMPERATURE = 0.7
PROMPTS = [(5, 6, 7), (5, 6, 7), (5, 6, 7), (2, 3), (2, 3), (2, 3)]
ANSWERS = [(1, 2, 3), (4,), (9, 8), (1, 1), (3, 2, 1, 4), (6, 7)]
REWARDS = [0.5, 2.0, -1.0, 0.25, 1.5, math.nan]
ENDED = [True, True, False, True, True, True]


@pytest.fixture
def model(shake: Callable[..., nn.Module]) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "llama"}
    made = CausalLM(ModelConfig.from_dict({**sizes, **heads}))
    made.init_weights(std=0.3)
    add_adapter(made, LoRAConfig(r=2))
    shake(made)
    return made


def rollout() -> Rollout:
    made = Rollout(0, 3, list(PROMPTS), list(ANSWERS), chunks=[[0, 1, 2, 3], [4, 5]])
    made.tensors["rewards"] = torch.tensor(REWARDS, dtype=torch.float64)
    made.tensors["ended"] = torch.tensor(ENDED)
    return made


def scoring(model: CausalLM, reference: bool = True) -> Scoring:
    found = Reference("disabled") if reference else None
    return Scoring(model, found, TEMPERATURE, True, 0, dtype_policy("float32", "cpu"))


def alone(model: CausalLM, number: int) -> list[float]:
    """An answer's log-probabilities at the temperature, by itself, from the whole logits."""
    ids = torch.tensor([[*PROMPTS[number], *ANSWERS[number]]])
    with torch.no_grad():
        logs = (model(ids).logits[0].double() / TEMPERATURE).log_softmax(-1)
    start = len(PROMPTS[number])
    return [float(logs[start + i - 1, token]) for i, token in enumerate(ANSWERS[number])]


def both(model: CausalLM) -> tuple[list[list[float]], list[list[float]]]:
    """Of every answer, under the policy and under its base."""
    policy = [alone(model, i) for i in range(6)]
    with disable_adapters(model):
        return policy, [alone(model, i) for i in range(6)]


def test_rloo_s_advantage_is_the_penalized_reward_over_the_others(model: CausalLM) -> None:
    made = rollout()
    Weighing(scoring(model), PolicyOptions(), 3, 0.3, "rloo")(made)
    policy, base = both(model)
    net = [
        r - 0.3 * sum(p - q for p, q in zip(ps, qs, strict=True))
        for r, ps, qs in zip(REWARDS, policy, base, strict=True)
    ]
    assert max(abs(a - r) for a, r in zip(net, REWARDS, strict=True) if a == a) > 0.05
    wanted = [
        net[0] - (net[1] + net[2]) / 2,
        net[1] - (net[0] + net[2]) / 2,
        net[2] - (net[0] + net[1]) / 2,
        net[3] - net[4],
        net[4] - net[3],
        0.0,
    ]
    assert made.tensors["advantages"].tolist() == pytest.approx(wanted, abs=1e-5)
    for name, rows in (("old_log_probs", policy), ("ref_log_probs", base)):
        for found, row in zip(made.tensors[name].tolist(), rows, strict=True):
            assert found[: len(row)] == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_grpo_s_loss_has_the_kl_the_constant_length_and_the_mask(model: CausalLM, kl: Any) -> None:
    options = PolicyOptions(
        temperature=TEMPERATURE, max_new_tokens=8, mask_truncated=True, kl=kl, clip_high=0.5
    )
    made = rollout()
    Weighing(scoring(model), options, 3, 0.2, "grpo")(made)
    made.tensors["old_log_probs"] += 0.4  # ratios of e^-0.4, below 1 - 0.2
    policy, base = both(model)
    advantages = made.tensors["advantages"].tolist()
    total = 0.0
    kept = [i for i in range(6) if ENDED[i] and REWARDS[i] == REWARDS[i]]
    for i in kept:
        for p, q in zip(policy[i], base[i], strict=True):
            rho, a = math.exp(-0.4), advantages[i]
            loss = -min(rho * a, max(rho, 0.8) * a)
            x = p - q
            total += loss + 0.2 * (x if kl == "k1" else math.exp(-x) - 1 + x)
    loss_of = PolicyLoss(options, "dr_grpo", 0.2)
    batches = [made.batch(chunk, True, 0) for chunk in made.chunks]
    count = sum(loss_of.count(batch) for batch in batches)
    assert count == len(kept) == 4
    found = sum(loss_of(model, batch, count).value.item() for batch in batches)
    assert found == pytest.approx(total / 8 / 4, abs=1e-5)


def test_every_rollout_and_epoch_draws_its_own_seeds() -> None:
    asked: list[int] = []

    def sampler(prompts: Any, each: int, first: int) -> list[Any]:
        asked.append(first)
        return [
            SimpleNamespace(
                prompt_ids=(1,), completion_ids=(2,), ended=True, where="", prompt="", completion=""
            )
            for _ in range(len(prompts) * each)
        ]

    sampler.seed = 5  # type: ignore[attr-defined]
    sampler.tok = SimpleNamespace(pad_id=0)  # type: ignore[attr-defined]
    source: Any = Rollouts(
        [None] * 5,  # type: ignore[list-item]
        sampler,  # type: ignore[arg-type]
        SimpleNamespace(score=_scored, parts=[None]),  # type: ignore[arg-type]
        lambda rollout: rollout.tensors.update(number=torch.arange(4)),
        group_size=2,
        at_once=2,
        batch_size=1,
        passes=3,
        step=4,
    )
    orders = []
    for epoch in (0, 1):
        batches = list(source.epoch(epoch))
        assert len(batches) == source.per_epoch() == 2 * 3 * 4  # the fifth prompt fills no step
        for start in range(0, len(batches), 4):
            orders.append([int(b["number"]) for b in batches[start : start + 4]])
    assert asked == [0, 4, 8, 12]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert orders[0] == orders[3] == [0, 1, 2, 3]  # the first pass in the order of sampling
    assert len({tuple(order) for order in orders}) > 3  # later ones in their own


def _scored(samples: Any) -> list[Any]:
    return [SimpleNamespace(value=1.0, parts={}, why=None) for _ in samples]


def test_the_layout_of_a_group_is_that_of_its_prompt() -> None:
    batch = rollout().batch([1, 2, 3], True, 0)
    apart = branch_batch([Branched(PROMPTS[1], ANSWERS[1:3]), Branched(PROMPTS[3], ANSWERS[3:4])])
    for name, tensor in apart.items():
        assert torch.equal(batch[name], tensor)
    assert batch["rewards"].tolist() == REWARDS[1:4]
