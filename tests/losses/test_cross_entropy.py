"""Cross-entropy against a direct computation in float64, PyTorch's own, and itself in chunks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.losses import (
    count_graded,
    linear_cross_entropy,
    masked_cross_entropy,
    shift_labels,
    token_cross_entropy,
)
from lora_kernels import head_chunks

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(2, 40))  # B, T, V


def draw(seed: int, sizes: tuple[int, int, int], graded: float = 0.5) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) in float64 and labels (B, T) with about that share graded."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, vocabulary = sizes
    logits = 3 * torch.randn(*sizes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    masked = torch.rand(batch, tokens, generator=generator) >= graded
    return logits, labels.masked_fill(masked, -100)


def direct(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """The sum and the count, token by token as the formula says, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = int(labels[b, t + 1])
            if label == -100:
                continue
            logp = logits[b, t].double() - logits[b, t].double().logsumexp(0)
            total = total - (1 - smoothing) * logp[label] - smoothing * logp.mean()
            count += 1
    return total, count


@given(SEEDS, SIZES, st.sampled_from([0.0, 0.1, 0.6]), st.sampled_from([0.0, 0.3, 1.0]))
def test_equals_the_formula_in_float64(
    seed: int, sizes: tuple[int, int, int], smoothing: float, graded: float
) -> None:
    logits, labels = draw(seed, sizes, graded)
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    total, count = direct(theirs, labels, smoothing)
    assert count_graded(labels) == count
    loss = masked_cross_entropy(mine, labels, label_smoothing=smoothing)
    assert loss.dtype is torch.float64
    # sums of at most 36 terms below 40 in float64
    torch.testing.assert_close(loss, total / max(count, 1), rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(loss, mine)
    if count:
        (truth,) = torch.autograd.grad(total / count, theirs)
        torch.testing.assert_close(dx, truth, rtol=1e-11, atol=1e-14)
    else:
        assert not dx.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=SEEDS, sizes=SIZES)
def test_accuracy_is_that_of_float32(
    dtype: torch.dtype, seed: int, sizes: tuple[int, int, int]
) -> None:
    logits, labels = draw(seed, sizes)
    logits = logits.to(dtype)
    total, count = direct(logits, labels)
    truth = total / max(count, 1)
    loss = masked_cross_entropy(logits, labels)
    assert loss.dtype is torch.float32
    theirs = (
        torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        / max(count, 1)
        if labels.shape[1] > 1
        else torch.zeros(())
    )
    bound = 2 * abs(theirs.double() - truth) + 2 * torch.finfo(torch.float32).eps * abs(truth)
    # the sum's own rounding: one float32 rounding a token, of terms up to 20
    bound = bound + torch.finfo(torch.float32).eps * 20
    assert abs(loss.double() - truth) <= bound


@given(SEEDS, SIZES, st.integers(1, 50))
def test_normalizer_is_the_divisor(seed: int, sizes: tuple[int, int, int], n: int) -> None:
    logits, labels = draw(seed, sizes)
    total, _ = direct(logits, labels)
    for normalizer in (n, float(n), torch.tensor(n)):
        loss = masked_cross_entropy(logits, labels, normalizer=normalizer)
        torch.testing.assert_close(loss, total / n, rtol=1e-12, atol=1e-12)


def test_counts_after_the_shift() -> None:
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert count_graded(labels) == 1  # the labels at position 0 are predicted by nothing
    assert shift_labels(labels).tolist() == [[6, -100, -100], [-100, -100, -100]]


def test_nothing_graded_gives_zero_with_a_zero_gradient_that_is_connected() -> None:
    labels = torch.full((2, 3), -100)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    hidden, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for normalizer in (None, 0, 7):
        loss = masked_cross_entropy(logits, labels, normalizer=normalizer)
        assert loss.item() == 0
        (dx,) = torch.autograd.grad(loss, logits)
        assert not dx.any()
        loss = linear_cross_entropy(hidden, head, labels, normalizer=normalizer)
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, (hidden, head)):
            assert not gradient.any()


def test_a_row_of_one_token_has_nothing_to_predict() -> None:
    logits = torch.randn(1, 1, 5, requires_grad=True)
    assert masked_cross_entropy(logits, torch.tensor([[2]])).item() == 0
    assert token_cross_entropy(logits, torch.tensor([[2]])).tolist() == [[0.0]]


def test_uniform_logits_cost_log_v() -> None:
    labels = torch.tensor([[1, 2, 3]])
    loss = masked_cross_entropy(torch.zeros(1, 3, 7), labels)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-7)


