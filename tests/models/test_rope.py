"""Rotary embedding: a rotation, relative, in Hugging Face's half layout; llama3's scaling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.models.rope import Rotary, inverse_frequencies, rotate

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = DEFAULT | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rotation_by_hand() -> None:
    """D = 4: channel 0 pairs with 2 and turns by p, channel 1 with 3 and turns by p / 100."""
    cos, sin = Rotary(4, DEFAULT)(torch.tensor([[3]]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    a, b = 3.0, 0.03
    expected = [
        math.cos(a) * 1 - math.sin(a) * 3,
        math.cos(b) * 2 - math.sin(b) * 4,
        math.cos(a) * 3 + math.sin(a) * 1,
        math.cos(b) * 4 + math.sin(b) * 2,
    ]
    torch.testing.assert_close(rotate(x, cos, sin).flatten(), torch.tensor(expected))


@given(half=st.integers(1, 16), i=st.integers(0, 50), j=st.integers(0, 50), by=st.integers(0, 50))
def test_products_depend_on_the_distance_alone(half: int, i: int, j: int, by: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, 2 * half, dtype=torch.float64)
    rotary = Rotary(2 * half, DEFAULT)

    def product(at: int, other: int) -> torch.Tensor:
        (a, b), (c, d) = rotary(torch.tensor([[at]])), rotary(torch.tensor([[other]]))
        return (rotate(q, a, b) * rotate(k, c, d)).sum()

    # angles are float32: off by half a unit in the last place of a position up to 100
    bound = 4 * 100 * torch.finfo(torch.float32).eps * q.norm() * k.norm()
    assert (product(i, j) - product(i + by, j + by)).abs() <= bound


def test_lengths_are_kept() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    turned = rotate(x, *Rotary(8, DEFAULT)(torch.arange(5)[None]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends() -> None:
    plain, scaled = inverse_frequencies(128, DEFAULT), inverse_frequencies(128, LLAMA3)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 64, 16).to(dtype)
    cos, sin = Rotary(16, DEFAULT)(torch.arange(64)[None])
    turned = rotate(x, cos, sin)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate(x.float(), cos, sin).to(dtype))
