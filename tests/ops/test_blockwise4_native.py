"""Expanding in C, on every instruction set that this machine has, against the definition."""

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.quant.codebook import CODEBOOKS
from lora_kernels import Weight4, decode_scales, dequantize4, expand4_slice
from lora_kernels import blockwise4_reference as definition
from lora_kernels.cpu import blockwise4 as cpu
from lora_kernels.cpu import library

pytestmark = pytest.mark.usefixtures("isa")

BLOCKS = [2**i for i in range(5, 13)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NF4 = CODEBOOKS["nf4"].table()
ANY = torch.tensor([0.0, -0.0, 1, -1, 1e-30, -3e38, 0.1, 7, 1e-45, 0.5, -0.3, 2, 64, 1e9, -2, 3])
PIECE = 256 * 1024  # bytes of a result that one thread takes at a time


def define(weight: Weight4, dtype: torch.dtype) -> Tensor:
    """The definition, called by its name; flat."""
    scales = decode_scales(weight.scales, *(weight.nested or ()))
    out = torch.empty(weight.out_features * weight.in_features, dtype=dtype)
    definition.dequantize(weight.codes, scales, weight.table, weight.block_size, None, out)
    return out


def expand(weight: Weight4, out: Tensor, stream: bool | None = None) -> Tensor:
    w = weight
    cpu.expand(w.codes, w.scales, w.table, w.block_size, w.nested, out, stream)
    return out


def same_bits(ours: Tensor, wanted: Tensor) -> bool:
    """Equal to the bit, the sign of 0 included; NaN where the other is, whatever its bits."""
    nan = wanted.isnan()
    bits = BITS[wanted.element_size()]
    same = (ours.view(bits) == wanted.view(bits)) | (nan & ours.isnan())
    return ours.dtype == wanted.dtype and ours.shape == wanted.shape and bool(same.all())


# --- values --------------------------------------------------------------------------------------


@given(
    n=st.integers(0, 9000),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([*BLOCKS, 96]),
    nested=st.booleans(),
    stream=st.booleans(),
    table=st.sampled_from([NF4, ANY, CODEBOOKS["fp4"].table()]),
    seed=st.integers(0, 2**31),
)
def test_any_size(
    make_weight: Callable[..., Weight4],
    n: int,
    dtype: torch.dtype,
    block: int,
    nested: bool,
    stream: bool,
    table: Tensor,
    seed: int,
) -> None:
    weight = make_weight(1, n, block, nested=nested, seed=seed, table=table)
    wanted = define(weight, dtype)
    assert same_bits(expand(weight, torch.empty(n, dtype=dtype), stream), wanted)
    w = weight
    got = dequantize4(w.codes, w.scales, w.table, block, n, dtype, nested=w.nested)
    assert same_bits(got, wanted)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_around_a_block_writes_that_and_no_more(
    make_weight: Callable[..., Weight4], dtype: torch.dtype, nested: bool
) -> None:
    for n in range(130):
        weight = make_weight(1, n, 64, nested=nested, seed=n)
        memory = torch.full((n + 128,), 7, dtype=dtype)
        expand(weight, memory[64 : 64 + n])
        assert same_bits(memory[64 : 64 + n], define(weight, dtype))
        assert (memory[:64] == 7).all()
        assert (memory[64 + n :] == 7).all()


def half_way(dtype: torch.dtype) -> Tensor:
    """The float32 between each finite number of 16 bits and the next one away from 0."""
    patterns = torch.arange(65536)
    below, values, above = (
        (patterns + step).to(torch.int16).view(dtype).double() for step in (-1, 0, 1)
    )
    above = above.where(above.isfinite(), 2 * values - below)  # what would follow the largest
    return ((values + above) / 2).float()[values.isfinite()]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_rounding_to_16_bits(dtype: torch.dtype) -> None:
    """Ties, the numbers beside them, half and twice as much: subnormals and overflow as well."""
    eps = 2.0**-23
    near = [1, 1 + eps, 1 - eps / 2, -1, -1 - eps, -1 + eps / 2, 0.5, 0.5 + eps / 2, 0.5 - eps / 4]
    table = torch.tensor([*near, 2, 0.75, 1.5, 3, 1e-3, 0, -0.0])
    scales = half_way(dtype)
    assert len(scales) > 60000
    codes = torch.tensor([i << 4 | (15 - i) for i in range(16)], dtype=torch.uint8)  # each twice
    weight = Weight4(codes.repeat(len(scales)), scales, table, len(scales), 32, 32)
    wanted = define(weight, dtype)
    subnormal = (wanted != 0) & (wanted.abs() < torch.finfo(dtype).smallest_normal)
    assert subnormal.sum() > 1000
    assert wanted.isinf().any()
    assert same_bits(expand(weight, torch.empty_like(wanted)), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_any_kind(dtype: torch.dtype) -> None:
    kinds = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan]
    scales = torch.tensor(kinds).repeat_interleave(3)
    codes = torch.randint(0, 256, (len(scales) * 32 - 5,), dtype=torch.uint8)
    weight = Weight4(codes, scales, ANY, 1, 2 * len(codes), 64)
    wanted = define(weight, dtype)
    assert wanted.isnan().any()
    assert wanted.isinf().any()
    got = expand(weight, torch.empty_like(wanted))
    assert same_bits(got, wanted)
    last = got.view(-1)[-64:]
    assert last.isnan().all()  # a NaN is no number after rounding either


@pytest.mark.parametrize("field", ["scale_absmax", "scale_offset"])
@pytest.mark.parametrize("value", [0.0, -1e-40, 1e-45, 3e38, torch.inf, torch.nan])
def test_nested_scales_of_any_kind(
    make_weight: Callable[..., Weight4], field: str, value: float
) -> None:
    weight = make_weight(5, 256 * 64, 64, nested=True)
    getattr(weight, field).fill_(value)
    wanted = define(weight, torch.bfloat16)
    assert same_bits(expand(weight, torch.empty_like(wanted)), wanted)


# --- slices --------------------------------------------------------------------------------------


@given(
    n=st.integers(0, 60),
    across=st.integers(1, 40),
    cut=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    block=st.sampled_from(BLOCKS[:4]),
    nested=st.booleans(),
    stream=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_slice(
    make_weight: Callable[..., Weight4],
    n: int,
    across: int,
    cut: list[float],
    block: int,
    nested: bool,
    stream: bool,
    dtype: torch.dtype,
) -> None:
    weight = make_weight(n, across * block, block, nested=nested)
    row0, row1 = sorted(round(c * n) for c in cut[:2])
    col0, col1 = sorted(round(c * across) * block for c in cut[2:])
    box = row0, row1, col0, col1
    wanted = define(weight, dtype).view(n, across * block)[row0:row1, col0:col1].contiguous()
    out = torch.empty_like(wanted)
    cpu.expand_slice(weight, *box, out, stream)
    assert same_bits(out, wanted)
    assert same_bits(expand4_slice(weight, *box, dtype), wanted)


@pytest.mark.parametrize("box", [(0, 7, 0, 320), (3, 7, 0, 320), (2, 3, 0, 320), (3, 7, 64, 320)])
@pytest.mark.parametrize("nested", [False, True])
def test_whole_rows(
    make_weight: Callable[..., Weight4], box: tuple[int, int, int, int], nested: bool
) -> None:
    weight = make_weight(7, 320, 64, nested=nested)
    wanted = define(weight, torch.bfloat16).view(7, 320)[box[0] : box[1], box[2] : box[3]]
    assert same_bits(expand4_slice(weight, *box, torch.bfloat16), wanted.contiguous())


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0), (1, 64), (1, 1)])
def test_hardly_anything(make_weight: Callable[..., Weight4], shape: tuple[int, int]) -> None:
    for dtype in DTYPES:
        weight = make_weight(*shape, 64)
        wanted = define(weight, dtype)
        assert same_bits(expand(weight, torch.empty_like(wanted)), wanted)
        if shape[1] % 64 == 0:
            assert expand4_slice(weight, 0, shape[0], 0, shape[1], dtype).shape == shape
            assert expand4_slice(weight, 0, 0, 0, shape[1], dtype).shape == (0, shape[1])


