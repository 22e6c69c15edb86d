"""The KV cache of every family, in chunks and past the window, and the tokens generated with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.models import CausalLM, KVCache, generate_ids, left_pad

pytestmark = pytest.mark.oracle

CHUNKS = ((0, 9), (9, 10), (10, 14), (14, 15))
STEPS = ((0, 1), *((i, i + 1) for i in range(1, 15)))


@torch.no_grad()
def in_chunks(
    model: nn.Module, ids: Tensor, mask: Tensor | None, chunks: tuple[tuple[int, int], ...]
) -> Tensor:
    """Logits (B, T, V), the cache being handed from chunk to chunk."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    ours = isinstance(model, CausalLM)
    cache, found = KVCache(capacity=4) if ours else None, []
    for start, stop in chunks:
        part = None if mask is None else mask[:, :stop]
        new = ids[:, start:stop]
        if ours:
            found.append(model(new, part, cache=cache).logits)
            continue
        where = None if positions is None else positions[:, start:stop]
        out = model(
            new, attention_mask=part, position_ids=where, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask


@pytest.mark.column("cache")
@pytest.mark.parametrize("pad", ["none", "left"])
def test_in_chunks(
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    family: str,
    pad: str,
) -> None:
    """A prompt, then 1, 4 and 1 tokens, past every window; and the same at once."""
    *models, _ = make_pair(family)
    ids = draw(2, 15)
    mask = None if pad == "none" else left_padded(ids)
    found = [in_chunks(model, ids, mask, CHUNKS) for model in models]
    with torch.no_grad():
        found.append(models[0](ids, mask).logits)
    ours, theirs, truth, whole = (t if mask is None else t[mask.bool()] for t in found)
    within(ours, theirs, truth)
    within(whole, theirs, truth)


@pytest.mark.column("cache")
def test_greedy_tokens(make_pair: Callable[..., Any], family: str) -> None:
    """A batch of unequal prompts against transformers row by row."""
    ours, theirs, *_ = make_pair(family)
    generator = torch.Generator().manual_seed(17)
    # both on one side of 16 tokens, where longrope changes its frequencies
    for lengths, new in (((3, 9, 1), 7), ((17, 22), 5)):
        prompts = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]
        found = generate_ids(ours, *left_pad(prompts), max_new_tokens=new)
        for prompt, tokens in zip(prompts, found, strict=True):
            row = torch.tensor([prompt])
            peer = theirs.generate(row, max_new_tokens=new, do_sample=False, pad_token_id=0)
            assert peer[0, len(prompt) :].tolist() == tokens


@pytest.mark.column("window")
@pytest.mark.parametrize("window", [2, 4, 40])
def test_windows(
    transformers: Any,
    their_config: Callable[..., Any],
    make_pair: Callable[..., Any],
    draw: Callable[..., Tensor],
    within: Callable[..., None],
    family: str,
    window: int,
) -> None:
    """Shorter and longer than the text, whole, and token by token behind padding."""
    usual, theirs, truth, _ = make_pair(family)
    ours = CausalLM(dataclasses.replace(usual.config, sliding_window=window)).eval()
    ours.load_state_dict(usual.state_dict())
    peers = []
    for old in (theirs, truth):
        peer = type(old)(their_config(family, sliding_window=window)).eval().to(old.dtype)
        peer.load_state_dict(old.state_dict())
        peers.append(peer)
    ids = draw(2, 15, seed=3)
    models = ours, *peers
    with torch.no_grad():
        whole = [model(ids).logits for model in models]
        unlike = usual(ids).logits
    within(*whole)
    assert not torch.allclose(whole[0], unlike, atol=1e-3)
    if window < 15:
        mask = left_padded(ids)
        within(*(in_chunks(model, ids, mask, STEPS)[mask.bool()] for model in models))
