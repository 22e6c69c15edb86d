"""The decoder's attention: every mask, grouped heads, scale, cap; memory, graphs and refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_kernels import (
    Documents,
    document_mask,
    documents,
    masked_attention,
    packed_attention,
    row_documents,
)
from lora_kernels.capped_attention import _backward, _forward, capped_attention_reference

Check = Callable[..., None]


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention written out in the order and dtypes in which models are published with it."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    sums = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(-1, dtype=sums).to(q.dtype) @ v


OPS = torch.ops.lora_kernels
CHUNK = "lora_kernels.capped_attention.CHUNK"


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def steps(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """y, dq, dk, dv."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = run(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def qkv(
    batch: int,
    heads: int,
    groups: int,
    tokens: int,
    keys: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads * groups, tokens, size) * 2
    k, v = (torch.randn(batch, heads, keys, size) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def judge(
    accurate: Check, inputs: tuple[Tensor, ...], given: Any, dense: Tensor | None, **options: Any
) -> list[Tensor]:
    """One step of `masked_attention` against the eager form and float64."""
    scale = options.get("scale") or 1 / math.sqrt(inputs[0].shape[-1])
    dy = torch.randn(inputs[0].shape, dtype=inputs[0].dtype)

    def written(*x: Tensor) -> Tensor:
        return eager(*x, dense, scale, options.get("softcap"))

    ours = steps(lambda *x: masked_attention(*x, given, **options), inputs, dy)
    theirs = steps(written, inputs, dy)
    truth = steps(written, tuple(t.double() for t in inputs), dy.double())
    sizes = magnitudes(*(t.double() for t in (*inputs, dy)), dense, scale, options.get("softcap"))
    for a, b, t, size in zip(ours, theirs, truth, sizes, strict=True):
        accurate(a, b, t, size)
    return ours


def magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """What y, dq, dk and dv would be if no term of their sums cancelled another."""
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1)
    weights = eager(q, k, eye, mask, scale, softcap)  # (B, H, T, S)
    k, v = (t.abs().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    each = dy.abs() @ v.mT
    slope = scale * weights * (each + (weights * each).sum(-1, keepdim=True))
    return weights @ v, slope @ k, slope.mT @ q.abs(), weights.mT @ dy.abs()


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 9),
    past=st.sampled_from([0, 0, 5]),
    size=st.sampled_from([1, 8, 20]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    masked=st.booleans(),
    scale=st.sampled_from([None, 0.05, 1.5]),
    softcap=st.sampled_from([None, 0.8, 5.0, 50.0]),
    chunk=st.sampled_from([1, 40, 1 << 22]),
    seed=st.integers(0, 2**31),
)
def test_it_is_as_accurate_as_the_eager_form(
    as_accurate_as: Check,
    batch: int,
    heads: int,
    groups: int,
    tokens: int,
    past: int,
    size: int,
    dtype: torch.dtype,
    masked: bool,
    scale: float | None,
    softcap: float | None,
    chunk: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs = qkv(batch, heads, groups, tokens, tokens + past, size, dtype)
    every = torch.arange(tokens + past)
    dense = (every <= torch.arange(past, past + tokens)[:, None])[None, None]
    if masked:  # and some keys hidden, none from itself
        hidden = torch.rand(batch, 1, 1, tokens + past) < 0.4
        dense = dense & (~hidden | (every == torch.arange(past, past + tokens)[:, None]))
    plain = not masked and (past == 0 or tokens == 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHUNK, chunk)
        options = {"scale": scale, "softcap": softcap}
        judge(as_accurate_as, inputs, None if plain else dense, dense, **options)


# --- capped scores ---


def test_scores_are_capped_before_the_mask() -> None:
    # scores of 100 and more: a cap of 1 leaves weights of e² to 1, and nothing of a hidden key
    q, k = torch.full((1, 1, 3, 4), 10.0), torch.full((1, 1, 3, 4), 10.0)
    k[:, :, 1] = -10.0
    v = torch.eye(3)[None, None]
    y = masked_attention(q, k, v, None, softcap=1.0)[0, 0]
    e = math.e**2
    wanted = torch.tensor([[1, 0, 0], [e / (e + 1), 1 / (e + 1), 0], [e, 1, e]])
    wanted[2] /= 2 * e + 1
    torch.testing.assert_close(y, wanted)


def test_a_cap_far_away_changes_nothing() -> None:
    inputs = qkv(2, 2, 2, 7, 7, 8, torch.float64)
    torch.testing.assert_close(
        masked_attention(*inputs, None, softcap=1e6), masked_attention(*inputs, None)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("poison")
def test_chunks_change_no_more_than_roundings(
    as_accurate_as: Check, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool
) -> None:
    # 5 rows of 3 chunks and a last one of 2
    inputs = qkv(2, 2, 2, 17, 17, 8, dtype)
    mask = causal(17)[None, None] if masked else None
    monkeypatch.setattr(CHUNK, 2 * 4 * 17 * 5)
    judge(as_accurate_as, inputs, mask, causal(17)[None, None], softcap=2.0)


def test_any_layout_is_read_and_the_result_lies_as_a_projection_wants_it() -> None:
    inputs = qkv(2, 2, 2, 6, 6, 8)
    dy = torch.randn(2, 4, 6, 8)
    run = lambda *x: masked_attention(*x, None, softcap=3.0)  # noqa: E731
    wanted = steps(run, inputs, dy)
    apart = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs)
    for got in (steps(run, apart, dy), steps(run, inputs, dy.mT.contiguous().mT)):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert wanted[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_a_few_chunks(
    monkeypatch: pytest.MonkeyPatch, live_bytes: Any, backward: bool
) -> None:
    q, k, v = qkv(1, 2, 2, 512, 512, 8)
    monkeypatch.setattr(CHUNK, 1 << 14)
    chunk, scores = 4 << 14, 4 * 4 * 512 * 512  # bytes of float32
    with live_bytes as memory:
        if backward:
            found = _backward(q, q, k, v, None, 0.3, 5.0)
        else:
            found = (_forward(q, k, v, None, 0.3, 5.0),)
    inside = memory.peak - sum(t.nbytes for t in found)
    assert 2 * chunk < inside < (4.5 if backward else 3.5) * chunk
    assert inside < scores / 8


def test_queries_keys_and_values_are_all_that_is_kept() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(2, 2, 2, 6, 6, 8))
    mask, kept = causal(6)[None, None], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = masked_attention(q, k, v, mask, softcap=3.0)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (q, k, v, mask)}
    before = [t.detach().clone() for t in (q, k, v)]
    runs = [torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_higher_derivatives(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    inputs = tuple(t.requires_grad_() for t in qkv(1, 2, 2, 3, 3, 4, torch.float64))
    monkeypatch.setattr(CHUNK, 24)
    function = lambda *x: masked_attention(  # noqa: E731
        *x, causal(3)[None, None] if masked else None, softcap=1.5
    )
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_opcheck() -> None:
    # as part of a compiled step: test_it_compiles_in_one_graph
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    for dtype, mask in ((torch.bfloat16, None), (torch.float32, causal(5)[None, None])):
        inputs = tuple(t.requires_grad_() for t in qkv(1, 2, 2, 5, 5, 8, dtype))
        forward = OPS.capped_attention.default
        torch.library.opcheck(forward, (*inputs, mask, 0.3, 5.0), test_utils=some)
        dy = torch.randn(1, 4, 5, 8, dtype=dtype)
        backward = OPS.capped_attention_backward.default
        torch.library.opcheck(backward, (dy, *inputs, mask, 0.3, 5.0), test_utils=some)


def test_autocast_casts_as_it_does_for_attention_without_a_cap() -> None:
    inputs = qkv(1, 2, 2, 5, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        capped, plain = (masked_attention(*inputs, None, softcap=c) for c in (5.0, None))
    assert capped.dtype == plain.dtype == torch.bfloat16
    half = tuple(t.bfloat16() for t in inputs)
    assert torch.equal(capped, masked_attention(*half, None, softcap=5.0))


def test_dropout_of_capped_weights_is_the_definitions() -> None:
    inputs, mask = qkv(1, 2, 2, 40, 40, 8), causal(40)[None, None]
    torch.manual_seed(1)
    got = masked_attention(*inputs, mask, softcap=5.0, dropout=0.5)
    torch.manual_seed(1)
    wanted = capped_attention_reference(*inputs, mask, 8**-0.5, 5.0, 0.5)
    assert torch.equal(got, wanted)
    whole = masked_attention(*inputs, mask, softcap=5.0)
    many = torch.stack(
        [masked_attention(*inputs, mask, softcap=5.0, dropout=0.5) for _ in range(300)]
    )
    assert (many.mean(0) - whole).abs().max() < 6 * many.std(0).max() / 300**0.5


# --- windows ---


def far(tokens: int, window: int | None) -> Tensor:
    """Who sees whom, one pair at a time."""
    rows = range(tokens)
    most = tokens if window is None else window
    return torch.tensor([[0 <= t - s < most for s in rows] for t in rows])


@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=2),
    window=st.one_of(st.none(), st.integers(1, 7)),
)
def test_a_window_counts_back_within_a_document(rows: list[list[int]], window: int | None) -> None:
    total = max(map(sum, rows))
    ids = torch.full((len(rows), total), -1)
    for b, row in enumerate(rows):
        ids[b, : sum(row)] = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
    seen = document_mask(ids, window)
    apart = torch.tensor([[[a == b for b in row] for a in row] for row in ids.tolist()])
    assert torch.equal(seen, (far(total, window) & apart)[:, None])
    prepared = documents(ids, None, torch.float32, window)
    assert isinstance(prepared, Tensor)
    assert torch.equal(prepared, seen)
    assert torch.equal(Documents(ids, None, None, window).dense(), seen)


def test_rows_that_are_one_document_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for window in (1, 3, 9, None):
        mask = row_documents(2, 5, torch.bfloat16, window)
        assert isinstance(mask, Tensor)
        assert torch.equal(mask, far(5, window)[None, None])
    monkeypatch.setattr(packed_attention, "_fused", lambda ids: True)
    monkeypatch.setattr(packed_attention, "_bounds", None)  # nothing is counted
    given_ = row_documents(2, 5, torch.bfloat16, 3)
    assert isinstance(given_, Documents)
    assert given_.bounds is not None
    assert given_.bounds.tolist() == [0, 5, 10]
    assert given_.bounds.dtype == torch.int32
    assert torch.equal(given_.dense(), far(5, 3).expand(2, 1, 5, 5))
    # flex attention would be compiled for each length of a prompt
    for dtype, capped in ((torch.float32, False), (torch.bfloat16, True)):
        dense = row_documents(2, 5, dtype, 3, capped)
        assert isinstance(dense, Tensor)
        assert torch.equal(dense, far(5, 3)[None, None])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_within_a_window(as_accurate_as: Check, softcap: float | None) -> None:
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3, 3, 3]])
    mask = documents(ids, None, torch.float32, 3)
    inputs = qkv(2, 2, 2, 8, 8, 8)
    judge(as_accurate_as, inputs, mask, document_mask(ids, 3), softcap=softcap)
    # what left the window is not looked at
    q, k, v = (t[:1] for t in inputs)
    clean = masked_attention(q, k, v, document_mask(ids[:1], 3), softcap=softcap)
    moved = v.clone()
    moved[:, :, 0] += 5
    after = masked_attention(q, k, moved, document_mask(ids[:1], 3), softcap=softcap)
    same = (clean == after)[0].all(-1).all(0)
    assert same.tolist() == [False, False, False, True, True, True, True, True]


