"""Quantizing in C against the definition, bit for bit, on every instruction set of this machine."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.quant.codebook import CODEBOOKS
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import blockwise4_reference as reference
from lora_kernels import encode_scales, quantize4
from lora_kernels.cpu import library, machine
from lora_kernels.cpu import quantize4 as native

pytestmark = pytest.mark.usefixtures("isa")

BLOCKS = [2**i for i in range(5, 13)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NF4 = CODEBOOKS["nf4"].table()


def of_both(x: Tensor, table: Tensor, block: int) -> None:
    """Assert that both give the same codes, scales and flag."""
    flags = torch.zeros(2, dtype=torch.int32)
    wanted_codes, wanted_scales = reference.quantize(x, table, block, flags[:1])
    codes, scales = native.quantize(x, table, block, flags[1:])
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(scales.view(torch.int32), wanted_scales.view(torch.int32))
    assert flags.tolist() == [0, 0]


def entries() -> st.SearchStrategy[Tensor]:
    """Code tables: of the library, and any: unsorted, equal, near each other, beyond [-1, 1]."""
    number = st.floats(-1.5, 1.5, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38])
    base = st.lists(number, min_size=1, max_size=16)

    @st.composite
    def table(draw: st.DrawFn) -> Tensor:
        values = torch.tensor(draw(base))
        index = torch.tensor(draw(st.lists(st.integers(0, 15), min_size=16, max_size=16)))
        steps = draw(st.lists(st.integers(-2, 2), min_size=16, max_size=16))
        near = values[index % len(values)].view(torch.int32)
        moved = (near + torch.tensor(steps, dtype=torch.int32)).view(torch.float32)
        return torch.where(moved.isfinite(), moved, values[0])

    return st.sampled_from([book.table() for book in CODEBOOKS.values()]) | table()


def beside(values: Tensor) -> Tensor:
    """The values, and the float32 numbers next to each, two to either side."""
    found = [values]
    for towards in (-torch.inf, torch.inf):
        step = values
        for _ in range(2):
            step = torch.nextafter(step, torch.full_like(step, towards))
            found.append(step)
    return torch.cat(found)


def drawn(table: Tensor, shape: tuple[int, ...], scale: float, seed: int) -> Tensor:
    """Half random, half on and beside the midpoints of a table: float32 of a shape."""
    generator = torch.Generator().manual_seed(seed)
    ordered = table.sort().values
    near = beside(((ordered[:-1] + ordered[1:]) / 2).clamp(-1, 1)) * scale
    x = torch.randn(shape, generator=generator).view(-1) * scale
    picked = near[torch.randint(0, len(near), x.shape, generator=generator)]
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x.clamp(-scale, scale), picked)
    return x.view(shape)


# --- 4-bit blocks --------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(0, 90)) | st.tuples(st.integers(0, 90), st.integers(0, 150)),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    table=entries(),
    scale=st.sampled_from([1.0, 0.02, 2.0**-20, 6e4, 1e-38, 1e-44]),
    seed=st.integers(0, 2**31),
)
@example(shape=(1,), dtype=torch.float32, block=64, table=NF4, scale=1.0, seed=0)
def test_any_shape_type_and_table(
    shape: tuple[int, ...], dtype: torch.dtype, block: int, table: Tensor, scale: float, seed: int
) -> None:
    of_both(drawn(table, shape, scale, seed).to(dtype), table, block)


@pytest.mark.parametrize("name", sorted(CODEBOOKS))
@pytest.mark.parametrize("last", [0, 1, 2, 31, 63])
def test_at_every_midpoint_and_one_rounding_beside(name: str, last: int) -> None:
    table = CODEBOOKS[name].table()
    ordered = table.sort().values
    near = beside((ordered[:-1] + ordered[1:]) / 2)
    near = near[near.abs() <= 1]
    blocks = torch.nn.functional.pad(near, (0, -len(near) % 63)).view(-1, 63)
    whole = torch.nn.functional.pad(blocks, (0, 1), value=1.0).view(-1)  # scale 1: nothing rounds
    of_both(torch.cat((whole, near[:last])), table, 64)
    of_both(torch.cat((whole, near[:last])) * 0.3, table, 64)  # the reciprocal and the product do


@pytest.mark.parametrize("scale", [1e-45, 1e-44, 1e-39, 9e-39, 1e-38, 1.1e-38, 1.2e-38, 3.4e38])
def test_the_ends_of_float32(scale: float) -> None:
    """Scales below 1e-38 are taken as this much: their reciprocals would be infinite."""
    x = torch.linspace(-1, 1, 64) * scale
    of_both(x, NF4, 64)
    for n in (1, 2, 33, 63):
        of_both(torch.cat((x, x[:n], x.new_zeros(7))), NF4, 128)
    of_both(x.new_zeros(100), NF4, 64)


def test_full_blocks_multiply_and_a_partial_one_divides_at_even_and_odd_places() -> None:
    middle = (NF4[:-1] + NF4[1:]) / 2
    differ = torch.zeros(16, 2)
    for scale in torch.linspace(0.5, 2, 60):
        x = torch.cat((scale.view(1), middle * scale, -middle * scale, torch.zeros(1)))  # (32,)
        for moved in (x, x.roll(1)):
            of_both(moved, NF4, 32)
            of_both(moved, NF4, 64)
            full, partial = (reference.quantize(moved, NF4, b, None)[0] for b in (32, 64))
            differ += torch.stack((full >> 4 != partial >> 4, full & 15 != partial & 15), 1)
    assert differ.sum(0).gt(0).all()  # the test would notice


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_sizes_around_blocks_and_pieces(dtype: torch.dtype, block: int) -> None:
    piece = 1 << 16
    for n in (0, 1, 2, block - 1, block, block + 1, piece - 1, piece, piece + block + 3):
        of_both(torch.randn(n).to(dtype), NF4, block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_need_not_be_aligned(dtype: torch.dtype) -> None:
    wanted = torch.randn(64 * 9 + 37).to(dtype)
    data = wanted.view(torch.uint8)
    for offset in (1, 2, 3, 5):
        memory = torch.empty(offset + data.numel(), dtype=torch.uint8)
        memory[offset:] = data
        x = torch.frombuffer(memory.numpy(), dtype=dtype, offset=offset)
        assert x.data_ptr() % 64 == offset
        of_both(x, NF4, 64)
        for ours, theirs in zip(
            native.quantize(x, NF4, 64, None), native.quantize(wanted, NF4, 64, None), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_table_with_gaps() -> None:
    of_both(torch.randn(100), torch.stack((NF4, torch.rand(16)), 1)[:, 0], 64)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 3 * 64 + 31, 5 * 64])
def test_nothing_is_written_beside_the_result(n: int) -> None:
    """And codes may lie anywhere."""
    x = torch.randn(n)
    codes = torch.full((n + 64,), 0x5A, dtype=torch.uint8)
    scales = torch.full((n + 2,), 7.0)
    flag = torch.zeros(3, dtype=torch.int32)
    run = library.function("lora_quantize4", *native._QUANTIZE)
    at = (codes.data_ptr() + 3, scales.data_ptr() + 4, flag.data_ptr() + 4)
    run(1, 0, x.data_ptr(), n, 64, NF4.data_ptr(), *at)
    wanted = reference.quantize(x, NF4, 64, None)
    half, blocks = (n + 1) // 2, -(-n // 64)
    assert torch.equal(codes[3 : 3 + half], wanted[0])
    assert torch.equal(scales[1 : 1 + blocks], wanted[1])
    assert codes[:3].eq(0x5A).all()
    assert codes[3 + half :].eq(0x5A).all()
    assert scales[0] == 7
    assert scales[1 + blocks :].eq(7).all()
    assert flag.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_value_anywhere_sets_the_flag(dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(64 * 3 + 33).to(dtype)
    wanted = native.quantize(x, NF4, 64, None)
    for at in (0, 1, 63, 64, 100, 191, 192, 224):
        spoilt = x.clone()
        spoilt[at] = bad
        flag = torch.zeros(1, dtype=torch.int32)
        codes, scales = native.quantize(spoilt, NF4, 64, flag)
        assert flag.item() == 1
        assert torch.equal(scales.isfinite(), torch.arange(4) != at // 64)
        others = torch.arange(4).repeat_interleave(32)[: len(codes)] != at // 64
        assert torch.equal(codes[others], wanted[0][others])
        for _ in range(2):  # whatever memory held before
            codes.fill_(0xFF)
            again = native.quantize(spoilt, NF4, 64, None)
            assert torch.equal(again[0], native.quantize(spoilt, NF4, 64, flag)[0])


def test_a_flag_at_an_odd_address() -> None:
    flag = torch.frombuffer(bytearray(16), dtype=torch.int32, offset=5, count=1)
    native.quantize(torch.tensor([torch.inf]), NF4, 64, flag)
    assert flag.item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    x = torch.randn(5 * (1 << 16) + 64 * 7 + 13).to(dtype)
    wanted = reference.quantize(x, NF4, 64, None)
    for threads in range(1, 5):
        torch.set_num_threads(threads)
        try:
            codes, scales = native.quantize(x, NF4, 64, None)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(codes, wanted[0])
        assert torch.equal(scales, wanted[1])


def test_layouts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 1 << 12)
    wide = torch.randn(96, 310, 2)
    for x in (wide[:, :, 0], wide[:, 3:, 1], wide.transpose(0, 1), wide[::5, ::7], wide[:, 0, 0]):
        assert not x.is_contiguous()
        assert len(list(reference.pieces(x, 64))) > 1 or x.numel() < 1 << 12
        of_both(x, NF4, 64)


def test_more_elements_than_an_int_counts(isa: str, full_run: bool) -> None:
    """Past 2^31 of them. Zeros are pages that nobody has written, and take no memory."""
    if not full_run or isa != machine.available()[0]:
        pytest.skip("a gigabyte of codes: in a full run, on one instruction set")
    n = (1 << 31) + (1 << 13) + 7
    x = torch.zeros(n, dtype=torch.bfloat16)
    tail = torch.randn((1 << 14) + 7).bfloat16()
    x[-len(tail) :] = tail
    codes, scales = native.quantize(x, NF4, 64, None)
    wanted = native.quantize(tail, NF4, 64, None)
    assert torch.equal(codes[-len(wanted[0]) :], wanted[0])
    assert torch.equal(scales[-len(wanted[1]) :], wanted[1])
    assert codes[: -len(wanted[0])].eq(0x77).all()


# --- scales in 8 bits ----------------------------------------------------------------------------


def same_scales(scales: Tensor, table: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that the definition and C give the same indices and floats."""
    found = []
    for backend in ("reference", "native"):
        monkeypatch.setenv("LORA_KERNELS", backend)
        found.append(encode_scales(scales, table, check_finite=False))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


