"""What a frozen decoder layer keeps for backward, byte by byte, and what it kept without operators.

plain formulas, 16 bits    the float32 copy of each norm's input, act(gate) beside gate and up
operators                  each norm's input, q, k, v, attention's output and logsumexp, gate, up
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.models import CausalLM, attention, gating, layers, norm
from lora_kernels.cpu import library
from lora_kernels.rms_norm import rms_norm_reference

BATCH, TOKENS, WIDTH, INNER, HEADS = 2, 64, 64, 160, 4


@pytest.fixture
def layer(make_model: Callable[..., CausalLM]) -> Callable[[torch.dtype], layers.DecoderLayer]:
    def make(dtype: torch.dtype) -> layers.DecoderLayer:
        model = make_model(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
        )
        return model.to(dtype).requires_grad_(False).model.layers[0]

    return make


def kept(layer: layers.DecoderLayer, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that autograd keeps, without parameters and angles."""
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    angles = torch.rand(1, 1, TOKENS, WIDTH // HEADS // 2).repeat(1, 1, 1, 2)
    rotary = angles.cos(), angles.sin()
    seen: list[Tensor] = []  # references, so that no memory is handed out twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = layer(x, rotary, None, None)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}
    for t in (*layer.parameters(), *rotary):
        storages.pop(t.untyped_storage().data_ptr(), None)
    y.float().sum().backward()
    assert x.grad is not None
    return sum(storages.values())


def formula(size: int) -> int:
    """Two norms' inputs, q, k, v and attention's output, gate and up; logsumexp in float32."""
    rows = BATCH * TOKENS
    return rows * (size * (2 * WIDTH + 4 * WIDTH + 2 * INNER) + 4 * HEADS)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_frozen_layer_keeps_what_the_formula_says(
    layer: Callable[[torch.dtype], layers.DecoderLayer],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    backend: str,
) -> None:
    if backend == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORA_KERNELS", backend)
    ours, size = kept(layer(dtype), dtype), dtype.itemsize
    # attention may keep a few numbers of its own, of its dropout
    assert formula(size) <= ours <= formula(size) + 64

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    monkeypatch.setattr(norm, "rms_norm", rms_norm_reference)
    monkeypatch.setattr(gating, "swiglu", lambda gate, up, _: F.silu(gate) * up)
    monkeypatch.setattr(attention, "rotate", rotate)
    before, rows = kept(layer(dtype), dtype), BATCH * TOKENS
    copies = 0 if dtype == torch.float32 else 2 * rows * 4 * WIDTH - rows * size * 2 * WIDTH
    assert before - ours >= rows * size * INNER + copies
    print(f"{dtype}: {before} bytes before, {ours} now")
