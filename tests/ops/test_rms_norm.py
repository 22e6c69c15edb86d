"""RMS norm in every backend: values, gradients, layouts, what is kept, and the compiler."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import rms_norm
from lora_kernels.gpu import rms_norm as gpu
from lora_kernels.rms_norm import rms_norm_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FORMS: list[dict[str, bool]] = [{}, {"offset": True}, {"wide": True}]
OPS = torch.ops.lora_kernels
Judge = Callable[..., None]


# everything below holds for every backend
pytestmark = pytest.mark.usefixtures("backend")


def step(norm: Callable[..., Tensor], x: Tensor, w: Tensor, dy: Tensor, **k: Any) -> list[Tensor]:
    """y, dx, dw."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = norm(x, w, **k)
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy.to(y.dtype))]


def judge(accurate: Judge, x: Tensor, w: Tensor, dy: Tensor, **k: Any) -> list[Tensor]:
    """Hold one step against PyTorch's; gives it back."""
    ours, theirs = step(rms_norm, x, w, dy, **k), step(rms_norm_reference, x, w, dy, **k)
    wide = [t.double() for t in (x, w, dy)]
    truth = step(rms_norm_reference, *wide, **k)
    # gradients are sums that cancel: of magnitudes they would be
    r = (wide[0].square().mean(-1, keepdim=True) + k.get("eps", 1e-6)).rsqrt()
    n, g = (wide[0] * r).abs(), (wide[2] * (wide[1] + k.get("offset", False))).abs()
    sizes = (None, r * (g + n * (g * n).mean(-1, keepdim=True)), (wide[2].abs() * n).sum())
    for a, b, t, size in zip(ours, theirs, truth, sizes, strict=True):
        accurate(a, b, t, size)
    return ours