ASCENDING = [
    dynamic_map(),
    torch.linspace(-1, 1, 256),
    torch.linspace(-3, 0.2, 256),
    torch.zeros(256),
    torch.arange(256).div(16, rounding_mode="floor") / 16,  # 16 of each
    torch.tensor(range(256), dtype=torch.int32).add(0x3F000000).view(torch.float32),  # neighbours
]


@given(
    n=st.integers(0, 1300),
    table=st.sampled_from(ASCENDING) | st.integers(0, 99),
    spread=st.sampled_from([0.0, 1e-7, 0.1, 3.0]),
    scale=st.sampled_from([1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e38]),
    seed=st.integers(0, 2**31),
)
def test_scales_of_any_size_by_any_ascending_table(
    n: int, table: Tensor | int, spread: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(table, int):
        table = torch.randn(256, generator=generator).sort().values
    scales = (1 + spread * torch.rand(n, generator=generator)) / (1 + spread) * scale
    with pytest.MonkeyPatch.context() as patch:
        same_scales(scales, table, patch)


def test_scales_at_midpoints_and_beside() -> None:
    table = torch.linspace(-1, 1, 257)[1:]  # steps of 1/128: midpoints are float32 numbers
    middle = (table[:-1] + table[1:]) / 2
    for towards in (-2.0, 0.0, 2.0):
        near = middle if towards == 0 else torch.nextafter(middle, torch.full((255,), towards))
        group = torch.cat((near, torch.ones(1)))
        q, absmax = native.encode_scales(torch.cat((group, -group)) * 4, 0.0, table)
        assert absmax.tolist() == [4, 4]
        # a tie goes to the lower entry
        rank = torch.arange(255) + (towards > 0)
        assert torch.equal(q[:255].int(), rank.int())
        assert torch.equal(q[256:511], torch.bucketize(-near, middle).to(torch.uint8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite_mean_as_little_in_both(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = torch.rand(700)
    scales[300] = bad
    same_scales(scales, dynamic_map(), monkeypatch)


def test_scales_of_another_layout_or_address(monkeypatch: pytest.MonkeyPatch) -> None:
    same_scales(torch.rand(600)[::2], dynamic_map(), monkeypatch)
    odd = torch.frombuffer(bytearray(b"\x01" * 2403), dtype=torch.float32, offset=3)
    odd.copy_(torch.rand(600))
    assert odd.data_ptr() % 4
    same_scales(odd, dynamic_map(), monkeypatch)
    same_scales(odd, torch.rand(512).sort().values[::2], monkeypatch)


def test_scales_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = torch.rand(256 * 16 * 5 + 77)
    for threads in range(1, 5):
        torch.set_num_threads(threads)
        try:
            same_scales(scales, dynamic_map(), monkeypatch)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("n", [1, 255, 256, 257])
def test_no_index_is_written_beside(n: int) -> None:
    scales, table = torch.rand(n), dynamic_map()
    codes, absmax = torch.full((n + 40,), 0x5A, dtype=torch.uint8), torch.full((5,), 7.0)
    run: Callable[..., Any] = library.function("lora_encode_scales", *native._ENCODE)
    to = (codes.data_ptr() + 1, absmax.data_ptr() + 4)
    run(1, scales.data_ptr(), n, ctypes.c_float(0.5), table.data_ptr(), *to)
    assert codes[0] == codes[n + 1] == 0x5A
    assert codes[n + 1 :].eq(0x5A).all()
    assert absmax[0] == 7
    assert absmax[1 + -(-n // 256) :].eq(7).all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_encoding_scales_is_an_operator(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what traces, batches or differentiates never meets an address."""
    monkeypatch.setenv("LORA_KERNELS", backend)
    scales, table = torch.rand(700), dynamic_map()
    operator = torch.ops.lora_kernels.encode_scales.default
    torch.library.opcheck(operator, (scales, scales.mean(), table))

    def encode(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return encode_scales(s, table, check_finite=False)

    torch._dynamo.reset()
    compiled = torch.compile(encode, backend="aot_eager", fullgraph=True, dynamic=True)
    negative = torch._neg_view(-scales)  # its bytes are those of -scales
    for got in (compiled(scales), encode(negative)):
        assert all(map(torch.equal, got, encode(scales)))
    gradient = torch.func.grad(lambda s: s.sum() + encode(s)[1].sum())(scales)
    assert gradient.eq(1).all()


# --- the operator --------------------------------------------------------------------------------


def test_quantize4_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    run = native.quantize
    monkeypatch.setattr(native, "quantize", lambda *a: called.append(a) or run(*a))
    x = torch.randn(3, 70)
    assert torch.equal(quantize4(x, NF4, 64)[0], reference.quantize(x, NF4, 64, None)[0])
    assert len(called) == 1
