"""Summing split products: slices, bias, LoRA's update and one rounding, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels.gpu.finish4 import TILES, Update, finish, variants

HALVES = [torch.bfloat16, torch.float16]


def make(
    s: int, m: int, n: int, adapters: int, r: int, mixed: bool = True
) -> tuple[Tensor, Tensor, Update]:
    """Partials, a bias and an update; some rows have no adapter."""
    partials = torch.randn(s, m, n + adapters * r)
    rows = torch.randint(-1, adapters, (m,), dtype=torch.int32) if mixed else None
    up, scaling = torch.randn(adapters, n, r), torch.rand(adapters) + 0.5
    return partials, torch.randn(n), Update(torch.empty(adapters, r, 1), up, scaling, rows)


def in_float64(
    partials: Tensor, n: int, bias: Tensor | None, update: Update | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    total = partials.double().sum(0)
    y = total[:, :n] if bias is None else total[:, :n] + bias.to(dtype).double()
    if update is None:
        return y, None
    m = len(total)
    own = torch.zeros(m).int() if update.rows is None else update.rows
    each = total[:, n:].view(m, -1, update.rank)  # (M, L, r)
    index = own.clamp(min=0).long()
    h = each[torch.arange(m), index] * (own >= 0)[:, None]
    s = update.scaling.double()[index, None]
    return y + s * torch.einsum("mr,mnr->mn", h, update.up.double()[index]), h


@given(
    s=st.integers(1, 5),
    m=st.sampled_from([1, 2, 7, 8, 9, 17]),
    n=st.sampled_from([1, 63, 64, 65, 130]),
    adapters=st.sampled_from([1, 5]),
    r=st.sampled_from([1, 3, 16, 20]),
    dtype=st.sampled_from(HALVES),
    options=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_it_rounds_the_exact_result_once(
    s: int,
    m: int,
    n: int,
    adapters: int,
    r: int,
    dtype: torch.dtype,
    options: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    has_bias, has_update = options
    partials, bias, update = make(s, m, n, adapters, r, mixed=adapters > 1)
    given_bias = bias if has_bias else None
    if not has_update:
        partials, update = partials[:, :, :n], None  # a view: rows are strided
    y, h = finish(partials, n, given_bias, update, dtype)
    truth, own = in_float64(partials, n, given_bias, update, dtype)
    assert y.dtype == dtype
    terms = s + 3 if update is None else (s + r + 4)
    size = 1 + truth.abs() + (0 if own is None else own.abs().sum(1, keepdim=True) * 5)
    bound = torch.finfo(dtype).eps / 2 * truth.abs() + terms * 2.0**-23 * size * s
    assert ((y.double() - truth).abs() <= bound).all()
    if own is None:
        assert h is None
    else:
        assert h.dtype == torch.float32
        assert h.shape == (m, r)
        assert (h.double() - own).abs().max() <= s * 2.0**-22 * (1 + own.abs().max())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("r", [1, 20])
def test_everything_is_written(m: int, r: int) -> None:
    partials, bias, update = make(2, m, 70, 3, r)
    y, h = finish(partials, 70, bias, update, torch.bfloat16)
    assert y.isfinite().all()
    assert h.isfinite().all()


@pytest.mark.parametrize("s", [1, 3])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_zero_update_leaves_every_bit(s: int, dtype: torch.dtype, mixed: bool) -> None:
    n = 66
    for has_bias in (False, True):
        partials, bias, update = make(s, 9, n, 3 if mixed else 1, 4, mixed)
        partials[:, :, :20] = -0.0  # of both signs, as y + 0 would turn -0 into 0
        partials[:, :, 20:40] = 0.0
        partials[:, :, 40:44] = -1e-30  # rounds to -0 in float16
        zero = update._replace(up=torch.zeros_like(update.up), scaling=-update.scaling)
        given_bias = bias if has_bias else None
        plain, _ = finish(partials[:, :, :n].contiguous(), n, given_bias, None, dtype)
        for each in (zero, zero._replace(scaling=update.scaling)):
            y, _ = finish(partials, n, given_bias, each, dtype)
            assert torch.equal(y.view(torch.int16), plain.view(torch.int16))
        if not has_bias:
            assert plain[:, :20].signbit().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where infinities meet
def test_a_row_does_not_depend_on_the_others() -> None:
    partials, bias, update = make(3, 11, 70, 4, 5)
    update.up[2] = torch.inf  # reaches rows of adapter 2 alone
    update.rows[:4] = torch.tensor([0, 2, -1, 3])
    y, h = finish(partials, 70, bias, update, torch.float16)
    assert y[update.rows != 2].isfinite().all()
    assert not y[1].isfinite().any()
    for i in range(11):
        alone = update._replace(rows=update.rows[i : i + 1])
        z, g = finish(partials[:, i : i + 1], 70, bias, alone, torch.float16)
        assert torch.equal(z[0].nan_to_num(), y[i].nan_to_num())
        assert torch.equal(g[0], h[i])


def test_rows_beyond_the_adapters_read_nothing() -> None:
    partials, bias, update = make(1, 3, 8, 2, 4)
    wrong = update._replace(rows=torch.tensor([2, 1 << 30, -7], dtype=torch.int32))
    y, h = finish(partials, 8, bias, wrong, torch.float16)
    none, _ = finish(partials[:, :, :8], 8, bias, None, torch.float16)
    assert torch.equal(y, none)
    assert not h.any()


def test_no_rows() -> None:
    partials, bias, update = make(2, 0, 8, 1, 4)
    y, h = finish(partials, 8, bias, update, torch.bfloat16)
    assert (y.shape, h.shape) == ((0, 8), (0, 4))


def test_every_form_has_a_name_of_its_own() -> None:
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names) == len(TILES) * 2 * 2 * 3


def test_no_form_contracts_a_product() -> None:
    # lanes that add each other's terms would round them differently, and race to store the sum
    assert not any(variant.fp_fusion for variant in variants())


def test_slices_are_added_from_the_first_to_the_last() -> None:
    partials = torch.randn(7, 5, 33)
    y, _ = finish(partials, 33, None, None, torch.float32)
    total = partials[0]
    for part in partials[1:]:
        total = total + part
    assert torch.equal(y, total)
    assert not torch.equal(y, partials.flip(0).cumsum(0)[-1])