def test_a_block_that_c_does_not_take(make_weight: Callable[..., Weight4]) -> None:
    weight = make_weight(1, 96, 48)
    with pytest.raises(RuntimeError, match="lora_expand4 failed: Invalid argument"):
        expand(weight, torch.empty(96))


# --- memory --------------------------------------------------------------------------------------


def moved(tensor: Tensor, by: int = 1) -> Tensor:
    """A copy `by` bytes behind where an allocation begins, which no allocator gives."""
    memory = bytearray(tensor.nbytes + by + 64)
    start = (by - ctypes.addressof(ctypes.c_char.from_buffer(memory))) % 64
    if not tensor.numel():
        return tensor.clone()
    there = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return there.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("by", [1, 2, 3, 32, 63])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned(
    make_weight: Callable[..., Weight4], dtype: torch.dtype, nested: bool, by: int
) -> None:
    weight = make_weight(3, 1000, 128, nested=nested)
    wanted = define(weight, dtype)
    away = Weight4(*(moved(t, by) if isinstance(t, Tensor) else t for t in weight))
    out = moved(torch.empty_like(wanted), by)
    assert out.data_ptr() % 64 == by
    assert away.codes.data_ptr() % 64 == by
    assert same_bits(expand(away, out, stream=True), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_with_an_offset_of_one(
    make_weight: Callable[..., Weight4], dtype: torch.dtype
) -> None:
    weight = make_weight(3, 1001, 64)
    wanted = define(weight, dtype)
    behind = torch.cat((weight.codes[:1], weight.codes))[1:]
    memory = torch.empty(len(wanted) + 1, dtype=dtype)
    for stream in (False, True):
        assert same_bits(expand(weight._replace(codes=behind), memory[1:], stream), wanted)


def test_tensors_with_gaps_and_scales_of_other_integers(
    make_weight: Callable[..., Weight4],
) -> None:
    weight = make_weight(3, 1000, 64, nested=True)
    wanted = define(weight, torch.float32)
    apart = [
        torch.stack((t, t), -1)[..., 0] if isinstance(t, Tensor) and t.dim() else t for t in weight
    ]
    assert not apart[0].is_contiguous()
    weight = Weight4(*apart)
    assert same_bits(expand(weight, torch.empty(3000)), wanted)
    assert same_bits(expand(weight._replace(scales=weight.scales.long()), wanted.clone()), wanted)


# --- threads, and stores past the caches ---------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_and_either_store_give_the_same_bits(
    make_weight: Callable[..., Weight4],
    dtype: torch.dtype,
    nested: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    k = 5 * PIECE // 8
    weight = make_weight(2, k, 64, nested=nested)
    wanted = define(weight, dtype)
    columns = wanted.view(2, k)[:, 64:-64].contiguous()
    for threads in range(1, 5):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        for stream in (False, True):
            out = torch.full_like(wanted, 7)
            assert same_bits(expand(weight, out, stream), wanted)
            part = torch.full_like(columns, 7)
            cpu.expand_slice(weight, 0, 2, 64, k - 64, part, stream)
            assert same_bits(part, columns)


def test_large_results_are_written_past_the_caches(
    make_weight: Callable[..., Weight4], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(library, "function", lambda *_: lambda *args: said.append(args))
    monkeypatch.setattr(library, "threads", lambda: 3)
    large = torch.empty(cpu.STREAM // 4)
    for out in (large, large[1:], large.view(2, -1)):
        expand(make_weight(1, 64, 64), out)
    cpu.expand_slice(make_weight(1, 64, 64), 0, 1, 0, 64, large)
    expand(make_weight(1, 64, 64), large, stream=False)
    assert [bool(args[-1]) for args in said] == [True, False, True, True, False]
    assert {args[0] for args in said} == {3}


# --- beyond 2^31 ---------------------------------------------------------------------------------


def test_a_slice_behind_2_to_the_32_elements(make_weight: Callable[..., Weight4]) -> None:
    """4 GB of codes' addresses, of which the last pages alone become memory."""
    n, k, block = 2**21 + 3, 4096, 4096
    codes = torch.empty(n * k // 2, dtype=torch.uint8)
    scales = torch.empty(n)
    last = make_weight(8, k, block, seed=3)
    codes[-8 * k // 2 :], scales[-8:] = last.codes, last.scales
    weight = Weight4(codes, scales, NF4, n, k, block)
    got = expand4_slice(weight, n - 8, n, 0, k, torch.bfloat16)
    assert same_bits(got.view(-1), define(last, torch.bfloat16))
    small = weight._replace(block_size=32, scales=torch.empty(n * k // 32))
    small.scales[-8 * k // 32 :] = last.scales.repeat_interleave(k // 32)
    got = expand4_slice(small, n - 8, n, 1024, 2048, torch.float32)
    assert same_bits(got, define(last, torch.float32).view(8, k)[:, 1024:2048].contiguous())


def mirrored(nbytes: int, memory: int) -> mmap.mmap:
    """Addresses of `nbytes` bytes, of which only `memory` exist: they come round again."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t), *(ctypes.c_int,) * 3, ctypes.c_long)
    whole = mmap.mmap(-1, nbytes)
    first = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    file = os.memfd_create("mirrored")
    os.ftruncate(file, memory)
    fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED, which the module does not name
    for at in range(0, nbytes, memory):
        size = min(memory, nbytes - at)
        where = libc.mmap(first + at, size, mmap.PROT_READ | mmap.PROT_WRITE, fixed, file, 0)
        assert where == first + at
    os.close(file)
    return whole


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
@pytest.mark.parametrize("stream", [False, True])
def test_a_result_of_more_than_2_to_the_31_elements(
    make_weight: Callable[..., Weight4], stream: bool, full_run: bool
) -> None:
    if not full_run:
        pytest.skip("1 GB of codes to read: only with full counts")
    n, memory = 2**31 + 3 * 4096 + 7, 1 << 26
    codes, scales = torch.zeros((n + 1) // 2, dtype=torch.uint8), torch.zeros(-(-n // 4096))
    last = make_weight(1, n % 2**20, 4096)
    codes[-last.codes.numel() :], scales[-last.scales.numel() :] = last.codes, last.scales
    out = torch.frombuffer(mirrored(2 * n, memory), dtype=torch.bfloat16)
    cpu.expand(codes, scales, NF4, 4096, None, out, stream)
    wanted = define(last, torch.bfloat16)
    assert same_bits(out[-len(wanted) :], wanted)
    assert not out[-memory // 2 : -len(wanted)].any()  # what came before, all of scale 0
