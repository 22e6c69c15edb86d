"""Penalties and filters against transformers' logits processors, alone and in its order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.models import Sampling

pytestmark = pytest.mark.oracle

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.9]),
        "top_k": st.sampled_from([None, 1, 5, 40, 1000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.2, 3.0]),
    }
)


@given(options=OPTIONS, seed=st.integers(0, 2**31))
def test_the_distribution_is_that_of_transformers_processors(
    oracle: Callable[[str], Any],
    small_peer: Callable[..., Any],
    options: dict[str, Any],
    seed: int,
) -> None:
    model = small_peer("gpt2")  # any that generates: it chooses the processors and their order
    config = oracle("transformers").GenerationConfig(
        do_sample=True,
        temperature=options["temperature"],
        top_k=options["top_k"] or 0,
        top_p=options["top_p"],
        min_p=options["min_p"] or None,
        repetition_penalty=options["repetition_penalty"],
    )
    torch.manual_seed(seed)
    ids, logits = torch.randint(100, (3, 20)), torch.randn(3, 100) * 3
    processors = model._get_logits_processor(config, input_ids_seq_length=20)
    wanted = processors(ids, logits.clone())
    seen = torch.zeros(3, 100, dtype=torch.bool).scatter_(1, ids, True)
    found = Sampling(**options).filtered(logits, seen)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1), rtol=1e-5, atol=1e-7)
    greedy = Sampling(repetition_penalty=options["repetition_penalty"]).filtered(logits, seen)
    assert torch.equal(greedy.argmax(-1), wanted.argmax(-1))