@given(
    SEEDS,
    SIZES,
    st.sampled_from([None, 5.0]),
    st.sampled_from([1.0, 0.25]),
    st.integers(1, 4),
    st.booleans(),
)
def test_chunks_give_the_same_number_and_gradients(
    seed: int,
    sizes: tuple[int, int, int],
    softcap: float | None,
    scale: float,
    rows: int,
    module: bool,
) -> None:
    _, labels = draw(seed, sizes)
    batch, tokens, vocabulary = sizes
    linear = torch.nn.Linear(6, vocabulary, bias=module, dtype=torch.float64)
    hidden = torch.randn(batch, tokens, 6, dtype=torch.float64, requires_grad=True)
    logits = linear(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    whole = masked_cross_entropy(logits, labels, normalizer=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_chunks, "CHUNK_BYTES", rows * (vocabulary + 2 * 6) * 8)
        patch.setattr(head_chunks, "MIN_ROWS", 1)
        head = linear if module else linear.weight
        chunked = linear_cross_entropy(
            hidden, head, labels, normalizer=9, softcap=softcap, scale=scale
        )
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)
    for mine, truth in zip(
        torch.autograd.grad(chunked, (hidden, linear.weight)),
        torch.autograd.grad(whole, (hidden, linear.weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_are_summed_in_float32(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(2, 9, 4).to(dtype), torch.randn(300, 4).to(dtype)
    labels = torch.randint(0, 300, (2, 9))
    truth = masked_cross_entropy((hidden @ head.T).double(), labels)
    loss = linear_cross_entropy(hidden, head, labels)
    assert loss.dtype is torch.float32
    # 300 terms and 16 losses below 20, each rounded to float32
    assert abs(loss - truth) <= 20 * 320 * torch.finfo(torch.float32).eps / 2


def test_chunks_never_hold_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK_BYTES", 3 * (100 + 2 * 2) * 4)
    monkeypatch.setattr(head_chunks, "MIN_ROWS", 1)
    sizes, judge = [], head_chunks.grade_rows
    monkeypatch.setattr(
        head_chunks, "grade_rows", lambda z, *more: sizes.append(z.numel()) or judge(z, *more)
    )
    hidden, labels = torch.randn(2, 50, 2, requires_grad=True), torch.randint(0, 100, (2, 50))
    linear_cross_entropy(hidden, torch.randn(100, 2), labels).backward()
    assert sum(sizes) == 98 * 100  # the last of each row predicts nothing
    assert max(sizes) <= 300


@pytest.mark.parametrize("labels", [[[0, 5, 1]], [[0, -1, 1]], [[0, -99, 1]]])
def test_labels_outside_the_vocabulary(labels: list[list[int]]) -> None:
    wrong = labels[0][1]
    message = rf"labels must be -100 or in 0 … 4 .*got {wrong}: was the data made with another"
    with pytest.raises(ValueError, match=message):
        masked_cross_entropy(torch.zeros(1, 3, 5), torch.tensor(labels))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(torch.zeros(1, 3, 2), torch.zeros(5, 2), torch.tensor(labels))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(2, 4, 3), torch.randn(5, 3)
    labels = torch.randint(0, 5, (2, 4))
    for loss in (
        lambda given: masked_cross_entropy(hidden @ head.T, given),
        lambda given: linear_cross_entropy(hidden, head, given),
    ):
        assert torch.equal(loss(labels.to(dtype)), loss(labels))


def test_rows_of_no_token() -> None:
    labels = torch.zeros(2, 0, dtype=torch.int64)
    assert masked_cross_entropy(torch.zeros(2, 0, 5), labels) == 0
    assert linear_cross_entropy(torch.zeros(2, 0, 3), torch.zeros(5, 3), labels) == 0


def test_the_compiler_takes_it_whole() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[0, 1, -100, 4], [2, 2, 3, -100]])
    # the check of the values would break the graph; "eager" tests the tracing alone
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="eager")
    loss, wanted = compiled(logits, labels), masked_cross_entropy(logits, labels)
    assert torch.equal(loss, wanted)
    grads = (torch.autograd.grad(value, logits)[0] for value in (loss, wanted))
    assert torch.equal(*grads)


def test_what_does_not_fit() -> None:
    logits, labels = torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be \(B, T\) = \(1, 3\).*got \(1, 2\)"):
        masked_cross_entropy(logits, labels[:, :2])
    with pytest.raises(ValueError, match=r"need 3 dimensions, \(B, T, …\); got 2"):
        masked_cross_entropy(logits[0], labels[0])
    with pytest.raises(TypeError, match=r"labels must be integers; got torch\.float32"):
        masked_cross_entropy(logits, labels.float())
    with pytest.raises(ValueError, match="normalizer is a count of tokens, 0 or more; got -1"):
        masked_cross_entropy(logits, labels, normalizer=-1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\); got 1"):
        masked_cross_entropy(logits, labels, label_smoothing=1)
    with pytest.raises(ValueError, match="softcap must be positive, or None for no cap; got 0"):
        linear_cross_entropy(logits, torch.zeros(7, 5), labels, softcap=0)
    with pytest.raises(TypeError, match=r"head must be a weight \(V, H\) or have out_features"):
        linear_cross_entropy(logits, torch.nn.Identity(), labels)
