"""Cross-entropy of rows of logits: the definition against PyTorch's own, in float64 and below."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import cross_entropy
from lora_kernels.cross_entropy import Grading, columns_reference, grade_rows, rows_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADINGS = st.builds(
    Grading,
    st.sampled_from([None, 5.0, 30.0]),
    st.sampled_from([1.0, 0.25, 3.0]),
    st.sampled_from([0.0, 0.1, 0.6]),
)
SIZES = st.tuples(st.integers(0, 7), st.integers(1, 70))


def draw(seed: int, n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits (n, V) float64 of rows of different size, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    logits *= 2.0 ** (torch.arange(n) % 6 - 2)[:, None]
    return logits, torch.randint(0, classes, (n,), generator=generator)


def plain(logits: Tensor, targets: Tensor, grading: Grading) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum, by PyTorch's own operators."""
    z = logits.clone().requires_grad_()
    y = z.to(torch.promote_types(z.dtype, torch.float32)) * grading.scale
    if grading.softcap is not None:
        y = grading.softcap * torch.tanh(y / grading.softcap)
    smoothing = grading.label_smoothing
    losses = F.cross_entropy(y, targets, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


@given(st.integers(0, 2**31), SIZES, GRADINGS, st.integers(1, 200))
def test_in_float64_it_is_pytorchs(
    seed: int, sizes: tuple[int, int], grading: Grading, at_a_time: int
) -> None:
    logits, targets = draw(seed, *sizes)
    wanted, gradient = plain(logits, targets, grading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "SLICE_ELEMENTS", at_a_time)
        losses, norms = rows_reference(logits, targets, grading, True)
    # sums of 70 terms; dz is at most the scale, 3
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, gradient, rtol=1e-11, atol=1e-13)
    assert norms.shape == (sizes[0], 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**31), sizes=SIZES, grading=GRADINGS)
def test_below_float64_it_is_as_accurate(
    as_accurate_as: Callable[..., None],
    dtype: torch.dtype,
    seed: int,
    sizes: tuple[int, int],
    grading: Grading,
) -> None:
    logits, targets = draw(seed, *sizes)
    logits = logits.to(dtype)
    truth, theirs = (plain(t, targets, grading) for t in (logits.double(), logits))
    losses, _ = rows_reference(logits, targets, grading, True)
    assert losses.dtype is torch.float32
    as_accurate_as(losses, theirs[0], truth[0])
    as_accurate_as(logits, theirs[1], truth[1])


@given(st.integers(0, 2**31), SIZES, GRADINGS, st.integers(0, 69), st.integers(1, 70))
def test_columns_are_those_of_the_rows(
    seed: int, sizes: tuple[int, int], grading: Grading, first: int, count: int
) -> None:
    logits, targets = draw(seed, *sizes)
    first = min(first, sizes[1] - 1)
    part = logits[:, first : first + count].clone()
    _, norms = rows_reference(logits, targets, grading, True)
    columns_reference(part, targets, norms, first, sizes[1], grading)
    assert torch.equal(part, logits[:, first : first + count])


def test_without_a_gradient_the_logits_stay() -> None:
    logits, targets = draw(0, 4, 9)
    before = logits.clone()
    losses, _ = grade_rows(logits, targets, Grading(2.0, 3.0, 0.1), False)
    assert torch.equal(logits, before)
    assert torch.equal(losses, rows_reference(before, targets, Grading(2.0, 3.0, 0.1), True)[0])


@pytest.mark.parametrize("wrong", [-1, -100, 9, 2**40])
def test_a_target_outside_costs_nan(wrong: int) -> None:
    logits, targets = draw(0, 4, 9)
    targets[2] = wrong
    losses, _ = rows_reference(logits, targets, Grading(), True)
    assert losses.isnan().tolist() == [False, False, True, False]


def test_logits_that_are_not_finite() -> None:
    logits, targets = torch.randn(5, 9), torch.zeros(5, dtype=torch.int64)
    logits[0, 3:] = -torch.inf
    logits[1, 4], logits[2, 4], logits[3] = torch.inf, torch.nan, -torch.inf
    wanted, gradient = plain(logits, targets, Grading())
    losses, _ = rows_reference(logits, targets, Grading(), True)
    assert losses.isnan().tolist() == wanted.isnan().tolist() == [False, True, True, True, False]
    torch.testing.assert_close(losses, wanted, equal_nan=True)
    for row in (0, 4):
        torch.testing.assert_close(logits[row], gradient[row])


def test_float64_is_judged_by_the_definition_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = draw(0, 3, 40)
    wanted = rows_reference(logits.clone(), targets, Grading(), False)[0]
    for backend in ("reference", "triton"):
        monkeypatch.setenv("LORA_KERNELS", backend)
        assert torch.equal(grade_rows(logits, targets, Grading(), False)[0], wanted)
