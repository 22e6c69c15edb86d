"""16-bit products with 4-bit weights that are decoded on the way: x Wᵀ with LoRA, and dy W.

The kernels run in Triton's interpreter with plain look-up; their assembly runs in numpy.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.quant.codebook import NF4 as NF4_ENTRIES
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import Weight4, decode_scales, dequantize4
from lora_kernels.gpu import halves4, matmul4, matmul4_dx
from lora_kernels.gpu.finish4 import Update
from lora_kernels.gpu.matmul4 import Tile, default_dx_tile, default_tile, multiply, multiply_dx
from lora_kernels.gpu.matmul4_dx import DxTile

NF4 = torch.tensor(NF4_ENTRIES)
HALVES = [torch.bfloat16, torch.float16]
TILES = [Tile(16, 64, 4, 1), Tile(32, 64, 4, 1), Tile(64, 64, 4, 1), Tile(16, 128, 4, 1)]
DX_TILES = [DxTile(16, 32, 4, 1), DxTile(32, 64, 8, 1), DxTile(64, 64, 8, 1)]
SHAPES = {
    "m": st.integers(1, 70) | st.just(129),  # but at most two tiles and a bit
    "n": st.sampled_from([1, 3, 31, 64, 65, 130]),
    "k": st.sampled_from([1, 2, 3, 5, 8, 9]),  # blocks; fewer of large ones
    "block": st.sampled_from([32, 64, 128, 256, 4096]),
    "nested": st.booleans(),
    "dtype": st.sampled_from(HALVES),
    "splits": st.sampled_from([1, 2, 3, 100]),
    "seed": st.integers(0, 2**31),
}


def make(n: int, k: int, block: int = 64, *, nested: bool = True) -> tuple[Weight4, Tensor]:
    """A weight of random codes, and the float32 matrix it stands for."""
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    blocks = n * k // block
    weight = Weight4(codes, torch.rand(blocks) * 0.05, NF4, n, k, block)
    if nested:
        weight = weight._replace(
            scales=torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            scale_absmax=torch.rand(-(-blocks // 256)) * 0.02,
            scale_offset=torch.tensor(0.05),
            scale_table=dynamic_map(),
        )
    scales = decode_scales(
        weight.scales, weight.scale_absmax, weight.scale_offset, weight.scale_table
    )
    return weight, dequantize4(codes, scales, NF4, block, n * k).view(n, k)


def columns(blocks: int, block: int) -> int:
    return min(blocks * block, max(block, 640) // block * block)


def lora(n: int, k: int, m: int, adapters: int, rank: int) -> Update:
    own = torch.randint(-1, adapters, (m,), dtype=torch.int32) if adapters > 1 else None
    down, up = torch.randn(adapters, rank, k) / k**0.5, torch.randn(adapters, n, rank)
    return Update(down, up, torch.rand(adapters) + 0.5, own)


def low_rank(x: Tensor, update: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LoRA's part of y and h = x Aᵀ, in `dtype`."""
    own = torch.zeros(len(x), dtype=torch.int64) if update.rows is None else update.rows.long()
    index = own.clamp(min=0)
    down, up, x = update.down.to(dtype)[index], update.up.to(dtype)[index], x.to(dtype)
    h = (x[:, None, :] @ down.mT)[:, 0] * (own >= 0)[:, None]  # (M, r)
    return update.scaling.to(dtype)[index, None] * (h[:, None, :] @ up.mT)[:, 0], h


def rms(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).square().mean().sqrt())


def nearly_rounded_once(ours: Tensor, truth: Tensor, terms: Tensor) -> bool:
    """Whether `ours` is `truth` rounded, after sums in float32 of `terms` (count by magnitude)."""
    half = torch.finfo(ours.dtype).eps / 2 * truth.abs() + torch.finfo(ours.dtype).tiny
    return bool(((ours.double() - truth).abs() <= half * 1.01 + 2.0**-23 * terms).all())


# ------------------------------------------------------------------------------------ x Wᵀ