@given(
    lead=st.sampled_from([(), (1,), (3,), (2, 5), (2, 0), (17, 1)]),
    h=st.sampled_from([1, 2, 15, 16, 31, 64, 100, 257]),
    dtype=st.sampled_from(DTYPES),
    single=st.booleans(),
    form=st.sampled_from(FORMS),
    eps=st.sampled_from([1e-6, 1e-2]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
@example((3,), 31, torch.bfloat16, True, {}, 1e-6, 1.0, 0)
@example((5,), 64, torch.bfloat16, True, {"wide": True}, 1e-6, 1.0, 0)
def test_it_is_as_accurate_as_pytorch(
    as_accurate_as: Judge,
    lead: tuple[int, ...],
    h: int,
    dtype: torch.dtype,
    single: bool,
    form: dict[str, bool],
    eps: float,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, w, dy = (torch.randn(*lead, h) * scale).to(dtype), torch.randn(h), torch.randn(*lead, h)
    w = w if single else w.to(dtype)
    result = dtype if form else torch.promote_types(dtype, w.dtype)
    ours = judge(as_accurate_as, x, w, dy.to(result), eps=eps, **form)
    assert [t.dtype for t in ours] == [result, dtype, w.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "h"), [(1, 16384), (2, 64), (2, 65), (3, 300)])
def test_long_rows(
    as_accurate_as: Judge,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rows: int,
    h: int,
) -> None:
    if h <= 300:  # beyond 64 a row is gone through in pieces
        monkeypatch.setattr(gpu, "LONGEST", 64)
    x, w, dy = (torch.randn(n, h).to(dtype) for n in (rows, 1, rows))
    judge(as_accurate_as, x, w[0], dy)


def test_the_weights_gradient_over_many_rows(as_accurate_as: Judge, backend: str) -> None:
    m = 2 * gpu.SPLIT + 3
    x, w, dy = (torch.randn(n, 24) for n in (m, 1, m))
    first = judge(as_accurate_as, x, w[0], dy)
    if backend == "native":
        for threads in (2, 3):
            torch.set_num_threads(threads)
            try:
                again = step(rms_norm, x, w[0], dy)
            finally:
                torch.set_num_threads(1)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_definition_is_what_the_decoder_computed_all_along() -> None:
    x, w = torch.randn(7, 33), torch.randn(33)
    wide = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(rms_norm_reference(x, w, 1e-5), w * wide)
    half = x.bfloat16()
    wide = half.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(rms_norm_reference(half, w, 1e-5), w * wide.bfloat16())


def test_it_rounds_before_the_product_with_the_weight() -> None:
    x, w = torch.randn(50, 64).bfloat16(), torch.rand(64) + 0.5
    quotient = rms_norm(x, torch.ones(64).bfloat16())
    assert torch.equal(rms_norm(x, w), w * quotient)
    assert not torch.equal(rms_norm(x, w - 1, offset=True), (w * quotient).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_wide_form_rounds_once(dtype: torch.dtype) -> None:
    x, w, dy = torch.randn(200, 64).to(dtype), torch.rand(64) + 0.5, torch.randn(200, 64).to(dtype)
    exact = rms_norm_reference(x.double(), w.double()).to(dtype)
    once = (rms_norm(x, w, wide=True) == exact).double().mean()
    twice = (rms_norm(x, w.to(dtype)) == exact).double().mean()
    assert once > 0.99  # float32's own errors move a number over the middle now and then
    assert twice < 0.9
    assert rms_norm(x, w, wide=True).dtype == dtype
    # backward knows it: the weight's gradient is that of the quotient as it was, not rounded
    r = x.double().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    wanted = (dy.double() * (x.double() * r)).sum(0)
    (_, _, dw), (_, _, rounded) = (step(rms_norm, x, w, dy, wide=k) for k in (True, False))
    assert (dw - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (rounded - wanted).abs().max() > 1e-4 * wanted.abs().max()


def test_the_offset_is_wide_by_itself() -> None:
    x, w, dy = torch.randn(9, 32).bfloat16(), torch.randn(32), torch.randn(9, 32).bfloat16()
    said = step(rms_norm, x, w, dy, offset=True, wide=True)
    assert all(
        torch.equal(a, b) for a, b in zip(step(rms_norm, x, w, dy, offset=True), said, strict=True)
    )
    apart = step(rms_norm, x, w + 1, dy, wide=True)
    assert all(torch.equal(a, b) for a, b in zip(apart, said, strict=True))


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "offset", "wide"])
def test_heads_are_normalised_where_a_projection_wrote_them(
    as_accurate_as: Judge, backend: str, size: int, form: dict[str, bool]
) -> None:
    heads, kv = 4, 2
    fused = torch.randn(2, 5, (heads + 2 * kv) * size).bfloat16()
    w, dy = torch.rand(size).bfloat16(), torch.randn(2, 5, heads, size).bfloat16()
    q = fused[..., : heads * size].view(2, 5, heads, size)  # between its rows lie k and v
    assert not q.is_contiguous()
    wanted = judge(as_accurate_as, q.contiguous(), w, dy, **form)
    turned = step(rms_norm, q.transpose(1, 2), w, dy.transpose(1, 2), **form)  # (B, H, T, D)
    for got in (step(rms_norm, q, w, dy, **form), [t.transpose(1, 2) for t in turned[:2]]):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=False))
    # rows add up in another order
    assert (turned[2] - wanted[2]).abs().max() <= 0.02 * wanted[2].abs().max()


