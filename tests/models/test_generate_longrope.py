"""Generation past the length at which longrope turns all keys by other frequencies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_core.adapters import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, add_adapter
from lora_core.models import CausalLM, Session, generate, generate_ids, left_pad
from lora_core.models.growing import can_be_fixed

Make = Callable[..., CausalLM]
SWITCH = 16
ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 9.0, 4.0, 30.0],
    "factor": 4.0,
    "original_max_position_embeddings": SWITCH,
}


class Letters:
    """A letter is a token; nothing ends a text."""

    eos_ids = ()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + i) for i in ids)


@torch.no_grad()
def without_cache(model: CausalLM, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy tokens, the whole batch run anew at each step."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(new):
        ids, mask = left_pad(rows)
        found = model(ids, attention_mask=mask).logits[:, -1].argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, found, strict=True)]
    return [row[-new:] for row in rows]


@pytest.mark.parametrize(
    "adapter",
    [None, LoRAConfig(r=2), PromptTuningConfig(3), PrefixTuningConfig(3)],
    ids=["none", "lora", "prompt", "prefix"],
)
@pytest.mark.parametrize("longest", [5, 15, 16, 17])
def test_tokens_are_those_without_a_cache(make_model: Make, adapter: Any, longest: int) -> None:
    model = make_model(rope_parameters=ROPE, std=0.5)
    if adapter is not None:
        add_adapter(model, adapter)
    assert can_be_fixed(model) == (adapter is None or isinstance(adapter, LoRAConfig))
    prompts = [[i % 90 + 1 for i in range(n, 2 * n)] for n in (longest, 3)]
    new = 22 - longest
    found = generate_ids(model, *left_pad(prompts), max_new_tokens=new)
    assert found == without_cache(model, prompts, new)


def test_rows_that_are_all_padded(make_model: Make) -> None:
    model = make_model(rope_parameters=ROPE, std=0.5)
    ids, mask = left_pad([[7] * 20, [8, 9, 4]])
    mask[0, :7] = 0  # 13 tokens are the longest row, in 20 columns
    found = generate_ids(model, ids, mask, max_new_tokens=8)
    assert found == without_cache(model, [[7] * 13, [8, 9, 4]], 8)


def test_a_session_crosses_it_both_ways(make_model: Make) -> None:
    model, tok = make_model(vocab_size=27, rope_parameters=ROPE, std=0.5), Letters()
    session = Session()
    grown = "abcdefgh"
    for turn in range(3):
        alone = generate(model, tok, grown, max_new_tokens=4)
        assert generate(model, tok, grown, max_new_tokens=4, session=session) == alone
        assert (session.reused > 0) == (turn == 1)  # the last prompt is of 18 tokens
        grown += alone + "x"
    for prompt in ("abcdefghi", "abcdefghijklmnopqrst", "abcdefgh"):
        alone = generate(model, tok, prompt, max_new_tokens=4)
        assert generate(model, tok, prompt, max_new_tokens=4, session=session) == alone


def test_only_longrope_starts_again(make_model: Make) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert make_model(rope_parameters=ROPE).switches_after == SWITCH
    model = make_model(rope_parameters=dynamic | {"original_max_position_embeddings": SWITCH})
    assert model.switches_after is None
    ran: list[int] = []
    model.register_forward_hook(lambda _, args, __: ran.append(args[0].shape[1]))
    generate_ids(model, torch.ones(1, 15, dtype=torch.long), max_new_tokens=4)
    assert ran == [15, 1, 1, 1]
