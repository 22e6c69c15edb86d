"""Cross-entropy of rows of logits in C, on every instruction set of this machine."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import cross_entropy
from lora_kernels.cpu import cross_entropy as native
from lora_kernels.cross_entropy import Grading, grade_columns, grade_rows, rows_reference

pytestmark = pytest.mark.usefixtures("isa")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 4 to 16 lanes, blocks of 64 vectors: whole, one more, one less, several with a rest
SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 255, 256, 257, 1023, 1024, 1025, 3000]
GRADINGS = [Grading(), Grading(30.0), Grading(5.0, 0.7, 0.1), Grading(None, 2.0, 0.6)]


def draw(seed: int, n: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    logits *= 2.0 ** (torch.arange(n) % 6 - 2)[:, None]
    return logits.to(dtype), torch.randint(0, classes, (n,), generator=generator)


def compare(
    as_accurate_as: Callable[..., None], logits: Tensor, targets: Tensor, grading: Grading
) -> None:
    """C against float64, as near as the definition is; columns equal to rows, bit for bit."""
    truth, theirs, ours = logits.double(), logits.clone(), logits.clone()
    exact = rows_reference(truth, targets, grading, True)
    base = rows_reference(theirs, targets, grading, True)
    losses, norms = native.grade_rows(ours, targets, grading, True)
    as_accurate_as(losses, base[0], exact[0])
    as_accurate_as(norms[:, 0], base[1][:, 0], exact[1][:, 0])
    as_accurate_as(ours, theirs, truth)
    classes, alone = logits.shape[1], logits.clone()
    assert torch.equal(native.grade_rows(alone, targets, grading, False)[0], losses)
    assert torch.equal(alone, logits)
    for first, last in ((0, 1), (classes // 3, classes), (classes // 2, classes // 2 + 1)):
        part = logits[:, first:last].clone(memory_format=torch.contiguous_format)
        native.grade_columns(part, targets, norms, first, classes, grading)
        assert torch.equal(part, ours[:, first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_sizes_around_vectors_and_blocks(
    as_accurate_as: Callable[..., None], classes: int, dtype: torch.dtype
) -> None:
    for grading in GRADINGS:
        compare(as_accurate_as, *draw(classes, 3, classes, dtype), grading)


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 9),
    classes=st.integers(1, 2500),
    dtype=st.sampled_from(DTYPES),
    grading=st.sampled_from(GRADINGS),
)
def test_any_size(
    as_accurate_as: Callable[..., None],
    seed: int,
    n: int,
    classes: int,
    dtype: torch.dtype,
    grading: Grading,
) -> None:
    compare(as_accurate_as, *draw(seed, n, classes, dtype), grading)


def test_a_vocabulary_of_128256(as_accurate_as: Callable[..., None]) -> None:
    for dtype in DTYPES:
        compare(as_accurate_as, *draw(1, 2, 128_256, dtype), Grading())


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_maximum_that_comes_early_or_late(
    as_accurate_as: Callable[..., None], place: str
) -> None:
    """Sums are scaled as larger logits come; far below the maximum nothing is left of them."""
    for size in (10.0, 100.0, 3e4):
        logits = torch.linspace(-size, size, 5000)[None].repeat(2, 1)
        logits = logits if place == "last" else logits.flip(1)
        compare(as_accurate_as, logits, torch.tensor([0, 4999]), Grading())


def test_the_exponential_and_the_logarithm() -> None:
    """Of logits 0 and -x: the first costs log(1 + e^-x), the second x more."""
    x = torch.cat((torch.linspace(0, 110, 4001), torch.tensor([87.2, 87.29, 87.31, 1e30])))
    for target in (0, 1):
        logits = torch.stack((torch.zeros_like(x), -x), 1)
        targets = torch.full((len(x),), target)
        losses, _ = native.grade_rows(logits, targets, Grading(), True)
        wanted = torch.tensor([math.log1p(math.exp(-v)) + v * target for v in x.tolist()]).double()
        p = 1 / (1 + x.double().exp())
        # of S = 1 + e^-x, rounded once and summed from numbers within 2 units in the last place
        assert (losses.double() - wanted).abs().le(2.0**-22 * (1 + wanted)).all()
        assert (logits[:, 1].double() - (p - target)).abs().le(2.0**-22).all()
        large = p > 1e-30  # relative, where it is p alone
        if target == 0:
            error = (logits[:, 1].double() / p - 1).abs()
            assert error[large].le(6 * 2.0**-23).all()


def test_tanh_keeps_the_digits_of_small_numbers() -> None:
    z = torch.cat((torch.logspace(-6, 1.5, 3000), torch.tensor([0.549, 0.55, 0.551, 20.0, 1e30])))
    norms = torch.tensor([0.0, 1.0]).repeat(len(z), 1)  # so that p = exp(y), y = tanh z
    logits = z[:, None].clone()
    outside = torch.full((len(z),), 7)
    native.grade_columns(logits, outside, norms, 0, 1, Grading(1.0))
    y = torch.tanh(z.double())
    wanted = y.exp() * (1 - y * y)
    assert (logits[:, 0].double() - wanted).abs().le(2e-6).all()
    small = z < 0.3
    judged = native.grade_rows(
        z[small, None].clone(), torch.zeros_like(z[small]).long(), Grading(1.0), False
    )[1][:, 0]  # m = tanh z
    assert (judged.double() / y[small] - 1).abs().le(3 * 2.0**-24).all()


def test_logits_that_are_not_finite() -> None:
    logits, targets = torch.randn(6, 3000), torch.zeros(6, dtype=torch.int64)
    logits[0, 3:] = -torch.inf
    logits[1, 2999], logits[2, 40], logits[3] = torch.inf, torch.nan, -torch.inf
    logits[4, :2999], targets[4] = -torch.inf, 2999  # whole blocks of nothing
    base = logits.clone()
    wanted, _ = rows_reference(base, targets, Grading(), True)
    losses, _ = native.grade_rows(logits, targets, Grading(), True)
    assert losses.isnan().tolist() == wanted.isnan().tolist() == [False, *[True] * 3, False, False]
    torch.testing.assert_close(losses, wanted, equal_nan=True)
    assert losses[4] == 0
    for row in (0, 4, 5):
        torch.testing.assert_close(logits[row], base[row])


@pytest.mark.parametrize("wrong", [-1, -100, 30, 2**40])
def test_a_target_outside_costs_nan_and_touches_nothing(wrong: int) -> None:
    logits, targets = draw(0, 3, 30, torch.float32)
    targets[1] = wrong
    losses, _ = native.grade_rows(logits, targets, Grading(), True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits[1].ge(0).all()  # p, of which nothing was taken off


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_any_number_of_threads(dtype: torch.dtype) -> None:
    logits, targets = draw(0, 40, 9000, dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            mine = logits.clone()
            found.append((*native.grade_rows(mine, targets, GRADINGS[2], True), mine))
        finally:
            torch.set_num_threads(1)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_every_element_is_written(poison: None) -> None:
    logits, targets = draw(0, 5, 77, torch.bfloat16)
    losses, norms = native.grade_rows(logits, targets, Grading(), True)
    assert all(t.isfinite().all() for t in (losses, norms, logits))


def test_the_operator_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("grade_rows", "grade_columns"):
        run = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, run=run: called.append(a) or run(*a))
    logits, targets = draw(0, 3, 20, torch.float32)
    _, norms = grade_rows(logits.clone(), targets, Grading(), True)
    grade_columns(logits, targets, norms, 0, 20, Grading())
    assert len(called) == 2
    assert cross_entropy.BACKENDS == ("reference", "native", "triton")
