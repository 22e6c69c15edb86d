"""Every family in 4 bits against transformers holding the dequantized weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.models import generate_ids, left_pad
from lora_core.models.experts import NF4Experts
from lora_core.models.routing import Router
from lora_core.quant import NF4Linear

pytestmark = pytest.mark.oracle


@pytest.mark.column("NF4")
def test_nf4(
    load: Callable[..., nn.Module],
    make_pair: Callable[..., Any],
    parameters_of: Callable[..., dict[str, nn.Parameter]],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    family: str,
) -> None:
    dense, theirs, truth, folder = make_pair(family)
    ours = load(folder, quantize="nf4")
    quantized = {name: m for name, m in ours.named_modules() if isinstance(m, NF4Linear)}
    linear = {name for name, m in dense.named_modules() if isinstance(m, nn.Linear)}
    experts = {name: m for name, m in ours.named_modules() if isinstance(m, NF4Experts)}
    routers = {name for name, m in dense.named_modules() if isinstance(m, Router)}
    assert set(quantized) == linear - {"lm_head"} - routers
    assert len(experts) == len(routers)
    with torch.no_grad():
        for peer in (theirs, truth):
            named = parameters_of(peer)
            for name, module in quantized.items():
                named[f"{name}.weight"].copy_(module.dense_weight())
            for name, stacks in experts.items():
                for key, value in stacks.dense_module().named_parameters():
                    named[f"{name}.{key}"].copy_(value)
    ids = draw()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = ours(ids, mask).logits
        peers = [
            m(ids, attention_mask=mask, position_ids=positions).logits for m in (theirs, truth)
        ]
        unlike = dense(ids, mask).logits
    within(*(t[mask.bool()] for t in (found, *peers)), "rms")
    assert not torch.allclose(found, unlike, atol=1e-2)
    prompts = [ids[0, :4].tolist(), ids[1, :9].tolist()]
    tokens = generate_ids(ours, *left_pad(prompts), max_new_tokens=5)
    for prompt, row in zip(prompts, tokens, strict=True):
        peer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        assert peer[0, len(prompt) :].tolist() == row
