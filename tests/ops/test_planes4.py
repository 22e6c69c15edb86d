"""Few rows on int8 planes: digits and tables, the decoder's assembly, and the product they make.

The kernel runs in Triton's interpreter with plain look-up; its assembly runs in numpy.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.quant.codebook import NF4 as NF4_ENTRIES
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import Weight4, decode_scales, dequantize4
from lora_kernels.gpu import digits4, planes4
from lora_kernels.gpu.arrange4 import arrange
from lora_kernels.gpu.digits4 import LOOKUP, prepare
from lora_kernels.gpu.finish4 import Update
from lora_kernels.gpu.operands4 import DECODE
from lora_kernels.gpu.planes4 import Tile, default_tile, multiply, variants

NF4 = torch.tensor(NF4_ENTRIES)
HALVES = [torch.bfloat16, torch.float16]
ROW, ENTRY = 127 * 65536 + 127 * 256 + 127, 126 * 256 + 126


def make(n: int, k: int, block: int = 64, *, nested: bool = True) -> tuple[Weight4, Tensor]:
    """A weight of random codes, and the float64 value of the float32 matrix it stands for."""
    codes = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    blocks = n * k // block
    weight = Weight4(codes, torch.rand(blocks) + 0.5, NF4, n, k, block)
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
    dense = dequantize4(codes, scales, weight.table, block, n * k).view(n, k)
    return weight, dense.double()


def lora(n: int, k: int, m: int, adapters: int, rank: int, *, rows: bool) -> Update:
    own = torch.randint(-1, adapters, (m,), dtype=torch.int32) if rows else None
    down, up = torch.randn(adapters, rank, k) / k**0.5, torch.randn(adapters, n, rank)
    return Update(down, up, torch.rand(adapters) + 0.5, own)


def low_rank(x: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """LoRA's part of y and h = x Aᵀ in float64."""
    m = len(x)
    own = torch.zeros(m, dtype=torch.int64) if update.rows is None else update.rows.long()
    index = own.clamp(min=0)
    h = torch.einsum("mk,mrk->mr", x.double(), update.down.double()[index]) * (own >= 0)[:, None]
    s = update.scaling.double()[index, None]
    return s * torch.einsum("mr,mnr->mn", h, update.up.double()[index]), h


def relative(ours: Tensor, truth: Tensor) -> float:
    """Root mean square error over root mean square."""
    return float(((ours.double() - truth).square().mean() / truth.square().mean()).sqrt())


# ------------------------------------------------------------------------------------ the tables


