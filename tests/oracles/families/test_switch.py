"""Greedy tokens past the length at which longrope changes its frequencies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_core.models import generate_ids

pytestmark = pytest.mark.oracle


@pytest.mark.column("cache")
def test_greedy_tokens_past_it(make_pair: Callable[..., Any], family: str) -> None:
    """transformers runs the text anew at that token, and so does this."""
    ours, theirs, *_ = make_pair(family)
    if ours.switches_after is None:
        assert not hasattr(theirs, "original_inv_freq")
        return
    generator = torch.Generator().manual_seed(5)
    for tokens in (ours.switches_after - 4, ours.switches_after):
        prompt = torch.randint(1, 97, (1, tokens), generator=generator)
        peer = theirs.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert generate_ids(ours, prompt, max_new_tokens=9) == [peer[0, tokens:].tolist()]
