"""Codes and scales against the definition, spelled out slowly, in every backend."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.quant.codebook import CODEBOOKS
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import (
    Weight4,
    decode_scales,
    dequantize4,
    encode_scales,
    expand4_slice,
    quantize4,
)
from lora_kernels import blockwise4_reference as reference
from lora_kernels.blockwise4_reference import CHUNK, _Encoder
from lora_kernels.cpu import library
from lora_kernels.cpu import quantize4 as native

# the interpreter computes in numpy, which warns where IEEE arithmetic gives NaN or infinity
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

BLOCKS = [2**i for i in range(5, 13)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# of equal entries the first is used, wherever it stands
EQUAL = torch.tensor([0.5, -1, 0, 0.5, -0.5, 1, -0.0, -0.25, 0.5, 0.25, 0, 0.75, -1, 1, -0.75, 0.1])
CLOSE = torch.cat((torch.linspace(-1, 0.5, 14), torch.tensor([0.500001, 0.5000011])))
WIDE = torch.linspace(-3, 5, 16)
TABLES = {
    **{name: book.table() for name, book in CODEBOOKS.items()},
    "entries too near for cells": CLOSE,
    "entries outside the block": WIDE,
    "equal entries": EQUAL,
}


REFERENCE = pytest.mark.parametrize("backend", ["reference"], indirect=True)


@pytest.fixture(params=["reference", "native", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("LORA_KERNELS", request.param)
    return request.param


def quantize_slowly(x: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The definition: block by block, each quotient against each midpoint."""
    flat = x.reshape(-1).float()
    first = {float(v): i for i, v in reversed(list(enumerate(table)))}
    values = sorted(first)
    order = [first[v] for v in values]
    middle = [(torch.tensor(a) + torch.tensor(b)) / 2 for a, b in itertools.pairwise(values)]
    codes, scales = [], []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        absmax = part.abs().max()
        bound = absmax.clamp(min=1e-38)
        quotients = part * (1 / bound) if len(part) == block else part / bound
        rank = sum((quotients > m).int() for m in middle)
        codes += [order[i] for i in rank.tolist()]
        scales.append(bound if len(part) < block and absmax > 0 else absmax)
    if len(codes) % 2:
        codes.append(order[int(sum(m < 0.0 for m in middle))])
    codes = torch.tensor(codes, dtype=torch.uint8)
    scales = torch.stack(scales) if scales else torch.empty(0)
    return codes[0::2] << 4 | codes[1::2], scales


def test_two_codes_a_byte_the_first_high() -> None:
    x = torch.zeros(64)
    x[:4] = torch.tensor([-1.0, 1.0, 0.4407098, -0.28444138])
    codes, scales = quantize4(x, TABLES["nf4"], 64)
    assert codes[:3].tolist() == [0x0F, 0xC4, 0x77]
    assert scales.tolist() == [1.0]


