"""Edges of sampled answers: odd characters, one answer without a reward, temperatures, folders."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_core.data.branches import Branched, branch_batch
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.answers import HeldOut
from lora_core.objectives.prompts import beyond_positions
from lora_core.objectives.rewards import Rewards, Sample, Scored
from lora_core.objectives.rollout_log import write_answers
from lora_core.objectives.scoring import completion_log_probs, completion_states
from lora_core.train.sources import SourceError


def test_answers_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    log = tmp_path / "rollouts.jsonl"
    odd = "a\u2028b\x85c\u2029d"
    for number in (0, 1, 2, 1):  # the last: a resumed run's
        write_answers(log, number, [Sample("p:1", "p", odd)], [Scored(1.0)], [0.0])
    assert log.read_text(encoding="utf-8").count(odd) == 2


@pytest.mark.parametrize("at_import", [True, False])
def test_a_reward_leaves_the_working_directory_as_it_was(tmp_path: Path, at_import: bool) -> None:
    away = "import os\ndef go(): os.chdir('/')\n"
    call = (
        "go()\ndef f(completion): return 1\n" if at_import else "def f(completion): go(); return 1"
    )
    path = tmp_path / "away.py"
    path.write_text(away + call)
    before = os.getcwd()
    try:
        (found,) = Rewards.open([f"{path}:f"])([Sample("p:1", "p", "x")])
        assert found.value == 1
        assert os.getcwd() == before
    finally:
        os.chdir(before)


def held_out(reward: Any) -> HeldOut:
    def sampler(prompts: list[str], each: int, first: int) -> list[Sample]:
        return [Sample("p:1", prompt, prompt) for prompt in prompts]

    sampler.batch_size = 2  # type: ignore[attr-defined]
    prompts: Any = ["good", "good", "bad"]
    return HeldOut(prompts, sampler, Rewards.of(reward))  # type: ignore[arg-type]


def test_a_last_batch_without_a_reward_is_no_broken_reward() -> None:
    batches = list(held_out(lambda completion: 1.0 if completion == "good" else None).epoch(0))
    found = torch.cat([batch["rewards"] for batch in batches]).tolist()
    assert found[:2] == [1.0, 1.0]
    assert math.isnan(found[2])
    with pytest.raises(SourceError, match="held-out prompts: none of 3 answers"):
        list(held_out(lambda completion: None).epoch(0))


def test_logits_are_divided_by_the_temperature() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = CausalLM(ModelConfig(**sizes, **layers)).eval()  # type: ignore[arg-type]
    batch = branch_batch([Branched((1, 2), ((3, 4), (5, 6)))], shared=False)
    for scale in (1.0, 0.5):
        logits = model(batch["input_ids"]).logits[:, 1:3] / scale
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor([[3, 4], [5, 6]])[..., None])[
            ..., 0
        ]
        for found in (completion_log_probs, completion_states):
            assert torch.allclose(found(model, batch, scale)[0], wanted, atol=1e-5)
    logits = SimpleNamespace(logits=model(batch["input_ids"]).logits)
    plain = completion_log_probs(lambda **given: logits, batch, 0.5)[0]  # type: ignore[arg-type]
    assert torch.allclose(plain, wanted, atol=1e-5)


def test_answers_beyond_the_models_positions_are_said() -> None:
    rows: Any = [SimpleNamespace(ids=(1,) * length) for length in (3, 9)]
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16))
    assert beyond_positions(rows, 7, model) is None
    said = beyond_positions(rows, 8, model)
    assert said is not None
    assert "up to 9 tokens with 8 new ones reach beyond the 16 positions" in said
    assert beyond_positions(rows, 8, torch.nn.Linear(1, 1)) is None
