"""The decoder's attention: every mask, grouped heads, scale, cap; memory, graphs and refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import masked_attention

Check = Callable[..., None]


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention written out in the order and dtypes in which models are published with it."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    sums = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(-1, dtype=sums).to(q.dtype) @ v


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def steps(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """y, dq, dk, dv."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = run(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def qkv(
    batch: int,
    heads: int,
    groups: int,
    tokens: int,
    keys: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads * groups, tokens, size) * 2
    k, v = (torch.randn(batch, heads, keys, size) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def judge(
    accurate: Check, inputs: tuple[Tensor, ...], given: Any, dense: Tensor | None, **options: Any
) -> list[Tensor]:
    """One step of `masked_attention` against the eager form and float64."""
    scale = options.get("scale") or 1 / math.sqrt(inputs[0].shape[-1])
    dy = torch.randn(inputs[0].shape, dtype=inputs[0].dtype)

    def written(*x: Tensor) -> Tensor:
        return eager(*x, dense, scale, options.get("softcap"))

    ours = steps(lambda *x: masked_attention(*x, given, **options), inputs, dy)
    theirs = steps(written, inputs, dy)
    truth = steps(written, tuple(t.double() for t in inputs), dy.double())
    sizes = magnitudes(*(t.double() for t in (*inputs, dy)), dense, scale, options.get("softcap"))
    for a, b, t, size in zip(ours, theirs, truth, sizes, strict=True):
        accurate(a, b, t, size)
    return ours


def magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """What y, dq, dk and dv would be if no term of their sums cancelled another."""
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1)
    weights = eager(q, k, eye, mask, scale, softcap)  # (B, H, T, S)
    k, v = (t.abs().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    each = dy.abs() @ v.mT
    slope = scale * weights * (each + (weights * each).sum(-1, keepdim=True))
    return weights @ v, slope @ k, slope.mT @ q.abs(), weights.mT @ dy.abs()


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 9),
    past=st.sampled_from([0, 0, 5]),
    size=st.sampled_from([1, 8, 20]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.05, 1.5]),
    softcap=st.sampled_from([None, 0.8, 5.0, 50.0]),
    chunk=st.sampled_from([1, 40, 1 << 22]),
    seed=st.integers(0, 2**31),
)
def test_it_is_as_accurate_as_the_eager_form(
    as_accurate_as: Check,
    batch: int,
    heads: int,
    groups: int,
    tokens: int,
    past: int,
    size: int,
    dtype: torch.dtype,
    masked: bool,
    scale: float | None,
    softcap: float | None,
    chunk: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs = qkv(batch, heads, groups, tokens, tokens + past, size, dtype)
    every = torch.arange(tokens + past)
    dense = (every <= torch.arange(past, past + tokens)[:, None])[None, None]
    if masked:  # and some keys hidden, none from itself
        hidden = torch.rand(batch, 1, 1, tokens + past) < 0.4
        dense = dense & (~hidden | (every == torch.arange(past, past + tokens)[:, None]))
    plain = not masked and (past == 0 or tokens == 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_kernels.capped_attention.CHUNK", chunk)
        options = {"scale": scale, "softcap": softcap}
        judge(as_accurate_as, inputs, None if plain else dense, dense, **options)