@given(
    shape=st.lists(st.integers(0, 70), min_size=0, max_size=3),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    name=st.sampled_from(sorted(TABLES)),
    scale=st.sampled_from([1.0, 1e-3, 2.0**-20, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_codes_and_scales_are_the_definition_s(
    shape: list[int], dtype: torch.dtype, block: int, name: str, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    codes, scales = quantize4(x, TABLES[name], block)
    wanted_codes, wanted_scales = quantize_slowly(x, TABLES[name], block)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(scales, wanted_scales)


@REFERENCE
@pytest.mark.parametrize("name", sorted(TABLES))
def test_cells_agree_with_a_search_at_every_midpoint(name: str) -> None:
    """Around each midpoint, at both ends, on a fine grid: the cells must not shift one value."""
    encode = _Encoder(TABLES[name], torch.device("cpu"))
    near = encode.middle[encode.middle.abs() <= 1]
    for towards in (-2.0, 2.0):
        step = near
        for _ in range(3):
            step = torch.nextafter(step, torch.full_like(step, towards))
            near = torch.cat((near, step))
    ends = torch.tensor([-1.0000002, -1.0, -0.99999994, -0.0, 0.0, 1e-45, 0.99999994, 1.0000002])
    grid = torch.linspace(-1, 1, 40_001)
    x = torch.cat((near, ends, grid))
    rank = torch.bucketize(x, encode.middle).to(torch.uint8)
    wanted = rank if encode.order is None else encode.order[rank.int()]
    assert torch.equal(encode(x), wanted)


def test_a_tie_goes_to_the_lower_entry() -> None:
    table = torch.linspace(-1, 1, 17)[1:]  # steps of 1/8, so midpoints are exact
    x = torch.zeros(64)
    x[0], x[1], x[2] = 1.0, 0.0625, 0.0625 + 2**-24
    codes, _ = quantize4(x, table, 64)
    assert codes[0] & 15 == 7  # 0, not 0.125
    assert codes[1] >> 4 == 8


@pytest.mark.parametrize("block", [32, 64], ids=["full", "partial"])
def test_full_blocks_multiply_by_the_reciprocal_and_a_partial_one_divides(block: int) -> None:
    """The two differ in the last bit, which decides the code of an element at a midpoint."""
    table = TABLES["nf4"]
    middle = (table[:-1] + table[1:]) / 2
    differ = 0
    for scale in torch.linspace(0.5, 2, 30):
        x = torch.cat((scale.view(1), middle * scale, -middle * scale, torch.zeros(1)))  # (32,)
        differ += int(((x * (1 / scale) > middle[0]) != (x / scale > middle[0])).sum())
        codes, _ = quantize4(x, table, block)
        assert torch.equal(codes, quantize_slowly(x, table, block)[0])
    assert differ  # the test would notice


def test_a_second_zero_is_never_written() -> None:
    x = torch.cat((torch.tensor([1.0, 0.0, -0.0, 1e-9, -1e-9]), torch.zeros(59)))
    codes, _ = quantize4(x, TABLES["fp4"], 64)
    assert 8 not in {*(codes >> 4).tolist(), *(codes & 15).tolist()}


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 3e38])
def test_the_ends_of_float32(scale: float) -> None:
    x = torch.linspace(-1, 1, 96) * scale
    codes, scales = quantize4(x, TABLES["nf4"], 64)
    wanted_codes, wanted_scales = quantize_slowly(x, TABLES["nf4"], 64)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_do_not_matter(device: str) -> None:
    """Loaders set both while they build a model."""
    x = torch.randn(5, 70)
    wanted = quantize4(x, TABLES["fp4"], 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            got = quantize4(x, TABLES["fp4"], 64)
            back = dequantize4(*got, TABLES["fp4"], 64, 350)
            with pytest.raises(ValueError, match=r"tensor\[0, 0\] is nan"):
                quantize4(x * torch.nan, TABLES["fp4"], 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert back.dtype == torch.float32


@pytest.mark.parametrize("n", [64, 40, 100])
def test_a_block_of_zeros_has_scale_zero(n: int) -> None:
    codes, scales = quantize4(torch.zeros(n), TABLES["nf4"], 64)
    assert codes.eq(0x77).all()
    assert scales.eq(0).all()


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x.t(),
        lambda x: x[:, 1:],
        lambda x: x[::3],
        lambda x: x[:, ::2],
        lambda x: x.expand(2, *x.shape),
        lambda x: torch.as_strided(x, (7,), (3,), 5),
    ],
    ids=["transposed", "columns", "every third row", "every second column", "expanded", "1-D"],
)
@pytest.mark.parametrize("width", [64, 65])
def test_layout_does_not_matter(lay_out: Callable[[Tensor], Tensor], width: int) -> None:
    x = lay_out(torch.randn(48, width))
    assert not x.is_contiguous()
    for got, wanted in zip(
        quantize4(x, TABLES["nf4"], 64), quantize4(x.contiguous(), TABLES["nf4"], 64), strict=True
    ):
        assert torch.equal(got, wanted)


@REFERENCE
@pytest.mark.parametrize("extra", [0, 1, 63, 64, 65])
def test_chunks_join_without_a_seam(extra: int) -> None:
    x = torch.randn(CHUNK + extra)
    codes, scales = quantize4(x, TABLES["nf4"], 64)
    tail_codes, tail_scales = quantize4(x[CHUNK - 64 :], TABLES["nf4"], 64)
    assert torch.equal(codes[(CHUNK - 64) // 2 :], tail_codes)
    assert torch.equal(scales[CHUNK // 64 - 1 :], tail_scales)
    back = dequantize4(codes, scales, TABLES["nf4"], 64, x.numel())
    tail = dequantize4(tail_codes, tail_scales, TABLES["nf4"], 64, 64 + extra)
    assert torch.equal(back[CHUNK - 64 :], tail)


@given(
    n=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 2**31),
)
def test_dequantizing_rounds_the_float32_product_once(
    n: int, dtype: torch.dtype, block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, ((n + 1) // 2,), generator=generator, dtype=torch.uint8)
    scales = torch.rand(-(-n // block), generator=generator)
    index = torch.stack((codes >> 4, codes & 15), 1).view(-1)[:n].long()
    wanted = TABLES["nf4"][index] * scales.repeat_interleave(block)[:n]
    got = dequantize4(codes, scales, TABLES["nf4"], block, n, dtype)
    assert torch.equal(got, wanted.to(dtype))


@pytest.mark.usefixtures("poison")
def test_every_element_is_written() -> None:
    x = torch.randn(1000)
    codes, scales = quantize4(x, TABLES["nf4"], 64)
    wanted_codes, wanted_scales = quantize_slowly(x, TABLES["nf4"], 64)
    assert torch.equal(codes, wanted_codes)
    assert torch.equal(scales, wanted_scales)
    assert dequantize4(codes, scales, TABLES["nf4"], 64, 1000, torch.bfloat16).isfinite().all()


FEW = 6 * 4 * CHUNK  # six chunks in float32: 6 MB, where the tensor in float32 would be 32 MB


@REFERENCE
@pytest.mark.parametrize("kernel", [reference.quantize, native.quantize], ids=["torch", "c"])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantizing_takes_a_few_chunks_of_memory(
    live_bytes: Any, kernel: Callable[..., tuple[Tensor, Tensor]], transposed: bool
) -> None:
    """The implementations themselves are called: of the operator only its results would be seen."""
    if kernel is native.quantize and (reason := library.why_not()) is not None:
        pytest.skip(reason)
    x = torch.randn(2048, 4096, dtype=torch.bfloat16)
    x = x.t() if transposed else x
    with live_bytes as memory:
        codes, scales = kernel(x, TABLES["nf4"], 64, None)
    result = codes.nbytes + scales.nbytes
    own = CHUNK * 2 if transposed or kernel is reference.quantize else 0  # one chunk at the least
    assert result + own <= memory.peak <= result + FEW


@REFERENCE
def test_dequantizing_takes_a_few_chunks_of_memory(live_bytes: Any) -> None:
    codes, scales = quantize4(torch.randn(2048, 4096), TABLES["nf4"], 64)
    with live_bytes as memory:
        back = torch.empty(2048 * 4096, dtype=torch.bfloat16)
        reference.dequantize(codes, scales, TABLES["nf4"], 64, None, back)
    assert back.nbytes < memory.peak <= back.nbytes + FEW


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 7), (4, 99)])
def test_what_is_not_finite_is_named_with_its_place(bad: float, place: tuple[int, int]) -> None:
    x = torch.randn(5, 100)
    x[place] = bad
    x[4, 99] = bad
    expected = rf"model\.up\.weight\[{place[0]}, {place[1]}\] is {bad} in float32"
    with pytest.raises(ValueError, match=expected):
        quantize4(x, TABLES["nf4"], 64, name="model.up.weight")


def test_float64_beyond_float32_is_not_finite() -> None:
    with pytest.raises(ValueError, match=r"tensor\[1\] is inf in float32"):
        quantize4(torch.tensor([0.0, 1e300], dtype=torch.float64), TABLES["nf4"], 64)


def test_options_that_cannot_be() -> None:
    nf4 = TABLES["nf4"]
    for block in (0, 16, 48, 8192):
        with pytest.raises(ValueError, match=f"power of two from 32 to 4096; got {block}"):
            quantize4(torch.ones(64), nf4, block)
    with pytest.raises(TypeError, match=r"w must be float16, .* got torch.int64"):
        quantize4(torch.ones(64, dtype=torch.int64), nf4, 64, name="w")
    with pytest.raises(ValueError, match="w is on the meta device"):
        quantize4(torch.ones(64, device="meta"), nf4, 64, name="w")
    with pytest.raises(ValueError, match=r"code table must be float32 \(16,\); got .* \(8,\)"):
        quantize4(torch.ones(64), nf4[:8], 64)
    for flag in (torch.zeros(2, dtype=torch.int32), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"flag must be int32 \(1,\) on cpu; got torch\."):
            quantize4(torch.ones(64), nf4, 64, flag=flag)
    codes, scales = torch.zeros(65, dtype=torch.uint8), torch.ones(3)
    with pytest.raises(ValueError, match=r"ceil\(n / 2\) = 65 bytes for n = 130; got 64"):
        dequantize4(codes[:64], scales, nf4, 64, 130)
    with pytest.raises(ValueError, match=r"= 3 entries for n = 130, block = 64; got 2"):
        dequantize4(codes, scales[:2], nf4, 64, 130)
    with pytest.raises(TypeError, match=r"codes must be uint8, two a byte; got torch\.int64"):
        dequantize4(codes.long(), scales, nf4, 64, 130)
    with pytest.raises(ValueError, match=r"scales must be on cpu with their codes, .* got meta"):
        dequantize4(codes, scales.to("meta"), nf4, 64, 130)
    with pytest.raises(ValueError, match=r"code table must be float32 \(16,\); got torch.float64"):
        dequantize4(codes, scales, nf4.double(), 64, 130)
    with pytest.raises(TypeError, match=r"dtype must be float16, .* got torch.int32"):
        dequantize4(codes, scales, nf4, 64, 130, torch.int32)
    for out in (torch.empty(129), torch.empty(130).half(), torch.empty(260)[::2]):
        with pytest.raises(
            ValueError, match=r"out must be contiguous, 130 elements of torch.float"
        ):
            dequantize4(codes, scales, nf4, 64, 130, out=out)


def test_nested_scales_that_cannot_be() -> None:
    nf4, codes = TABLES["nf4"], torch.zeros(65, dtype=torch.uint8)
    q, absmax, offset = encode_scales(torch.ones(3), dynamic_map())
    with pytest.raises(ValueError, match=r"scales of torch\.uint8 need scale_absmax"):
        decode_scales(q)
    with pytest.raises(ValueError, match=r"uint8 need nested=\(absmax, offset, table\)"):
        dequantize4(codes, q, nf4, 64, 130)
    bad = [
        (absmax[:0], offset, dynamic_map()),
        (absmax, offset[None], dynamic_map()),
        (absmax, offset, dynamic_map()[1:]),
        (absmax.double(), offset, dynamic_map()),
    ]
    for nested in bad:
        with pytest.raises(
            ValueError, match=r"float32 \(1,\), \(\) and \(256,\) for 3 scales; got"
        ):
            dequantize4(codes, q, nf4, 64, 130, nested=nested)
    away = [(absmax.to("meta"), offset, dynamic_map()), (absmax, offset.to("meta"), dynamic_map())]
    for nested in away:
        with pytest.raises(ValueError, match="so must what decodes them; got meta"):
            dequantize4(codes, q, nf4, 64, 130, nested=nested)
    with pytest.raises(ValueError, match=r"scale table must be float32 \(256,\); got .* \(16,\)"):
        encode_scales(torch.ones(3), nf4)


# --- nested scales, a caller's memory, slices -----------------------------------------------------


def nested_weight(n: int, k: int, block: int, seed: int = 0) -> Weight4:
    """Random bits with scales that are random too: 0, negative ones and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, ((n * k + 1) // 2,), generator=generator, dtype=torch.uint8)
    blocks = -(-n * k // block)
    scales = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(-(-blocks // 256), generator=generator)
    absmax[::3] *= 1e-39
    nested = (absmax, torch.rand((), generator=generator), dynamic_map())
    return Weight4(codes, scales, TABLES["nf4"], n, k, block, *nested)


@given(
    n=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 2**31),
)
def test_nested_scales_are_decoded_on_the_way(
    n: int, dtype: torch.dtype, block: int, seed: int
) -> None:
    w = nested_weight(1, n, block, seed)
    scales = decode_scales(w.scales, *w.nested)
    wanted = dequantize4(w.codes, scales, w.table, block, n)
    got = dequantize4(w.codes, w.scales, w.table, block, n, dtype, nested=w.nested)
    assert torch.equal(got, wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanding_into_the_caller_s_memory(dtype: torch.dtype) -> None:
    w = nested_weight(3, 70, 64)
    wanted = dequantize4(w.codes, w.scales, w.table, 64, 210, dtype, nested=w.nested)
    memory = torch.full((3, 80), torch.nan, dtype=dtype).view(-1)
    place = memory[20:230].view(3, 70)
    got = dequantize4(w.codes, w.scales, w.table, 64, 210, dtype, nested=w.nested, out=place)
    assert got is place
    assert torch.equal(place.view(-1), wanted)
    assert memory[:20].isnan().all()
    assert memory[230:].isnan().all()


@given(
    n=st.integers(0, 40),
    across=st.integers(1, 12),
    cut=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    block=st.sampled_from(BLOCKS[:3]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_a_slice_is_that_of_the_whole(
    n: int, across: int, cut: list[float], block: int, nested: bool, dtype: torch.dtype
) -> None:
    w = nested_weight(n, across * block, block)
    if not nested:
        scales = decode_scales(w.scales, *w.nested)
        w = Weight4(w.codes, scales, w.table, n, across * block, block)
    row0, row1 = sorted(round(c * n) for c in cut[:2])
    col0, col1 = sorted(round(c * across) * block for c in cut[2:])
    numel = w.out_features * w.in_features
    whole = dequantize4(w.codes, w.scales, w.table, block, numel, dtype, nested=w.nested)
    wanted = whole.view(n, across * block)[row0:row1, col0:col1]
    got = expand4_slice(w, row0, row1, col0, col1, dtype)
    assert got.is_contiguous()
    assert torch.equal(got, wanted)
    place = torch.full((row1 - row0, col1 - col0), torch.nan, dtype=dtype)
    assert expand4_slice(w, row0, row1, col0, col1, dtype, out=place) is place
    assert torch.equal(place, wanted)


def test_slices_that_cannot_be() -> None:
    w = nested_weight(4, 128, 64)
    for box in ((0, 5, 0, 64), (3, 2, 0, 64), (0, 1, 64, 192), (-1, 1, 0, 64)):
        with pytest.raises(ValueError, match=r"\] is not a slice of \(4, 128\)"):
            expand4_slice(w, *box, torch.float32)
    with pytest.raises(ValueError, match="multiples of the block size 64; got 0:32"):
        expand4_slice(w, 0, 4, 0, 32, torch.float32)
    with pytest.raises(ValueError, match="rows of whole blocks; got 96 columns in blocks of 64"):
        expand4_slice(nested_weight(4, 96, 64), 0, 4, 0, 64, torch.float32)
    with pytest.raises(ValueError, match="out must be contiguous, 256 elements"):
        expand4_slice(w, 0, 4, 0, 64, torch.float32, torch.empty(4, 65))
    # a kernel would read beyond their ends
    with pytest.raises(ValueError, match=r"= 256 bytes for n = 512; got 64"):
        expand4_slice(w._replace(codes=w.codes[:64]), 0, 4, 0, 64, torch.float32)
    with pytest.raises(ValueError, match=r"= 8 entries for n = 512, block = 64; got 7"):
        expand4_slice(w._replace(scales=w.scales[:7]), 0, 4, 0, 64, torch.float32)


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 70, 4096 + 64 + 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_flag_is_set_and_nothing_raised(n: int, bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(n).to(dtype)
    flags = torch.zeros(3, dtype=torch.int32)
    wanted = quantize4(x, TABLES["nf4"], 64, flag=flags[1:2])
    assert flags.tolist() == [0, 0, 0]
    x[-1] = bad
    codes, scales = quantize4(x, TABLES["nf4"], 64, flag=flags[1:2])
    assert flags.tolist() == [0, 1, 0]
    quantize4(x.new_ones(64), TABLES["nf4"], 64, flag=flags[1:2])
    assert flags.tolist() == [0, 1, 0]  # what is told is not taken back
    # other blocks are as they would be
    whole = (n - 1) // 64 * 32
    assert torch.equal(codes[:whole], wanted[0][:whole])
    assert torch.equal(scales[: whole // 32], wanted[1][: whole // 32])
    assert not scales[-1].isfinite()
    codes, _ = quantize4(x, TABLES["nf4"], 64, check_finite=False)
    assert torch.equal(codes[:whole], wanted[0][:whole])


# --- the operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_flag", [False, True])
def test_torch_s_own_checks_of_an_operator(with_flag: bool) -> None:
    flag = torch.zeros(1, dtype=torch.int32) if with_flag else None
    arguments = (torch.randn(3, 70).bfloat16(), TABLES["fp4"], 64, flag)
    torch.library.opcheck(torch.ops.lora_kernels.quantize4.default, arguments)


@pytest.mark.parametrize("n", [210, 211])
def test_a_compiler_takes_it_whole(n: int) -> None:
    """In one graph, for sizes that it does not know either; the flag is written."""
    torch._dynamo.reset()

    def both(x: Tensor, flag: Tensor) -> tuple[Tensor, Tensor]:
        return quantize4(2 * x, TABLES["nf4"], 64, flag=flag)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    x, flag = torch.randn(n), torch.zeros(1, dtype=torch.int32)
    for got, wanted in zip(compiled(x, flag), both(x, flag), strict=True):
        assert torch.equal(got, wanted)
    assert not flag
    compiled(x * torch.inf, flag)
    assert flag
