"""LoRA's kernels for many rows, in Triton's interpreter, against float64 and PyTorch's chain."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels.dropout import drop_reference
from lora_kernels.gpu import lora4, outer4
from lora_kernels.gpu.lora4 import add, expand, shrink
from lora_kernels.gpu.lora_rows import Dropout
from lora_kernels.gpu.outer4 import outer

VARIANTS = [*lora4.variants(), *outer4.variants()]
HALVES = [torch.bfloat16, torch.float16]
Judge = Callable[..., None]


def own_of(rows: Tensor | None, m: int) -> Tensor:
    return torch.zeros(m).int() if rows is None else rows


def times(x: Tensor, mats: Tensor, rows: Tensor | None, scaling: Tensor) -> Tensor:
    """`s x_i M^T` with the matrix of each row, in the dtype of x."""
    own = own_of(rows, len(x))
    index = own.clamp(min=0).long()
    mats, scaling = mats.to(x.dtype)[index], scaling.to(x.dtype)[index, None]
    return torch.einsum("md,mrd->mr", x, mats) * scaling * (own >= 0)[:, None]


def sums(u: Tensor, v: Tensor, rows: Tensor | None, adapters: int, scaling: Tensor) -> Tensor:
    own = own_of(rows, len(u))
    parts = [u[own == i].t() @ v[own == i] for i in range(adapters)]
    return torch.stack(parts) * scaling.to(u.dtype)[:, None, None]


def make(
    m: int, d: int, adapters: int, r: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x, matrices, rows (some without an adapter) and scaling."""
    rows = None if adapters == 1 else torch.randint(-1, adapters, (m,), dtype=torch.int32)
    mats = torch.randn(adapters, r, d) / d**0.5
    return torch.randn(m, d).to(dtype), mats, rows, torch.rand(adapters) + 0.5


shapes = {
    "m": st.sampled_from([1, 3, 16, 17, 33, 65]),
    "d": st.sampled_from([1, 31, 64, 65, 130]),
    "adapters": st.sampled_from([1, 2, 5]),
    "r": st.sampled_from([1, 3, 16, 20, 33]),
    "dtype": st.sampled_from(HALVES),
    "seed": st.integers(0, 2**31),
}


@given(**shapes)
def test_shrink(
    as_accurate_as: Judge,
    m: int,
    d: int,
    adapters: int,
    r: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, mats, rows, s = make(m, d, adapters, r, dtype)
    truth = times(x.double(), mats, rows, s)
    size = times(x.double().abs(), mats.abs(), rows, s)
    theirs = times(x, mats, rows, s).float()
    strided = mats.transpose(1, 2).contiguous().transpose(1, 2)
    # rows further apart than they are long, and what lies between them is not read
    wide = torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, :d]
    for ours in (shrink(x, mats, rows, s), shrink(wide, strided, rows, s)):
        assert ours.dtype == torch.float32
        # the judge's floor is two roundings to float32: the split must not fall back on 16 bits
        as_accurate_as(ours, theirs, truth, size)
        assert (ours - truth).abs().max() <= 2.0**-14 * size.max()