def tables_of(table: Tensor) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Permute tables (4, 8) and look-up tables (2, 16) of a code table, and the unit of sums."""
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    _, largest, tables = prepare(x, table, 2, 64, 64)
    copies = tables[: LOOKUP.value].view(32, 32)
    assert (copies == copies[0]).all()
    return (
        copies[0].numpy().reshape(4, 8),
        tables[LOOKUP.value :].numpy().reshape(2, 16),
        largest[-1],
    )


TABLES = [
    NF4,
    NF4.flip(0),
    -NF4.abs() - 0.1,
    torch.linspace(0, 1, 16),
    torch.tensor([0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25] * 2)
    * (1 - 2 * (torch.arange(16) // 8)),
    torch.arange(16) * 1e-30 - 7e-30,
    torch.zeros(16),
    # a low digit of 127 whose partner is negative
    torch.tensor([1, 127 / ENTRY, *[0] * 7, -5 / ENTRY, *[0] * 6]),
]


@pytest.mark.parametrize(
    "table", [*TABLES, *torch.randn(10, 16, generator=torch.Generator().manual_seed(0))]
)
def test_tables_hold_the_code_in_16_bits(table: Tensor) -> None:
    spread, (high, low), unit = tables_of(table)
    whole = 256 * high.astype(int) + low
    wanted = table.double().numpy() / (table.abs().max().item() or 1) * ENTRY
    assert np.abs(whole - wanted).max() <= 1.51  # half a unit, and one where L would be 127
    if table.any():
        worth = unit.item() * 2.0**-24 * ROW  # of one unit of H L, for digits of 1
        assert worth == pytest.approx(table.abs().max().item() / ENTRY, rel=1e-6)
    for plane, entries in ((0, high), (1, low)):
        near, far = spread[2 * plane].astype(int), spread[2 * plane + 1].astype(int)
        assert (near - (far < 0) == entries[:8]).all()
        assert (far - (near < 0) == entries[8:]).all()


@triton.jit
def _spread_kernel(out_ptr):
    i = tl.arange(0, 256)[:, None] - 128 + tl.zeros((256, 256), tl.int32)
    j = tl.arange(0, 256)[None, :] - 128 + tl.zeros((256, 256), tl.int32)
    at = out_ptr + (i + 128) * 256 + j + 128
    tl.store(at, digits4._spread(i, j, True))
    tl.store(at + 65536, digits4._spread(j, i, False))


def test_every_pair_of_entries_can_share_a_look_up() -> None:
    out = torch.empty(2, 256, 256, dtype=torch.int32)
    _spread_kernel[(1,)](out)
    near, far = out[:, :255, :255]  # an entry of 127 does not occur
    entry = torch.arange(-128, 127)
    assert near.min() >= -128
    assert max(near.max(), far.max()) <= 127
    assert torch.equal(near - (far < 0).int(), entry[:, None].expand(255, 255).int())
    assert torch.equal(far - (near < 0).int(), entry[None, :].expand(255, 255).int())


@pytest.mark.parametrize("table", TABLES[:5])
def test_the_assembly_decodes_every_16_bit_word(
    table: Tensor, run_ptx: Callable[..., list[np.ndarray]]
) -> None:
    spread, (high, low), _ = tables_of(table)
    half = np.arange(1 << 16, dtype=np.uint32)
    for q in (half, half << 16 | half[::-1]):
        words = np.repeat(spread.view("<u4").reshape(8), 4)  # each comes once a byte
        out = run_ptx(DECODE.value, 8, [q, *words])
        planes = [np.stack(out[2 * i : 2 * i + 2], axis=1).view(np.int8) for i in range(4)]
        stored = np.ascontiguousarray(q)[:, None].view(np.uint8)
        codes = np.stack((stored & 15, stored >> 4), axis=2).reshape(-1, 8)  # low nibble first
        assert (planes[0].astype(int) + planes[1] == high[codes]).all()
        assert (planes[2].astype(int) + planes[3] == low[codes]).all()


# ------------------------------------------------------------------------------------ the digits


def numbers(digits: Tensor, m: int, inputs: int, k: int) -> Tensor:
    """The whole numbers (M, K) that digits stand for; checks all that must be 0."""
    tiles, groups, _, columns = digits.shape
    lines = digits.permute(0, 2, 1, 3).reshape(tiles, -1, groups * columns).long()
    assert not lines[:, 0].any()
    rows = lines[:, 1:].reshape(tiles * inputs, 4, -1)
    assert not rows[:, 3].any()
    v = 65536 * rows[:, 0] + 256 * rows[:, 1] + rows[:, 2]
    v = v.view(len(v), -1, 2).flip(2).reshape(len(v), -1)  # neighbours are exchanged
    assert not v[m:].any()
    assert not v[:, k:].any()
    return v[:m, :k]


@given(
    m=st.sampled_from([1, 2, 5, 9]),
    k=st.sampled_from([32, 96, 1024, 1184]),
    inputs=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(HALVES),
    power=st.integers(-20, 14),
    seed=st.integers(0, 2**31),
)
@pytest.mark.usefixtures("poison")
def test_digits_are_x_to_half_a_unit(
    m: int, k: int, inputs: int, dtype: torch.dtype, power: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(m, k).clamp(-3, 3) * 2.0**power).to(dtype)
    x[0, :] *= (torch.rand(k) < 0.1).to(dtype)
    digits, largest, _ = prepare(x, NF4, inputs, 32, -(-k // 256) * 256)
    top = x.abs().amax(1)
    assert torch.equal(largest[:m], top.float())
    assert not largest[m:-1].any()
    v = numbers(digits, m, inputs, k)
    assert v.abs().max() <= ROW
    exact = x.double() / top.double().clamp(min=1e-300)[:, None] * ROW
    assert ((v - exact).abs() <= 1.01).all()  # two float32 roundings near 2^23, and the last one
    assert (v[top > 0].abs().amax(1) == ROW).all()


def test_the_largest_of_a_long_row_may_be_its_last() -> None:
    x = torch.randn(2, 4128).clamp(-3, 3).bfloat16()
    x[0, 4100], x[1, 4096] = 50.0, -50.0
    digits, largest, _ = prepare(x, NF4, 2, 32, 4352)
    assert (largest[:2] == 50).all()
    v = numbers(digits, 2, 2, 4128)
    assert (v[0, 4100], v[1, 4096]) == (ROW, -ROW)
    assert ((v - x.double() / 50 * ROW).abs() <= 1.01).all()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (2.0**-24, torch.float16),
        (40000.0, torch.float16),
        (2.0**-126, torch.bfloat16),  # the interpreter reads smaller ones as 0
        (2e38, torch.bfloat16),
    ],
)
def test_the_smallest_and_the_largest_numbers_keep_their_digits(
    value: float, dtype: torch.dtype
) -> None:
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 1], x[0, 6] = value, -value
    digits, largest, _ = prepare(x, NF4, 2, 64, 64)
    assert largest[0] == x[0, 1].float()
    assert numbers(digits, 1, 2, 64)[0, [0, 1, 6]].tolist() == [0, ROW, -ROW]
    weight, dense = make(16, 64)
    truth = x.double() @ dense.t()
    y = multiply(x, weight, None, None, Tile(2, 16, 4, 1))[0]
    finfo = torch.finfo(dtype)
    bound = finfo.eps * truth.abs() + 1e-4 * value + finfo.smallest_normal * finfo.eps
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_row_that_is_not_finite_gives_nan_and_spoils_no_other(bad: float) -> None:
    weight, _ = make(40, 256)
    x = torch.randn(3, 256).to(torch.bfloat16)
    whole = multiply(x, weight, None, None, Tile(4, 16, 4, 1))[0]
    x[1, 77] = bad
    y = multiply(x, weight, None, None, Tile(4, 16, 4, 1))[0]
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], whole[[0, 2]])
    assert prepare(x, NF4, 4, 64, 256)[1][:3].isnan().tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity times zero
@pytest.mark.parametrize("k", [64, 320])
def test_a_scale_that_is_not_finite_spoils_no_other_row(k: int) -> None:
    """Columns that fill up the last step have no scale, and must not take that of the next row."""
    weight, _ = make(20, k, nested=False)
    weight.scales[k // 64 : 2 * k // 64] = torch.inf
    x = torch.ones(1, k, dtype=torch.bfloat16)
    y = multiply(x, weight, None, None, Tile(2, 16, 4, 1))[0]
    assert y[0].isfinite().tolist() == [i != 1 for i in range(20)]


# ----------------------------------------------------------------------------------- the product


@given(
    m=st.sampled_from([1, 2, 3, 5, 9]),
    n=st.sampled_from([1, 16, 33, 48]),
    blocks=st.integers(1, 9),
    block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(HALVES),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    tile=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
@example(
    m=2,
    n=16,
    blocks=1,
    block=4096,
    dtype=torch.bfloat16,
    options=(True, True, True),
    tile=(2, 16, 2),
    seed=0,
)
@pytest.mark.usefixtures("poison")
def test_it_is_the_exact_product(
    m: int,
    n: int,
    blocks: int,
    block: int,
    dtype: torch.dtype,
    options: tuple[bool, bool, bool],
    tile: tuple[int, int, int],
    seed: int,
    as_accurate_as: Callable[..., None],
) -> None:
    torch.manual_seed(seed)
    nested, has_bias, arranged = options
    weight, dense = make(n, blocks * block, block, nested=nested)
    x = torch.randn(m, blocks * block).to(dtype)
    bias = torch.randn(n) if has_bias else None
    rows, features, splits = tile
    if arranged:
        weight = weight._replace(arranged=arrange(weight))
    y, h = multiply(x, weight, bias, None, Tile(rows, features, 4, splits))
    assert h is None
    truth = x.double() @ dense.t()
    terms = x.double().abs() @ dense.abs().t()
    theirs = x @ dense.to(dtype).t()
    if bias is not None:
        truth, theirs = truth + bias.to(dtype).double(), theirs + bias.to(dtype)
    as_accurate_as(y, theirs, truth, terms)
    rounded = (y.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-5 * terms
    assert rounded.all()  # but for one part in 100 000 it is one rounding


@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier"])
def test_its_error_before_rounding_is_far_below_16_bits(kind: str) -> None:
    weight, dense = make(64, 2048)
    x = torch.randn(2, 2048)
    if kind == "heavy":
        x = x**5
    if kind == "outlier":
        x[:, 5] = 2000.0
    x = x.to(torch.bfloat16)
    # an update of nothing makes the float32 partials be summed, and the bias takes the result away
    truth = x.double() @ dense.t()
    y, _ = multiply(x, weight, None, None, Tile(2, 32, 4, 2))
    remainder = (y.double() - truth.to(torch.bfloat16).double()).count_nonzero()
    assert remainder <= 4  # of 128 results only those near a tie may round to the other side
    assert relative(y, truth) < 2.5e-3


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("adapters", "rows"), [(1, False), (1, True), (3, True)])
@pytest.mark.parametrize(("splits", "block"), [(1, 64), (3, 64), (4, 32)])
@pytest.mark.parametrize("dtype", HALVES)
def test_lora_comes_with_it(
    adapters: int,
    rows: bool,
    splits: int,
    block: int,
    dtype: torch.dtype,
    as_accurate_as: Callable[..., None],
) -> None:
    n, k, m = 20, 832, 3
    weight, dense = make(n, k, block)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    update = lora(n, k, m, adapters, 5, rows=rows)
    if rows:
        assert update.rows is not None
        update.rows[1] = -1
    y, h = multiply(x, weight, bias, update, Tile(2, 16, 4, splits))
    part, own = low_rank(x, update)
    assert h is not None
    assert h.dtype == torch.float32
    assert h.shape == (m, 5)
    assert (h.double() - own).abs().max() <= 1e-5 * own.abs().max()
    if rows:
        assert not h[1].any()
    truth = x.double() @ dense.t() + bias.to(dtype).double() + part
    theirs = x @ dense.to(dtype).t() + bias.to(dtype) + part.to(dtype)
    as_accurate_as(y, theirs, truth, x.double().abs() @ dense.abs().t())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("m", [1, 3])
def test_the_same_bits_again_arranged_and_under_a_lora_of_zero(splits: int, m: int) -> None:
    n, k = 32, 576
    weight, _ = make(n, k)
    x, bias = torch.randn(m, k).to(torch.bfloat16), torch.randn(n)
    tile = Tile(2, 32, 4, splits)
    y = multiply(x, weight, bias, None, tile)[0]
    update = lora(n, k, m, 1, 5, rows=False)
    others = [
        multiply(x, weight, bias, None, tile)[0],
        multiply(x, weight._replace(arranged=arrange(weight)), bias, None, tile)[0],
        multiply(x, weight, bias, update._replace(up=torch.zeros(1, n, 5)), tile)[0],
    ]
    for other in others:
        assert torch.equal(y.view(torch.int16), other.view(torch.int16))
    changed = multiply(x, weight, bias, update, tile)[0]
    assert not torch.equal(y, changed)


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, _ = make(32, 512)
    x = torch.randn(7, 512).to(torch.float16)
    y = multiply(x, weight, None, None, Tile(4, 16, 4, 1))[0]
    for i in range(7):
        alone = multiply(x[i : i + 1], weight, None, None, Tile(2, 16, 4, 1))[0]
        assert torch.equal(y[i : i + 1], alone)


def test_rows_of_x_may_lie_apart() -> None:
    weight, _ = make(24, 256)
    wide = torch.randn(6, 400).to(torch.bfloat16)
    x = wide[::2, 100:356]
    tile = default_tile(3, 24, 256, x.dtype)
    for update in (None, lora(24, 256, 3, 1, 5, rows=False)):
        expected = multiply(x.contiguous(), weight, None, update, tile)
        for ours, theirs in zip(multiply(x, weight, None, update, tile), expected, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "tile", [Tile(2, 64, 4, 1), Tile(4, 32, 2, 2), Tile(2, 16, 8, 1), Tile(8, 64, 1, 3)]
)
@pytest.mark.parametrize("arranged", [False, True])
def test_tiles_of_other_sizes(tile: Tile, arranged: bool) -> None:
    """Not by default, but where they were measured to be faster."""
    weight, dense = make(80, 832)
    x = torch.randn(3, 832).half()
    if arranged:  # what is read then, so that the stored codes may be anything
        weight = weight._replace(arranged=arrange(weight), codes=weight.codes.flip(0))
    y = multiply(x, weight, None, None, tile)[0]
    truth = x.double() @ dense.t()
    bound = 2.0**-11 * truth.abs() + 1e-5 * x.double().abs() @ dense.abs().t()
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("shift", [0, 1, 4, 8])
@pytest.mark.parametrize("arranged", [False, True])
def test_codes_start_at_multiples_of_16_bytes(
    shift: int, arranged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors bear other loads and GPUs do not, so what the kernel is given is looked at."""
    weight, _ = make(32, 256)
    codes = weight.codes.view(-1)
    memory = torch.empty(len(codes) + shift, dtype=torch.uint8)
    moved = memory[shift:].copy_(arrange(weight) if arranged else codes)
    weight = weight._replace(**{"arranged" if arranged else "codes": moved})
    given: list[Tensor] = []

    class Spy:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: given.append(args[3])

    monkeypatch.setattr(planes4, "_planes_kernel", Spy())
    multiply(torch.ones(1, 256).half(), weight, None, None, Tile(2, 16, 4, 1))
    assert given[0].data_ptr() % 16 == 0
    assert torch.equal(given[0].view(-1), moved)