@given(
    **SHAPES, tile=st.sampled_from(TILES), bias=st.booleans(), adapters=st.sampled_from([0, 1, 3])
)
@example(1, 65, 3, 64, True, torch.bfloat16, 1, 0, TILES[0], True, 0)
@example(33, 130, 5, 64, True, torch.float16, 2, 0, TILES[2], True, 3)
@example(17, 31, 3, 32, False, torch.bfloat16, 1, 0, TILES[0], False, 1)
def test_it_is_as_accurate_as_a_dense_product(
    as_accurate_as: Callable[..., None],
    m: int,
    n: int,
    k: int,
    block: int,
    nested: bool,
    dtype: torch.dtype,
    splits: int,
    seed: int,
    tile: Tile,
    bias: bool,
    adapters: int,
) -> None:
    torch.manual_seed(seed)
    m, k = min(m, 2 * tile.rows + 3), columns(k, block)
    weight, w = make(n, k, block, nested=nested)
    x, b = torch.randn(m, k).to(dtype), torch.randn(n) if bias else None
    update = lora(n, k, m, adapters, 5) if adapters else None
    y, h = multiply(x, weight, b, update, replace(tile, splits=splits))
    rounded = None if b is None else b.to(dtype)
    theirs = torch.nn.functional.linear(x, w.to(dtype), rounded)
    truth = x.double() @ w.double().T
    magnitude = x.double().abs() @ w.double().abs().T
    if rounded is not None:
        truth += rounded.double()
    if update is None:
        assert h is None
    else:
        theirs = theirs + low_rank(x, update, dtype)[0]
        more, inner = low_rank(x, update, torch.float64)
        truth, magnitude = truth + more, magnitude + more.abs().max()
        # A is rounded to the dtype of x, once; the rest is float32
        terms = x.double().abs() @ update.down.double().abs().amax((0, 1))
        assert h is not None
        assert h.dtype == torch.float32
        error = (h.double() - inner).abs()
        assert (error <= terms[:, None] * (torch.finfo(dtype).eps / 2 + k * 2.0**-24)).all()
        if update.rows is not None:
            assert not h[update.rows < 0].any()
    as_accurate_as(y, theirs, truth, magnitude)
    # with W and A rounded as they are to be, what is left is float32 sums and one rounding
    truth = x.double() @ w.to(dtype).double().T + (0 if rounded is None else rounded.double())
    if update is not None:
        narrow = update._replace(down=update.down.to(dtype))
        truth = truth + low_rank(x, narrow, torch.float64)[0]
    assert nearly_rounded_once(y, truth, (k + 16) * magnitude)