def test_many_short_rows(as_accurate_as: Judge, backend: str) -> None:
    x, w, dy = torch.randn(3, 101, 7, 64), torch.rand(64), torch.randn(3, 101, 7, 64)
    first = judge(as_accurate_as, x, w, dy, wide=True)
    for threads in (2, 3) if backend == "native" else ():
        torch.set_num_threads(threads)
        try:
            again = step(rms_norm, x, w, dy, wide=True)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_everything_is_written_whatever_the_layout(dtype: torch.dtype, backend: str) -> None:
    base, dy, w = torch.randn(6, 5, 40).to(dtype), torch.randn(6, 5, 40).to(dtype), torch.randn(40)
    apart = torch.full((6, 5, 80), torch.nan).to(dtype)
    apart[..., :40] = base
    wanted = step(rms_norm, base, w.to(dtype), dy)
    assert all(t.isfinite().all() for t in wanted)
    layouts = [
        (apart[..., :40], dy),  # nobody reads between the rows
        (base.transpose(0, 2).contiguous().transpose(0, 2), dy),
        (base, dy.transpose(0, 1).contiguous().transpose(0, 1)),
    ]
    for x, given_dy in layouts:
        ours = step(rms_norm, x, w.to(dtype), given_dy)
        assert ours[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    every_other = torch.stack((w.to(dtype), torch.full((40,), torch.nan).to(dtype)), 1)[:, 0]
    assert torch.equal(step(rms_norm, base, every_other, dy)[1], wanted[1])
    ones = torch.ones(1, dtype=dtype).expand(6, 5, 40)
    assert step(rms_norm, base, w.to(dtype), ones)[1].isfinite().all()


def test_rows_of_zeros_and_of_nan_keep_to_themselves() -> None:
    x, w, dy = torch.randn(5, 48), torch.randn(48), torch.randn(5, 48)
    clean = step(rms_norm, x, w, dy)
    x[1], x[3, 7] = 0, torch.nan
    y, dx, _ = step(rms_norm, x, w, dy)
    assert not y[1].any()
    torch.testing.assert_close(dx[1], dy[1] * w * 1e3)
    for ours, before in ((y, clean[0]), (dx, clean[1])):
        assert ours[3].isnan().all()
        assert torch.equal(ours[[0, 2, 4]], before[[0, 2, 4]])


def test_backward_again_gives_the_same_and_writes_into_nothing() -> None:
    x, w = torch.randn(4, 20).requires_grad_(), torch.randn(20).requires_grad_()
    before = x.detach().clone(), w.detach().clone()
    y = rms_norm(x, w)
    runs = [torch.autograd.grad(y.sum(), (x, w), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trained", [False, True])
def test_x_and_the_weight_are_all_that_is_kept(dtype: torch.dtype, trained: bool) -> None:
    x, w = torch.randn(9, 32).to(dtype).requires_grad_(), torch.randn(32).to(dtype)
    w.requires_grad_(trained)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm(x, w)
    assert {t.data_ptr() for t in kept} <= {x.data_ptr(), w.data_ptr()}
    y.sum().backward()
    assert x.grad is not None
    assert (w.grad is not None) == trained


def test_what_is_not_wanted_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
    both = OPS.rms_norm_backward(dy, x, w, 1e-6, False, False, True, True)
    for wants in ((True, False), (False, True), (False, False)):
        one = OPS.rms_norm_backward(dy, x, w, 1e-6, False, False, *wants)
        for got, whole, wanted in zip(one, both, wants, strict=True):
            assert torch.equal(got, whole) if wanted else got.numel() == 0
    y = rms_norm(x, w.requires_grad_())
    (dw,) = torch.autograd.grad(y, w, dy)
    assert torch.equal(dw, both[1])


@pytest.mark.parametrize("form", FORMS, ids=["plain", "offset", "wide"])
def test_higher_derivatives(form: dict[str, bool]) -> None:
    x, w = (torch.randn(n, 5, dtype=torch.float64).requires_grad_() for n in (3, 1))
    function = lambda x, w: rms_norm(x, w[0], 1e-3, **form)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, w), fast_mode=True)


def test_a_penalty_on_a_gradient_follows_x_alone_where_dy_depends_on_it() -> None:
    x, w = torch.randn(3, 6, dtype=torch.float64).requires_grad_(), torch.rand(6).double()
    found = []
    for norm in (rms_norm, rms_norm_reference):
        y = norm(x, w)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 3, 16).to(dtype), torch.randn(16)
    for own, offset in ((x, False), (x.transpose(0, 1), True)):
        leaves = own.detach().requires_grad_(), w.detach().requires_grad_()
        torch.library.opcheck(OPS.rms_norm.default, (*leaves, 1e-6, offset, offset))
    dy = torch.randn(2, 3, 16)
    for wants in ((True, True), (True, False)):
        torch.library.opcheck(OPS.rms_norm_backward.default, (dy, x, w, 1e-6, False, False, *wants))


def test_it_compiles_in_one_graph() -> None:
    x, w, dy = torch.randn(4, 24), torch.randn(24), torch.randn(4, 24)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    pairs: Iterator = zip(step(compiled, x, w, dy), step(rms_norm, x, w, dy), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS, ids=["plain", "offset", "wide"])
def test_fake_tensors_have_the_results_dtype(form: dict[str, bool]) -> None:
    with FakeTensorMode():
        x, w = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(8)
        assert rms_norm(x, w, **form).dtype == (torch.bfloat16 if form else torch.float32)


def test_autocast_changes_nothing() -> None:
    x, w = torch.randn(4, 24), torch.randn(24)
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(x, w)
    assert y.dtype == torch.float32
    assert torch.equal(y, rms_norm(x, w))


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x must be floating-point; got"),
        ({"weight": torch.zeros(8, dtype=torch.bool)}, TypeError, "weight must be floating-point"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be \(8,\), as long as the rows of x"),
        ({"x": torch.tensor(1.0)}, ValueError, r"weight must be \(H,\)"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "x is on cpu and weight on meta"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0; got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0; got nan"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        rms_norm(**({"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6} | change))