@pytest.mark.parametrize("update", [False, True])
def test_no_rows(update: bool) -> None:
    weight, _ = make(24, 256)
    x = torch.empty(0, 256, dtype=torch.float16)
    low = lora(24, 256, 0, 1, 3, rows=False) if update else None
    y, h = multiply(x, weight, None, low, default_tile(0, 24, 256, x.dtype))
    assert y.shape == (0, 24)
    assert y.dtype == torch.float16
    assert (h is not None and h.shape == (0, 3)) if update else h is None


# ------------------------------------------------------------------------------ tiles and variants


def test_default_tiles_fill_a_gpu_and_leave_no_split_empty() -> None:
    for m in (1, 2, 3, 8, 16):
        for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (16, 64)):
            tile = default_tile(m, n, k, torch.bfloat16)
            assert tile.rows >= min(m, 8)
            assert tile.splits == 1 or (tile.splits - 1) * 512 < k
            if n * k >= 1 << 22:
                tiles = -(-n // tile.features) * -(-m // tile.rows)
                assert tile.splits * tiles >= 240


@pytest.mark.parametrize(
    ("tile", "got"),
    [
        (Tile(1, 32, 4, 1), "rows 1, features 32, splits 1"),
        (Tile(2, 8, 4, 1), "rows 2, features 8, splits 1"),
        (Tile(2, 32, 4, 0), "rows 2, features 32, splits 0"),
    ],
)
def test_other_tiles_are_refused(tile: Tile, got: str) -> None:
    weight, _ = make(16, 64)
    x = torch.ones(1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=f"2, 4 or 8 rows.*got {got}"):
        multiply(x, weight, None, None, tile)


def test_variants_have_names_of_their_own_and_every_argument() -> None:
    forms = [*variants(), *digits4.variants()]
    assert len({form.name for form in forms}) == len(forms)
    for form in forms:
        assert set(form.signature) == set(form.kernel.arg_names)