@pytest.mark.parametrize(
    ("m", "dtype"), [*((m, torch.bfloat16) for m in (1, 16, 64)), (16, torch.float16)]
)
def test_its_error_is_that_of_the_weight_rounded_once(m: int, dtype: torch.dtype) -> None:
    ours, theirs = 0.0, 0.0
    for seed in range(2):
        torch.manual_seed(seed)
        weight, w = make(256, 1024)
        x = torch.randn(m, 1024).to(dtype)
        truth = x.double() @ w.double().T
        y, _ = multiply(x, weight, None, None, default_tile(m, 256, 1024, dtype))
        ours += rms(y, truth)
        theirs += rms((x.double() @ w.to(dtype).double().T).to(dtype), truth)
    assert ours <= 1.01 * theirs  # 1.05 is promised


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("block", "nested"), [(32, True), (64, True), (64, False), (256, True)])
def test_the_weights_are_the_expanded_ones_bit_for_bit(
    block: int, nested: bool, dtype: torch.dtype
) -> None:
    n, k = 70, 256
    weight, w = make(n, k, block, nested=nested)
    identity = torch.eye(k, dtype=dtype)
    for x, columns in zip(identity.split(64), w.split(64, 1), strict=True):
        assert torch.equal(multiply(x, weight, None, None, TILES[2])[0].T, columns.to(dtype))
    assert torch.equal(multiply_dx(torch.eye(n, dtype=dtype), weight, DX_TILES[2]), w.to(dtype))


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(
    ("tile", "pairs"),
    [(Tile(64, 64, 4, 1), 2), (Tile(64, 32, 2, 1), 1), (Tile(64, 128, 8, 1), 2)],
)
def test_other_orders_of_rows_and_columns_agree(
    tile: Tile, pairs: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other GPUs (PAIRS 2) and of other numbers of warps."""
    monkeypatch.setattr(matmul4, "pairs", lambda device: pairs)
    weight, w = make(140, 320, block)
    x = torch.eye(320).half()[5::6]  # of every run, word, pair and element
    assert torch.equal(multiply(x, weight, None, None, tile)[0].T, w.half()[:, 5::6])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("m", [1, 17, 40])
def test_the_same_bits_again_and_under_a_lora_of_zero(splits: int, m: int) -> None:
    n, k = 130, 64 * 13
    weight, _ = make(n, k)
    x, bias = torch.randn(m, k).bfloat16(), torch.randn(n)
    tile = Tile(16, 64, 4, splits)
    y, _ = multiply(x, weight, bias, None, tile)
    assert y.isfinite().all()
    update = lora(n, k, m, 2, 3)
    zero, h = multiply(x, weight, bias, update._replace(up=torch.zeros_like(update.up)), tile)
    assert h is not None
    assert h.isfinite().all()
    for other in (multiply(x, weight, bias, None, tile)[0], zero):
        assert torch.equal(y.view(torch.int16), other.view(torch.int16))


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, _ = make(70, 320)
    x = torch.randn(20, 320).half()
    whole, _ = multiply(x, weight, None, None, TILES[0])
    x[:7], x[8:] = torch.randn(7, 320), 99
    assert torch.equal(multiply(x, weight, None, None, TILES[0])[0][7], whole[7])


def test_rows_may_lie_apart_and_anywhere() -> None:
    weight, w = make(66, 192)
    wide = torch.randn(9, 400).bfloat16()
    wide[:, 392:] = torch.nan  # beside each of them, and nobody's
    wide[:, 195:200] = torch.nan
    for x in (wide[:, :192], wide[::2, 200:392], wide[:, 3:195]):
        y, _ = multiply(x, weight, None, None, TILES[0])
        assert torch.equal(y, multiply(x.contiguous(), weight, None, None, TILES[0])[0])
        assert rms(y, x.double() @ w.double().T) < 0.01 * x.norm()
    wide = torch.randn(9, 200).half()
    for dy in (wide[:, :66], wide[::2, 7:73]):
        dx = multiply_dx(dy, weight, DX_TILES[0])
        assert torch.equal(dx, multiply_dx(dy.contiguous(), weight, DX_TILES[0]))


def test_codes_may_start_anywhere() -> None:
    weight, _ = make(24, 128)
    x = torch.randn(3, 128).half()
    expected = multiply(x, weight, None, None, TILES[0])[0]
    for shift in (4, 5, 8):
        moved = torch.cat((torch.zeros(shift, 1, dtype=torch.uint8), weight.codes))[shift:]
        other = weight._replace(codes=moved)
        assert torch.equal(multiply(x, other, None, None, TILES[0])[0], expected)
        assert halves4.code_words(other).data_ptr() % 16 == 0  # a load of a GPU


@pytest.mark.parametrize("update", [False, True])
def test_no_rows(update: bool) -> None:
    weight, _ = make(24, 64)
    x = torch.empty(0, 64, dtype=torch.float16)
    given = lora(24, 64, 0, 2, 3) if update else None
    y, h = multiply(x, weight, torch.zeros(24), given, TILES[0])
    assert y.shape == (0, 24)
    assert y.dtype == torch.float16
    assert (h is not None and h.shape == (0, 3)) if update else h is None
    assert multiply_dx(y, weight, DX_TILES[0]).shape == (0, 64)


# ------------------------------------------------------------------------------------ dy W


@given(**SHAPES, tile=st.sampled_from(DX_TILES))
@example(1, 65, 3, 64, True, torch.bfloat16, 1, 0, DX_TILES[0])
@example(33, 130, 5, 64, True, torch.float16, 2, 0, DX_TILES[2])
@example(17, 31, 3, 32, False, torch.bfloat16, 1, 0, DX_TILES[1])
def test_dx_is_as_accurate_as_a_dense_product(
    as_accurate_as: Callable[..., None],
    m: int,
    n: int,
    k: int,
    block: int,
    nested: bool,
    dtype: torch.dtype,
    splits: int,
    seed: int,
    tile: DxTile,
) -> None:
    torch.manual_seed(seed)
    m = min(m, 2 * tile.rows + 3)
    weight, w = make(n, columns(k, block), block, nested=nested)
    dy = torch.randn(m, n).to(dtype)
    dx = multiply_dx(dy, weight, replace(tile, splits=splits))
    magnitude = dy.double().abs() @ w.double().abs()
    as_accurate_as(dx, dy @ w.to(dtype), dy.double() @ w.double(), magnitude)
    truth = dy.double() @ w.to(dtype).double()
    assert nearly_rounded_once(dx, truth, (n + 16) * magnitude)


def test_operands_start_at_multiples_of_16_bytes() -> None:
    wide = torch.randn(9, 408).bfloat16()
    assert halves4.aligned(wide[:, 8:200]).data_ptr() == wide[:, 8:].data_ptr()
    for x in (wide[:, 3:195], wide.view(-1)[: 9 * 404].view(9, 404), wide.view(-1)[1:193][None]):
        ours = halves4.aligned(x)
        assert torch.equal(ours, x)
        assert ours.data_ptr() % 16 == 0
        assert ours.stride(0) % 8 == 0


@pytest.mark.parametrize(
    ("m", "dtype"), [*((m, torch.bfloat16) for m in (1, 16, 64)), (16, torch.float16)]
)
def test_the_error_of_dx_is_that_of_the_weight_rounded_once(m: int, dtype: torch.dtype) -> None:
    ours, theirs = 0.0, 0.0
    for seed in range(2):
        torch.manual_seed(seed)
        weight, w = make(512, 512)
        dy = torch.randn(m, 512).to(dtype)
        truth = dy.double() @ w.double()
        ours += rms(multiply_dx(dy, weight, default_dx_tile(m, 512, 512, dtype)), truth)
        theirs += rms((dy.double() @ w.to(dtype).double()).to(dtype), truth)
    assert ours <= 1.01 * theirs  # 1.05 is promised


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("splits", [1, 3])
def test_dx_gives_the_same_bits_again(splits: int) -> None:
    weight, _ = make(200, 320)
    dy = torch.randn(19, 200).bfloat16()
    dx = multiply_dx(dy, weight, replace(DX_TILES[0], splits=splits))
    assert dx.isfinite().all()
    again = multiply_dx(dy, weight, replace(DX_TILES[0], splits=splits))
    assert torch.equal(dx.view(torch.int16), again.view(torch.int16))


# ------------------------------------------------------------------------------------ assembly


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("table", [NF4, torch.randn(16) * 3, torch.zeros(16)])
def test_the_assembly_decodes_every_16_bit_word(
    run_ptx: Callable[..., list[np.ndarray]], kind: str, dtype: torch.dtype, table: Tensor
) -> None:
    word = np.arange(1 << 16, dtype=np.uint32)
    codes = word | (word * 7 + 13) << 16
    scales = torch.rand(len(word))
    scales[:4] = torch.tensor([0.0, 1.0, 1e-7, -2.0])
    bits = [scales.numpy().view(np.uint32), *table.numpy().view(np.uint32)]
    words = run_ptx(halves4.scale_table(kind), 8, bits)
    pairs = run_ptx(halves4.look_up(), 4, [codes, *words])
    ours = np.stack([half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)], 1)
    # of each byte the high nibble comes first
    index = np.stack([codes >> 4 * (i ^ 1) & 15 for i in range(8)], 1).astype(np.int64)
    weights = (table[torch.from_numpy(index)] * scales[:, None]).to(dtype)
    assert np.array_equal(ours.astype(np.uint16), weights.view(torch.int16).numpy().view(np.uint16))


# ------------------------------------------------------------------------------ tiles and variants


def test_default_tiles_fill_a_gpu_and_leave_no_split_empty() -> None:
    for m in (0, 1, 16, 17, 33, 512):
        for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (16, 64)):
            tile = default_tile(m, n, k, torch.bfloat16)
            assert tile.rows >= min(m, 64)
            assert 1 <= tile.splits <= -(-k // 256)
            programs = -(-n // tile.features) * -(-max(m, 1) // tile.rows) * tile.splits
            assert programs >= 132 or n * k < 1 << 22
            dx = default_dx_tile(m, n, k, torch.float16)
            assert dx.rows >= min(m, 64)
            assert 1 <= dx.splits <= -(-n // dx.features)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 64, 4, 1), "rows must be a power of two from 16 to 128; got 24"),
        ((16, 96, 4, 1), "features must be a multiple of 16 a warp.*got 96 for 4 warps"),
        ((16, 64, 4, 0), "splits must be 1 or more; got 0"),
    ],
)
def test_other_tiles_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tile(*sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 64, 4, 1), "rows must be a power of two from 16 to 128; got 24"),
        ((16, 48, 4, 1), "features must be a power of two from 16 to 128; got 48"),
        ((16, 64, 4, 0), "splits must be 1 or more; got 0"),
    ],
)
def test_other_dx_tiles_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DxTile(*sizes)


def test_variants_have_names_of_their_own_and_every_argument() -> None:
    forms = [*matmul4.variants(), *matmul4_dx.variants()]
    assert len({form.name for form in forms}) == len(forms)
    for form in forms:
        assert set(form.signature) == set(form.kernel.arg_names)
        assert {n for n, kind in form.signature.items() if kind == "constexpr"} == set(
            form.constants
        )
