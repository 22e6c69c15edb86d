"""Cross-entropy of rows of logits in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels.cross_entropy import Grading, grade_columns, grade_rows, rows_reference
from lora_kernels.gpu import cross_entropy as gpu

# the interpreter computes in numpy, which warns where IEEE arithmetic gives NaN or infinity
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.usefixtures("_triton", "poison"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADINGS = [Grading(), Grading(30.0), Grading(5.0, 0.7, 0.1), Grading(None, 2.0, 0.6)]


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")


def draw(seed: int, n: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    logits *= 2.0 ** (torch.arange(n) % 6 - 2)[:, None]
    return logits.to(dtype), torch.randint(0, classes, (n,), generator=generator)


def compare(
    as_accurate_as: Callable[..., None], logits: Tensor, targets: Tensor, grading: Grading
) -> None:
    """The kernel against float64, as near as the definition is; columns equal to rows."""
    truth, theirs, ours = logits.double(), logits.clone(), logits.clone()
    exact = rows_reference(truth, targets, grading, True)
    base = rows_reference(theirs, targets, grading, True)
    losses, norms = grade_rows(ours, targets, grading, True)
    as_accurate_as(losses, base[0], exact[0])
    as_accurate_as(norms[:, 0], base[1][:, 0], exact[1][:, 0])
    as_accurate_as(ours, theirs, truth)
    classes, alone = logits.shape[1], logits.clone()
    assert torch.equal(grade_rows(alone, targets, grading, False)[0], losses)
    assert torch.equal(alone, logits)
    first, last = classes // 3, classes // 3 + max(1, classes // 2)
    part = logits[:, first:last].clone(memory_format=torch.contiguous_format)
    grade_columns(part, targets, norms, first, classes, grading)
    assert torch.equal(part, ours[:, first:last])


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 4),
    classes=st.integers(1, 150),
    block=st.sampled_from([16, 64, 4096]),
    dtype=st.sampled_from(DTYPES),
    grading=st.sampled_from(GRADINGS),
)
def test_any_size(
    as_accurate_as: Callable[..., None],
    seed: int,
    n: int,
    classes: int,
    block: int,
    dtype: torch.dtype,
    grading: Grading,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "BLOCK", block)
        compare(as_accurate_as, *draw(seed, n, classes, dtype), grading)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_blocks_and_a_rest(as_accurate_as: Callable[..., None], dtype: torch.dtype) -> None:
    for grading in GRADINGS:
        compare(as_accurate_as, *draw(1, 2, 2 * gpu.BLOCK + 77, dtype), grading)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_maximum_that_comes_early_or_late(
    as_accurate_as: Callable[..., None], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BLOCK", 32)
    for size in (10.0, 3e4):
        logits = torch.linspace(-size, size, 250)[None].repeat(2, 1)
        logits = logits if place == "last" else logits.flip(1)
        compare(as_accurate_as, logits, torch.tensor([0, 249]), Grading())


def test_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BLOCK", 64)
    logits, targets = torch.randn(6, 300), torch.zeros(6, dtype=torch.int64)
    logits[0, 3:] = -torch.inf
    logits[1, 299], logits[2, 40], logits[3] = torch.inf, torch.nan, -torch.inf
    logits[4, :299], targets[4] = -torch.inf, 299  # lanes that see nothing
    base = logits.clone()
    wanted, _ = rows_reference(base, targets, Grading(), True)
    losses, _ = grade_rows(logits, targets, Grading(), True)
    assert losses.isnan().tolist() == wanted.isnan().tolist() == [False, *[True] * 3, False, False]
    torch.testing.assert_close(losses, wanted, equal_nan=True)
    for row in (0, 4, 5):
        torch.testing.assert_close(logits[row], base[row])


@pytest.mark.parametrize("wrong", [-1, -100, 30, 2**40])
def test_a_target_outside_costs_nan_and_reads_nothing(wrong: int) -> None:
    logits, targets = draw(0, 3, 30, torch.float32)
    targets[1] = wrong
    losses, _ = grade_rows(logits, targets, Grading(), True)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits[1].ge(0).all()  # p, of which nothing was taken off


def test_what_is_launched_is_what_the_gate_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *_, **options: launched.append(options)

    monkeypatch.setattr(gpu, "_rows_kernel", Recorder())
    logits, targets = draw(0, 2, 30, torch.bfloat16)
    for grading in GRADINGS:
        for gradient in (False, True):
            _, norms = grade_rows(logits, targets, grading, gradient)
    grade_columns(logits, targets, norms, 0, 30, Grading())
    known = [v.constants | {"num_warps": v.warps} for v in gpu.variants()]
    evaluated = {"CAPPED": True, "GRADIENT": False}  # listed without a cap alone
    for options in launched:
        plain = {"CAPPED": False} if options.items() >= evaluated.items() else {}
        assert options | plain in known
