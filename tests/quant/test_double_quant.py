"""The 8-bit map and the nearest entry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.quant.double_quant import dynamic_map, encode_scales, shared_map
from lora_kernels import decode_scales
from lora_kernels.cpu import library


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORA_KERNELS", request.param)


def test_the_map_is_seven_decades_of_either_sign() -> None:
    entries = dynamic_map()
    assert entries.dtype == torch.float32
    assert bool((entries.diff() > 0).all())
    assert entries[127] == 0
    assert entries[-1] == 1
    # 2^i evenly spaced values in decade i, mirrored: only 1 has no counterpart
    assert torch.equal(entries[:127], -entries[128:255].flip(0))
    for decade in range(7):
        top = 10.0 ** (decade - 6)
        inside = entries[(entries > 0.1 * top) & (entries < top)]
        step = 0.9 * top / 2**decade
        wanted = 0.1 * top + step * (torch.arange(2**decade) + 0.5)
        assert torch.allclose(inside, wanted, rtol=3e-7, atol=0)


def test_the_map_cannot_be_spoilt_from_outside() -> None:
    dynamic_map().zero_()
    assert dynamic_map()[-1] == 1
    with torch.device("meta"):
        assert dynamic_map().device.type == "cpu"
    shared = shared_map(torch.device("cpu"))
    assert shared is shared_map(torch.device("cpu"))
    assert torch.equal(shared, dynamic_map())
    assert shared.data_ptr() != dynamic_map().data_ptr()


@given(
    n=st.integers(1, 1500),
    spread=st.sampled_from([0.0, 1e-7, 0.1, 3.0]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_each_scale_gets_the_nearest_entry(n: int, spread: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = (1 + spread * torch.rand(n, generator=generator)) * scale
    q, absmax, offset = encode_scales(scales)
    assert torch.equal(offset, scales.mean())
    centred = (scales - offset).double()
    group = torch.arange(n) // 256
    wanted_absmax = [centred[group == g].abs().max() for g in range(-(-n // 256))]
    assert torch.equal(absmax.double(), torch.stack(wanted_absmax))
    # by brute force: the distance to every entry, times the group's scale
    entries = dynamic_map().double()
    distance = (centred[:, None] - entries * absmax.double()[group, None]).abs()  # (n, 256)
    chosen = distance[torch.arange(n), q.long()]
    # the distance itself is rounded in float64
    assert bool((chosen <= distance.amin(1) + 1e-15 * absmax.double()[group]).all())


def test_nearest_is_meant_exactly() -> None:
    """Scales a few roundings from halfway between two entries, where float32 would not tell."""
    table = dynamic_map()
    entries = table.double()
    middle = (entries[:-1] + entries[1:]) / 2
    near = (0.7 * middle).float().repeat(8)
    near += near * torch.randint(-3, 4, near.shape) * 2.0**-24
    groups = torch.nn.functional.pad(near, (0, 8)).view(8, 256)
    groups[:, 0] = 0.7
    scales = torch.cat((groups, -groups))  # their mean is 0, or next to it
    q, absmax, offset = encode_scales(scales.view(-1))
    quotient = (scales - offset).double() / absmax.double()[:, None]
    assert torch.equal(q.view(16, 256).long(), torch.bucketize(quotient, middle))
    for coarse in (quotient.float().double(), middle.float().double()):  # either would show
        pair = (coarse, middle) if coarse.shape == quotient.shape else (quotient, coarse)
        assert not torch.equal(torch.bucketize(*pair), torch.bucketize(quotient, middle))


def test_decoding_multiplies_then_adds_in_float32() -> None:
    scales = torch.rand(700) + 1
    q, absmax, offset = encode_scales(scales)
    entries = dynamic_map()
    decoded = decode_scales(q, absmax, offset, entries)
    wanted = torch.stack(
        [entries[int(q[i])] * absmax[i // 256] + offset for i in range(len(scales))]
    )
    assert torch.equal(decoded, wanted)
    # half the widest gap of the map, 0.9/64/2, and two roundings
    assert (decoded - scales).abs().max() <= (0.45 / 64 + 1e-6) * absmax.max()
    assert torch.equal(decode_scales(scales), scales)


def test_equal_scales_come_back_exactly() -> None:
    scales = torch.full((300,), 0.75)
    q, absmax, offset = encode_scales(scales)
    assert q.eq(127).all()
    assert torch.equal(decode_scales(q, absmax, offset, dynamic_map()), scales)


def test_no_scales() -> None:
    q, absmax, offset = encode_scales(torch.empty(0))
    assert (q.shape, q.dtype, absmax.shape, offset.item()) == ((0,), torch.uint8, (0,), 0.0)
    assert decode_scales(q, absmax, offset, dynamic_map()).shape == (0,)


def test_scales_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 scales sum to more than float32 .*3e\+38\); use"):
        encode_scales(torch.tensor([3e38, 3e38]))


def test_a_flag_tells_of_the_overflow() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    scales = torch.rand(300)
    for got, wanted in zip(encode_scales(scales, flag=flag), encode_scales(scales), strict=True):
        assert torch.equal(got, wanted)
    assert not flag
    encode_scales(torch.tensor([3e38, 3e38]), flag=flag)
    assert flag
    encode_scales(scales, flag=flag)
    assert flag  # what is told is not taken back
    encode_scales(torch.tensor([3e38, 3e38]), check_finite=False)
    with pytest.raises(ValueError, match=r"flag must be int32 \(1,\) on cpu; got torch.bool \(\)"):
        encode_scales(scales, flag=torch.tensor(False))
