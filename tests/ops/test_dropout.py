"""Dropout from a counter: published vectors, the same bits everywhere, and that it is random."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels.cpu import library
from lora_kernels.dropout import (
    draw_seed,
    drop,
    drop_reference,
    drop_rows,
    kept_scale,
    philox,
    threshold,
)

BACKENDS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Random123's kat_vectors for philox4x32-10: counter, key, result
VECTORS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORA_KERNELS", request.param)
    return request.param


def seed_of(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int64)


@pytest.mark.parametrize("vector", VECTORS)
def test_published_vectors(vector: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in vector.split()]
    got = philox(tuple(words[:4]), tuple(words[4:6]))
    assert list(got) == words[6:]


def test_the_first_draw_decides_as_published(backend: str) -> None:
    """Seed 0, row 0, columns 0 to 7: the first vector, low halves first."""
    numbers = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
    for number in numbers:
        for t, kept in ((number, True), (number + 1, False)):
            x = drop(torch.ones(1, 8), seed_of(0), t / 65536)
            assert [bool(v) for v in x[0]] == [n >= t for n in numbers]
            assert bool(x[0, numbers.index(number)]) == kept


@given(
    m=st.sampled_from([0, 1, 3, 17, 40]),
    k=st.sampled_from([1, 7, 8, 9, 127, 128, 129, 300]),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 0.999999]),
    strided=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@pytest.mark.parametrize("name", ["native", "triton"])
def test_the_same_bits_as_the_definition(
    name: str, m: int, k: int, dtype: torch.dtype, p: float, strided: bool, seed: int
) -> None:
    if name == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    x = (
        torch.randn(m, k, 2)[..., 0].to(dtype)
        if strided
        else torch.randn(m, 2 * k)[:, :k].to(dtype)
    )
    if m:
        x[0, 0] = math.inf
    truth = drop_reference(x, seed_of(seed), p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KERNELS", name)
        got = drop(x, seed_of(seed), p)
        own = x.clone(memory_format=torch.contiguous_format)
        assert drop_rows(own, seed_of(seed), p, in_place=True) is own
    for t in (got, own):
        assert t.dtype == dtype
        assert t.is_contiguous()
        assert torch.equal(t, truth)
    assert ((truth == x) | (truth == 0)).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 3])
def test_c_with_every_instruction_set(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(300, 257)
        assert torch.equal(drop(x, seed_of(-7), 0.3), drop_reference(x, seed_of(-7), 0.3))
    finally:
        torch.set_num_threads(before)


def test_as_many_are_dropped_as_asked() -> None:
    """Over a million draws: in all, in each of the 8 places of a group, in each row."""
    m, k = 1024, 1024
    for p in (0.05, 0.5):
        dropped = (drop(torch.ones(m, k), seed_of(3), p) == 0).double()
        t = threshold(p) / 65536

        def close(rate: Tensor, count: int, t: float = t) -> bool:
            return bool(((rate - t).abs() <= 5 * math.sqrt(t * (1 - t) / count)).all())

        assert close(dropped.mean(), m * k)
        assert close(dropped.view(m, -1, 8).mean((0, 1)), m * k // 8)
        assert close(dropped.mean(0), m)
        assert close(dropped.mean(1), k)
        # neighbours, and rows one below the other, know nothing of each other
        for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])):
            both = (a * b).mean() - t * t
            assert both.abs() <= 5 * t * math.sqrt((1 - t * t) / a.numel())
    assert kept_scale(0.5) == 2
    assert kept_scale(0.0) == 1


def test_seeds_differ_and_repeat_with_the_generator(backend: str) -> None:
    x = torch.ones(8, 64)
    torch.manual_seed(0)
    first, second = draw_seed(x.device), draw_seed(x.device)
    assert first.dtype == torch.int64
    assert first.shape == (1,)
    assert not torch.equal(drop(x, first, 0.5), drop(x, second, 0.5))
    torch.manual_seed(0)
    assert torch.equal(draw_seed(x.device), first)
    high = seed_of(1 << 40)  # the upper half of a seed counts, and so does the sign
    assert not torch.equal(drop(x, high, 0.5), drop(x, seed_of(0), 0.5))
    assert not torch.equal(drop(x, seed_of(-(2**63)), 0.5), drop(x, seed_of(0), 0.5))


def test_the_gradient_has_the_same_mask(backend: str) -> None:
    x = torch.randn(2, 5, 33, dtype=torch.float64, requires_grad=True)
    seed = draw_seed(x.device)
    y = drop(x, seed, 0.4)
    assert y.shape == x.shape
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, (y != 0).double())
    assert torch.autograd.gradcheck(lambda x: drop(x, seed, 0.4), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: drop(x, seed, 0.4), x, fast_mode=True)
    torch.library.opcheck(torch.ops.lora_kernels.drop.default, (x, seed, 0.4))


def test_extremes() -> None:
    assert threshold(0.9999999) == 65535
    assert kept_scale(0.9999999) == 65536
    assert threshold(1e-7) == 0
    x = torch.randn(3, 5)
    assert torch.equal(drop(x, seed_of(1), 0.0), x)


def test_bad_arguments() -> None:
    x = torch.ones(2, 8)
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got"):
            drop(x, seed_of(0), p)
    for dtype in (torch.float8_e4m3fn, torch.int32):
        with pytest.raises(TypeError, match=r"floating-point numbers of 16 bits or more; got torc"):
            drop(x.to(dtype), seed_of(0), 0.1)
    with pytest.raises(ValueError, match=r"seed must be int64 \(1,\); got torch\.int32 \(1,\)"):
        drop(x, seed_of(0).int(), 0.1)
    with pytest.raises(ValueError, match=r"seed must be int64 \(1,\); got torch\.int64 \(\)"):
        drop(x, seed_of(0)[0], 0.1)
    with pytest.raises(ValueError, match="seed must be on the device of x, cpu; got meta"):
        drop(x, seed_of(0).to("meta"), 0.1)