@given(**shapes)
def test_add(
    as_accurate_as: Judge,
    m: int,
    d: int,
    adapters: int,
    r: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    y, mats, rows, s = make(m, d, adapters, r, dtype)
    h, ups = torch.randn(m, r), mats.transpose(1, 2)  # (L, D, r), by strides
    truth = y.double() + times(h.double(), ups, rows, s)
    theirs = y + times(h.to(dtype), ups, rows, s)
    size = y.double().abs() + times(h.double().abs(), ups.abs(), rows, s)
    before = y.clone()
    ours = add(y, h, ups, rows, s)
    assert torch.equal(y, before)
    as_accurate_as(ours, theirs, truth, size)
    rounding = torch.finfo(dtype).eps / 2 * truth.abs() + torch.finfo(dtype).tiny
    assert ((ours - truth).abs() <= rounding + 2.0**-14 * size).all()  # rounded once
    assert add(y, h, ups.contiguous(), rows, s, in_place=True) is y
    assert torch.equal(y, ours)


@given(**shapes)
def test_outer(
    as_accurate_as: Judge,
    m: int,
    d: int,
    adapters: int,
    r: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    v, _, rows, s = make(m, d, adapters, r, dtype)
    u = torch.randn(m, r)
    truth = sums(u.double(), v.double(), rows, adapters, s)
    theirs = sums(u.to(dtype), v, rows, adapters, s).float()
    size = sums(u.double().abs(), v.double().abs(), rows, adapters, s)
    ours = outer(u, v, rows, adapters, s)
    as_accurate_as(ours, theirs, truth, size)
    assert (ours - truth).abs().max() <= 2.0**-14 * size.max()
    wide = torch.cat((v, torch.full_like(v, torch.nan)), 1)[:, :d]
    other = outer(u, wide, rows, adapters, s, transposed=True)
    assert other.is_contiguous()
    assert torch.equal(other.transpose(1, 2), ours)


@given(**shapes)
def test_dropout_is_that_of_the_definition(
    m: int, d: int, adapters: int, r: int, dtype: torch.dtype, seed: int
) -> None:
    """Each kernel with dropout gives the bits it gives without, of an x with zeros in it."""
    torch.manual_seed(seed)
    x, mats, rows, s = make(m, d, adapters, r, dtype)
    h, ups, key = torch.randn(m, r), mats.transpose(1, 2), torch.tensor([seed << 20])
    drops, dropped = Dropout(key, 20000), drop_reference(x, key, 20000 / 65536)
    assert (dropped == 0).any() or x.numel() < 20
    assert torch.equal(shrink(x, mats, rows, s, drops), shrink(dropped, mats, rows, s))
    both = (outer(h, t, rows, adapters, s, d) for t, d in ((x, drops), (dropped, None)))
    assert torch.equal(*both)
    keep = drop_reference(torch.ones_like(x), key, 20000 / 65536) != 0
    alone = expand(h, ups, dtype, rows, s)
    assert torch.equal(alone, add(torch.zeros_like(x), h, ups, rows, s))
    assert torch.equal(expand(h, ups, dtype, rows, s, drops), torch.where(keep, alone, 0))
    whole = add(x, h, ups, rows, s)
    assert torch.equal(add(x, h, ups, rows, s, drops), torch.where(keep, whole, x))


def test_columns_may_lie_apart() -> None:
    x, mats, rows, s = make(20, 70, 3, 5, torch.float16)
    u, apart = torch.randn(20, 5), x.t().contiguous().t()
    assert torch.equal(shrink(apart, mats, rows, s), shrink(x, mats, rows, s))
    assert torch.equal(outer(u, apart, rows, 3, s), outer(u, x, rows, 3, s))


def test_outer_adds_its_pieces_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer4, "SPLIT", 32)
    v, _, rows, s = make(100, 70, 3, 4, torch.bfloat16)
    u = torch.randn(100, 4)
    ours = outer(u, v, rows, 3, s)
    pieces = [outer(u[i : i + 32], v[i : i + 32], rows[i : i + 32], 3, s) for i in (0, 32, 64, 96)]
    assert torch.equal(ours, torch.stack(pieces).sum(0))
    truth = sums(u.double(), v.double(), rows, 3, s)
    assert (ours - truth).abs().max() <= 2.0**-14 * 100


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mixed", [False, True])
def test_everything_is_written(mixed: bool) -> None:
    adapters = 3 if mixed else 1
    x, mats, rows, s = make(19, 70, adapters, 5, torch.float16)
    h = shrink(x, mats, rows)
    written = (h, add(x, h, mats.transpose(1, 2), rows), outer(h, x, rows, adapters, s))
    assert all(t.isfinite().all() for t in written)


def test_rows_without_an_adapter_and_adapters_without_rows() -> None:
    x, mats, _, s = make(40, 33, 4, 3, torch.bfloat16)
    rows = torch.full((40,), -1, dtype=torch.int32)
    rows[5:9], rows[30:35], rows[35:] = 1, 3, 1 << 20  # 0 and 2 are nobody's; the last are unknown
    rows[38:] = 4  # one beyond
    none = (rows < 0) | (rows > 3)
    h = shrink(x, mats, rows, s)
    assert not h[none].any()
    assert h[~none].any(1).all()
    y = add(x, h, mats.transpose(1, 2), rows, s)
    assert torch.equal(y[none], x[none])
    grads = outer(h + 1, x, rows, 4, s)
    assert not grads[[0, 2]].any()
    assert grads[[1, 3]].any((1, 2)).all()
    rows = torch.zeros(40).int()  # all rows the same adapter, of several and as the only one
    assert torch.equal(shrink(x, mats, rows, s), shrink(x, mats[:1], None, s[:1]))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where infinities meet
def test_a_row_does_not_depend_on_the_others() -> None:
    x, mats, rows, s = make(40, 70, 3, 4, torch.float16)
    rows[:3] = torch.tensor([0, 1, 2])
    mats[1] = torch.inf
    others = rows != 1
    h = shrink(x, mats, rows, s)
    y = add(x, h, mats.transpose(1, 2), rows, s)
    assert h[others].isfinite().all()
    assert y[others].isfinite().all()
    grads = outer(torch.where(others[:, None], h, torch.inf), x, rows, 3)
    assert grads[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_zero_update_leaves_every_bit(dtype: torch.dtype, mixed: bool) -> None:
    y, mats, rows, s = make(20, 40, 3 if mixed else 1, 4, dtype)
    y[:, :10], y[:, 10:20] = -0.0, 0.0
    for scaling in (s, -s, None):
        out = add(y, torch.randn(20, 4), torch.zeros_like(mats).transpose(1, 2), rows, scaling)
        assert torch.equal(out.view(torch.int16), y.view(torch.int16))


def test_no_rows() -> None:
    x, mats, rows, s = make(0, 33, 2, 3, torch.bfloat16)
    h = shrink(x, mats, rows, s)
    assert h.shape == (0, 3)
    assert add(x, h, mats.transpose(1, 2), rows, s).shape == (0, 33)
    grads = outer(h, x, rows, 2, s)
    assert grads.shape == (2, 3, 33)
    assert not grads.any()


def test_large_values_of_float16_do_not_overflow() -> None:
    """h beyond 65504 is what PyTorch's float16 chain turns into infinity."""
    x = torch.full((3, 64), 1000.0, dtype=torch.float16)
    h = shrink(x, torch.full((1, 2, 64), 100.0))
    assert (h == 6.4e6).all()
    y = add(x, h, torch.full((1, 64, 2), 1e-4))
    assert (y == 1000 + 1280).all()


def test_every_form_has_a_name_of_its_own() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names) == 12 * 2 * 2 * 2


@pytest.mark.parametrize("variant", VARIANTS[::7], ids=lambda variant: variant.name)
def test_what_is_gated_is_what_is_launched(
    variant: lora4.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constants, strides of 1 and options of a listed form are those of a launch."""
    seen: list[dict[str, object]] = []

    class Spy:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            def launch(*args: object, **options: object) -> None:
                seen.append(dict(zip(self.kernel.arg_names, args, strict=False)) | options)

            return launch

    kernels = ((lora4, "_shrink_kernel"), (lora4, "_add_kernel"), (outer4, "_outer_kernel"))
    for module, name in kernels:
        monkeypatch.setattr(module, name, Spy(getattr(module, name)))
    dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16}
    kind = next(dtype[t] for t in variant.signature.values() if t in dtype)
    for r, mixed, scaled in itertools.product((16, 32), (False, True), (False, True)):
        x, mats, rows, s = make(20, 48, 3 if mixed else 1, r, kind)
        across = mats.transpose(1, 2).contiguous()  # (L, D, r)
        h, factor = torch.randn(20, r), s if scaled else None
        for one in (mats, across.transpose(1, 2)):
            for drops in (None, Dropout(torch.tensor([3]), 20000)):
                shrink(x, one, rows, factor, drops)
                add(x, h, one.transpose(1, 2), rows, factor, drops)
                expand(h, one.transpose(1, 2), kind, rows, factor, drops)
                outer(h, x, rows, len(mats), factor, drops)
        outer(h, x, rows, len(mats), factor, transposed=True)

    def fits(launch: dict[str, object]) -> bool:
        names = [n for n in launch if n not in ("num_warps", "num_stages")]
        same = set(names) == set(variant.signature) and all(
            launch[n] is value if value is None else launch[n] == value
            for n, value in variant.constants.items()
        )
        pointers = (n for n in names if n.endswith("_ptr") and n not in variant.constants)
        types = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
        types[kind] = variant_type(kind)
        return (
            same
            and launch["num_warps"] == variant.warps
            and launch["num_stages"] == variant.stages
            and all(
                types[launch[n].dtype] == variant.signature[n]
                for n in pointers
                if launch[n] is not None
            )
        )

    def variant_type(kind: torch.dtype) -> str:
        return "*bf16" if kind == torch.bfloat16 else "*fp16"

    assert any(map(fits, seen))