# --- one new token ---


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_step_over_a_cache_of_fixed_size(as_accurate_as: Check, softcap: float | None) -> None:
    q, k, v = qkv(2, 2, 3, 1, 12, 8)
    mask = torch.zeros(2, 1, 1, 12, dtype=torch.bool)
    mask[0, ..., 2:7], mask[1, ..., 5:7] = True, True
    judge(as_accurate_as, (q, k, v), mask, mask, softcap=softcap)
    filled = [t.clone() for t in (k, v)]
    for t in filled:
        t[:, :, 7:] = 100.0  # what no token has been written to yet
    got = masked_attention(q, *filled, mask, softcap=softcap)
    torch.testing.assert_close(got, masked_attention(q, k, v, mask, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_step_reads_the_cache_in_place_and_no_value_of_it(
    live_bytes: Any, softcap: float | None
) -> None:
    q, k, v = qkv(2, 2, 4, 1, 4096, 16)
    mask = torch.ones(2, 1, 1, 4096, dtype=torch.bool)
    with live_bytes as memory:
        if softcap is None:
            masked_attention(q, k, v, mask)
        else:
            _forward(q, k, v, mask, 0.25, softcap)
    assert memory.peak < k.nbytes
    with FakeTensorMode() as fake:  # a value read on the host would be an error here
        q, k, v, mask = (fake.from_tensor(t) for t in (q, k, v, mask))
        assert masked_attention(q, k, v, mask, softcap=softcap).shape == (2, 8, 1, 16)


# --- graphs and fake tensors ---


@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_in_one_graph(masked: bool) -> None:
    torch._dynamo.reset()
    run = lambda q, k, v, mask: masked_attention(q, k, v, mask, softcap=3.0)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (5, 8, 9):
        inputs, dy = qkv(1, 2, 2, tokens, tokens, 8), torch.randn(1, 4, tokens, 8)
        mask = causal(tokens)[None, None] if masked else None
        pairs = (steps(lambda *x, f=f, mask=mask: f(*x, mask), inputs, dy) for f in (compiled, run))
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_step_of_training_on_fake_tensors(softcap: float | None) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, h, 6, 8, requires_grad=True) for h in (4, 2, 2))
        for mask in (None, torch.empty(2, 1, 6, 6, dtype=torch.bool)):
            y = masked_attention(q, k, v, mask, softcap=softcap)
            assert y.shape == q.shape
            y.sum().backward()
            assert k.grad is not None
            assert k.grad.shape == k.shape


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"softcap": 0.0}, ValueError, "softcap must be positive; got 0.0: leave it out for no"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive; got nan"),
        ({"softcap": float("inf")}, ValueError, "softcap must be positive; got inf: leave it out"),
        ({"mask": torch.zeros(1, 1, 4, 4)}, TypeError, "mask must be bool, True where a query may"),
        ({"q": torch.zeros(1, 3, 4, 8)}, ValueError, "query heads must be a multiple of key heads"),
        ({"q": torch.zeros(1, 2, 3, 8)}, ValueError, "3 queries over 4 keys need a mask: without"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type, why: str) -> None:
    usual = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 2, 4, 8), "mask": None}
    options = {**usual, "v": torch.zeros(1, 2, 4, 8), **change}
    with pytest.raises(error, match=why):
        masked_attention(**options)


@pytest.mark.parametrize("window", [0, -4])
def test_a_window_of_no_token_is_refused(window: int) -> None:
    why = f"a window must hold at least 1 token; got {window}"
    for make in (
        lambda: document_mask(torch.zeros(1, 3, dtype=torch.int64), window),
        lambda: documents(torch.zeros(1, 3, dtype=torch.int64), None, torch.float32, window),
        lambda: row_documents(1, 3, torch.float32, window),
    ):
        with pytest.raises(ValueError, match=why):
            make()
