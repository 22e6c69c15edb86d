"""Against bitsandbytes on the CPU, where it can be trusted.

It cannot be everywhere: with rows that are not whole blocks its AVX512 dequantizing reads the wrong
scales, and in evaluation it repacks weights in place, so it is used in training mode with K a
multiple of the block. Its 8-bit quantizer looks entries up in 65536 bins; the bins are accounted
for here exactly.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.quant import NF4Linear, codebook, quantize_4bit
from lora_core.quant.double_quant import dynamic_map, encode_scales
from lora_kernels import decode_scales, dequantize4

pytestmark = pytest.mark.oracle

BLOCKS = [2**i for i in range(5, 13)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def bnb(oracle: Any) -> ModuleType:
    oracle("bitsandbytes")
    return oracle("bitsandbytes.functional")


@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 1e4]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(shape=[1], dtype=torch.float16, block=32, scale=1e-6, zeros=False, seed=404)
def test_codes_and_scales_are_byte_identical(
    bnb: ModuleType,
    shape: list[int],
    dtype: torch.dtype,
    block: int,
    scale: float,
    zeros: bool,
    seed: int,
) -> None:
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    if zeros:
        w.view(-1)[: w.numel() // 2] = 0
    theirs, state = bnb.quantize_4bit(w, blocksize=block, quant_type="nf4")
    ours = quantize_4bit(w, "nf4", block, double_quant=False)
    assert torch.equal(ours.packed, theirs.view(-1))
    expected, tail = state.absmax.clone(), w.numel() % block
    if tail and not w.reshape(-1)[-tail:].any():  # small float16 values may all be 0
        expected[-1] = 0  # the one exception, below
    assert torch.equal(ours.absmax, expected)


@pytest.mark.parametrize("n", [1, 33, 63, 65, 96, 4097])
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 2e-38, 3e38])
def test_the_ends_of_float32(bnb: ModuleType, n: int, scale: float) -> None:
    w = torch.randn(n).clamp(-1, 1) * scale
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = quantize_4bit(w, "nf4", 64, double_quant=False)
    assert torch.equal(ours.packed, theirs.view(-1))
    assert torch.equal(ours.absmax, state.absmax)


def test_the_one_exception_is_the_scale_of_a_partial_block_of_zeros(bnb: ModuleType) -> None:
    w = torch.zeros(100)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = quantize_4bit(w, "nf4", 64, double_quant=False)
    assert torch.equal(ours.packed, theirs.view(-1))
    assert ours.absmax.tolist() == [0, 0]
    assert state.absmax.tolist() == [0, torch.tensor(1e-38).item()]


def test_values_halfway_between_two_entries(bnb: ModuleType) -> None:
    """All 15 midpoints and their neighbours in float32, with 1 in each block as its scale."""
    table = codebook("nf4").table()
    middle = (table[:-1] + table[1:]) / 2
    near = torch.cat([torch.nextafter(middle, torch.full((15,), v)) for v in (-2.0, 2.0)])
    w = torch.cat((torch.ones(1), middle, near, torch.zeros(18)))
    for sign in (1, -1):
        theirs, _ = bnb.quantize_4bit(sign * w, blocksize=64, quant_type="nf4")
        assert torch.equal(quantize_4bit(sign * w).packed, theirs.view(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantizing_gives_the_same_bits(bnb: ModuleType, kind: str, dtype: torch.dtype) -> None:
    w = torch.randn(48, 256).to(dtype)
    packed, state = bnb.quantize_4bit(w, quant_type=kind)
    theirs = bnb.dequantize_4bit(packed, state)
    table = codebook(kind).table()
    ours = dequantize4(packed, state.absmax, table, 64, w.numel(), dtype)
    assert torch.equal(ours.view(48, 256), theirs)
    # the values agree for FP4 too, where the bytes may differ in the sign of zero
    assert torch.equal(quantize_4bit(w, kind, double_quant=False).dequantize(), theirs)


def by_bins(centred: Tensor) -> Tensor:
    """The 8-bit codes that bitsandbytes' CPU quantizer gives: nearest entry of a bin's middle."""
    entries = dynamic_map()
    bins = torch.linspace(-1, 1, 65536, dtype=torch.float64)
    middle = (entries[:-1].double() + entries[1:].double()) / 2
    lut = torch.bucketize(bins, middle)
    group = torch.arange(centred.numel()) // 256
    absmax = torch.stack([centred[group == g].abs().max() for g in range(int(group[-1]) + 1)])
    x = (centred * (1 / absmax)[group]).clamp(-1, 1)
    return lut[((x + 1) * 0.5 * 65535 + 0.5).int()]


def test_double_quantization_differs_only_where_their_bins_do(bnb: ModuleType) -> None:
    """Same map, offset and group scales; other codes only where a bin's middle rounds elsewhere."""
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    w = torch.randn(1024, 4096)
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = quantize_4bit(w)
    assert torch.equal(ours.packed, theirs.view(-1))
    assert torch.equal(ours.scale_offset, state.offset)
    assert torch.equal(ours.scale_absmax, state.state2.absmax)
    differ = ours.scales != state.absmax
    _, plain = bnb.quantize_4bit(w, quant_type="nf4")
    centred = plain.absmax - state.offset
    assert torch.equal(by_bins(centred), state.absmax.long())  # every one of their codes explained
    assert 0 < differ.sum() < 0.004 * differ.numel()  # about 0.18 % by their bins
    # where the codes differ, ours is at least as near
    entries, group = dynamic_map(), torch.arange(differ.numel()) // 256
    error = [
        (entries[q.long()].double() * ours.scale_absmax[group] - centred).abs()
        for q in (ours.scales, state.absmax)
    ]
    assert bool((error[0] <= error[1]).all())
    assert bool((error[0] < error[1])[differ].all())


def test_their_doubly_quantized_scales_decode_to_the_same_bits(bnb: ModuleType) -> None:
    w = torch.randn(300, 512)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    absmax = decode_scales(state.absmax, state.state2.absmax, state.offset, dynamic_map())
    table = codebook("nf4").table()
    ours = dequantize4(packed, absmax, table, 64, w.numel()).view(300, 512)
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


def test_one_group_of_equal_scales(bnb: ModuleType) -> None:
    scales = torch.full((7,), 0.5)
    q, absmax, offset = encode_scales(scales)
    w = torch.full((7 * 64,), 0.5)
    _, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(offset, state.offset)
    assert absmax.item() == 0
    assert torch.equal(decode_scales(q, absmax, offset, dynamic_map()), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_and_its_gradient(oracle: Any, dtype: torch.dtype) -> None:
    """Linear4bit in training mode: the same product of the same dense weight, bit for bit.

    Of so many rows that ours is one too: few are multiplied by W unrounded.
    """
    bnb = oracle("bitsandbytes")
    linear = nn.Linear(256, 48).to(dtype)
    options = {"compress_statistics": False, "quant_type": "nf4", "compute_dtype": dtype}
    theirs = bnb.nn.Linear4bit(256, 48, **options)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").train()
    ours = NF4Linear.from_linear(linear, double_quant=False)
    x = torch.randn(33, 256, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(a), theirs(b)
    dy = torch.randn_like(y)
    y.backward(dy)
    z.backward(dy)
    assert torch.equal(y, z)
    assert torch.equal(a.grad, b.grad)
