"""Attention within documents: the definition, and the two GPU ways with stand-ins for the kernels.

The kernels need a GPU. What surrounds them (layouts, bounds, heads, which of them runs) is tested
here with a variable-length attention that loops over the documents, and with flex attention's own
uncompiled form, which has a forward on CPUs.
"""

import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import Documents, document_mask, documents, masked_attention, packed_attention

Check = Callable[..., None]
CALLS: list[dict[str, Any]] = []


def by_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` of torch 2.13, one document after another."""
    before, after = window_size
    assert after == 0  # causal
    assert cu_seq_q.dtype == torch.int32
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query)
    CALLS.append({"max": (max_q, max_k), "heads": (query.shape[1], key.shape[1]), "before": before})
    assert enable_gqa or query.shape[1] == key.shape[1]
    out = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        assert 0 < end - start <= max_q
        parts = (x[start:end].transpose(0, 1) for x in (query, key, value))  # (H, n, D)
        index = torch.arange(int(end - start))
        back = index[:, None] - index
        near = (back >= 0) & ((back <= before) if before >= 0 else True)
        out.append(F.scaled_dot_product_attention(*parts, near, scale=scale, enable_gqa=enable_gqa))
    return torch.cat(out, 1).transpose(0, 1)


def without_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`varlen_attn` of torch 2.11: heads have to be as many."""
    return by_documents(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size
    )


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Take the GPU's ways on a CPU, with this operator for variable lengths."""

    def use(operator: Any) -> None:
        monkeypatch.setattr(packed_attention, "_fused", lambda ids: True)
        names = inspect.signature(operator).parameters
        found = packed_attention.Varlen(operator, "enable_gqa" in names, "scale" in names)
        monkeypatch.setattr(packed_attention, "varlen", lambda: found)
        CALLS.clear()

    yield use
    CALLS.clear()


def inputs(
    rows: list[list[int]],
    heads: int,
    groups: int,
    size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Document ids (B, T) of rows of documents' lengths, padded with -1, and q, k, v."""
    total = max(map(sum, rows))
    ids, document = torch.full((len(rows), total), -1), 0
    for b, row in enumerate(rows):
        start = 0
        for length in row:
            ids[b, start : start + length] = document
            start, document = start + length, document + 1
    shape = (len(rows), heads * groups, total, size)
    q = torch.randn(shape, dtype=dtype)
    k, v = (torch.randn(len(rows), heads, total, size, dtype=dtype) for _ in range(2))
    return ids, q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def document_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, window: int | None = None, **options: Any
) -> Tensor:
    """Attention under the mask that defines who sees whom."""
    return masked_attention(q, k, v, document_mask(ids, window), **options)


def written_out(ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token by itself: the softmax over the earlier tokens of its document, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            start = t
            while start and ids[b, start - 1] == ids[b, t]:
                start -= 1
            for h in range(q.shape[1]):
                keys, values = (x[b, h // groups, start : t + 1].double() for x in (k, v))
                scores = keys @ q[b, h, t].double() / q.shape[3] ** 0.5
                out[b, h, t] = scores.softmax(0) @ values
    return out


ROWS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3)


@given(ROWS, st.integers(1, 2), st.integers(1, 3))
def test_the_definition(as_accurate_as: Check, rows: Any, heads: int, groups: int) -> None:
    ids, q, k, v = inputs(rows, heads, groups)
    got = document_attention_reference(q, k, v, ids).detach()
    truth = written_out(ids, q, k, v).detach()
    # a softmax of some ten terms, and products of eight: more roundings than one
    assert (got - truth).abs().max() <= 40 * torch.finfo(torch.float32).eps * v.abs().max()
    mask = documents(ids, None, torch.float32)
    assert isinstance(mask, Tensor)
    assert torch.equal(got, masked_attention(q, k, v, mask).detach())


def test_a_document_is_a_run_of_equal_ids() -> None:
    seen = document_mask(torch.tensor([[4, 4, 9, 4]]))[0, 0]
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@example([[5, 3], [2, 6]], 1, 2, True, True, 3, 1.0)
@example([[5, 3], [2, 6]], 1, 2, False, True, 3, 1.0)
@given(
    ROWS,
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1, 2, 4, 30]),
    st.sampled_from([None, 0.1, 1.0]),
)
@pytest.mark.usefixtures("stand_in")
def test_variable_lengths(
    stand_in: Any,
    as_accurate_as: Check,
    rows: Any,
    heads: int,
    groups: int,
    old: bool,
    told: bool,
    window: int | None,
    scale: float | None,
) -> None:
    stand_in(without_groups if old else by_documents)
    ids, q, k, v = inputs(rows, heads, groups, dtype=torch.bfloat16)
    bounds = packed_attention._bounds(ids) if told else None
    given_ = documents(ids, bounds, torch.bfloat16, window)
    assert isinstance(given_, Documents)
    upstream = torch.randn(q.shape, dtype=torch.bfloat16)
    results = []
    for run in (
        lambda *x: masked_attention(*x, given_, scale=scale),
        lambda *x: document_attention_reference(*x, ids, window, scale=scale),
        lambda *x: document_attention_reference(*(y.double() for y in x), ids, window, scale=scale),
    ):
        out = run(q, k, v)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype))))
    for ours, theirs, truth in zip(*results, strict=True):
        as_accurate_as(ours, theirs, truth.double())
    (call,) = CALLS
    assert call["max"] == (ids.shape[1],) * 2
    assert call["heads"] == (heads * groups, heads * (1 + old * (groups - 1)))
    assert call["before"] == (-1 if window is None else window - 1)


def test_bounds_are_the_runs(stand_in: Any) -> None:
    ids = torch.tensor([[0, 0, 1, -1, -1], [-1, 2, 2, 2, 3]])
    # the padding that ends a row and the padding that begins the next are two runs
    assert packed_attention._bounds(ids).tolist() == [0, 2, 3, 5, 6, 9, 10]
    assert packed_attention._bounds(ids).dtype == torch.int32


@pytest.mark.parametrize(("rows", "heads", "groups"), [([[3, 2, 4], [1, 7]], 2, 1), ([[5]], 1, 3)])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks(
    stand_in: Any,
    as_accurate_as: Check,
    monkeypatch: Any,
    rows: Any,
    heads: int,
    groups: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def counted(*args: Any, **how: Any) -> Tensor:
        runs.append(how)
        return flex_attention(*args, **how)

    stand_in(by_documents)
    runs: list[dict[str, Any]] = []
    monkeypatch.setattr(packed_attention, "flex", lambda: (None, counted))
    ids, q, k, v = (x.detach() for x in inputs(rows, heads, groups))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    given_ = documents(ids, None, dtype, window, capped=softcap is not None)
    assert isinstance(given_, Documents)
    if dtype == torch.bfloat16 and softcap is None:
        assert given_.blocks is None  # variable lengths are for these
        return
    options = {"scale": 0.7, "softcap": softcap}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        ours = masked_attention(q, k, v, given_, **options)
    theirs = document_attention_reference(q, k, v, ids, window, **options)
    wide = (x.double() for x in (q, k, v))
    truth = document_attention_reference(*wide, ids, window, **options)
    as_accurate_as(ours, theirs, truth)
    assert not CALLS
    assert len(runs) == 1


def test_a_graph_takes_more_than_one_cap(stand_in: Any, monkeypatch: Any) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    stand_in(by_documents)
    monkeypatch.setattr(packed_attention, "flex", lambda: (flex_attention, None))
    ids, q, k, v = (x.detach() for x in inputs([[20, 12]], 1, 2, 16))
    given_ = documents(ids, None, torch.float32, 5, capped=True)
    torch._dynamo.reset()
    compiled = torch.compile(masked_attention, backend="eager", fullgraph=True)
    for cap in (2.0, 3.0):
        wanted = document_attention_reference(q, k, v, ids, 5, softcap=cap)
        torch.testing.assert_close(compiled(q, k, v, given_, softcap=cap), wanted)


@pytest.mark.parametrize("window", [None, 20])
def test_the_compiled_kernel(stand_in: Any, full_run: bool, window: int | None) -> None:
    if not full_run:
        pytest.skip("a minute of compiling: LORA_TEST_FULL=1")
    stand_in(by_documents)  # which is not called: PyTorch compiles flex attention for CPUs too
    ids, q, k, v = (x.detach() for x in inputs([[100, 60]], 2, 2, 32))
    given_ = documents(ids, None, torch.float32, window, capped=True)
    with torch.no_grad():
        for options in ({}, {"softcap": 2.0}, {"softcap": 3.0, "scale": 0.3}):
            wanted = document_attention_reference(q, k, v, ids, window, **options)
            torch.testing.assert_close(masked_attention(q, k, v, given_, **options), wanted)


def test_capped_scores_where_only_variable_lengths_were_prepared(stand_in: Any) -> None:
    stand_in(by_documents)
    ids, q, k, v = inputs([[3, 2, 4], [1, 7]], 1, 2, dtype=torch.bfloat16)
    given_ = documents(ids, None, torch.bfloat16, 2)
    assert isinstance(given_, Documents)
    got = masked_attention(q, k, v, given_, softcap=0.5)
    assert torch.equal(got, document_attention_reference(q, k, v, ids, 2, softcap=0.5))
    assert not CALLS


@pytest.mark.parametrize(("size", "dropout"), [(12, 0.0), (264, 0.0), (8, 0.5)])
def test_what_no_kernel_takes_has_the_dense_mask(stand_in: Any, size: int, dropout: float) -> None:
    stand_in(by_documents)
    ids, q, k, v = inputs([[3, 2]], 1, 2, size, torch.bfloat16)
    given_ = documents(ids, None, torch.bfloat16)
    torch.manual_seed(0)
    got = masked_attention(q, k, v, given_, dropout=dropout)
    torch.manual_seed(0)
    wanted = masked_attention(q, k, v, document_mask(ids), dropout=dropout)
    assert torch.equal(got, wanted)
    assert not CALLS
    assert dropout == 0.0 or not torch.equal(got, document_attention_reference(q, k, v, ids))


def test_queries_of_another_dtype_than_was_said(stand_in: Any) -> None:
    stand_in(by_documents)
    ids, q, k, v = inputs([[3, 2]], 1, 1)
    given_ = documents(ids, None, torch.bfloat16)
    assert torch.equal(
        masked_attention(q, k, v, given_), document_attention_reference(q, k, v, ids)
    )


def test_a_layer_compiles_with_documents_in_one_graph(stand_in: Any) -> None:
    operator = torch.library.custom_op(
        "lora_tests::by_documents",
        lambda q, k, v, bounds, most: by_documents(
            q, k, v, bounds, bounds, most, most, window_size=(-1, 0)
        ).contiguous(),
        mutates_args=(),
        schema="(Tensor q, Tensor k, Tensor v, Tensor bounds, int most) -> Tensor",
    )
    operator.register_fake(lambda q, k, v, bounds, most: torch.empty_like(q).contiguous())

    def traced(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        b: Tensor,
        _: Tensor,
        most: int,
        __: int,
        *,
        window_size: Any,
    ) -> Tensor:
        return operator(q, k, v, b, most)

    stand_in(traced)
    torch._dynamo.reset()
    compiled = torch.compile(masked_attention, backend="eager", fullgraph=True)
    for rows in ([[3, 2], [4]], [[1, 1, 3], [2, 2]], [[5], [2, 1, 2]]):
        ids, q, k, v = (x.detach() for x in inputs(rows, 1, 1, dtype=torch.bfloat16))
        given_ = documents(ids, None, torch.bfloat16)
        assert torch.equal(compiled(q, k, v, given_), masked_attention(q, k, v, given_))
    assert len(CALLS) == 6


def test_which_way_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert isinstance(documents(ids, None, torch.bfloat16), Tensor)  # on a CPU
    gpu = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, choice, fused in [
        ((8, 0), "auto", True),
        ((7, 5), "auto", False),
        ((9, 0), "triton", True),
        ((9, 0), "reference", False),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        monkeypatch.setenv("LORA_KERNELS", choice)
        assert packed_attention._fused(gpu) is fused  # type: ignore[arg-type]


def test_pytorch_with_and_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch.nn.attention.varlen"
    for module, wanted in [
        (types.SimpleNamespace(varlen_attn=by_documents), (by_documents, True, True)),
        (types.SimpleNamespace(varlen_attn=without_groups), (without_groups, False, False)),
        (types.SimpleNamespace(varlen_attn=lambda q, k, v, is_causal=False: q), None),
        (None, None),
    ]:
        monkeypatch.setitem(sys.modules, name, module)
        packed_attention._found.clear()
        assert packed_attention.varlen() == wanted
    packed_attention._found.clear()


def test_this_pytorchs_operator_is_found_and_called_as_it_wants() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert packed_attention.varlen() == (varlen_attn, True, True)
    q = torch.empty(2, 4, 8, 16, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 2, 8, 16, device="meta", dtype=torch.bfloat16)
    bounds = torch.empty(5, device="meta", dtype=torch.int32)
    out = packed_attention._by_length(q, k, k, bounds)
    assert out.shape == q.shape
    assert packed_attention._by_length(q, k, k, bounds, window=3, scale=0.1).shape == q.shape
    compiled = torch.compile(packed_attention._by_length, fullgraph=True, backend="aot_eager")
    compiled(q.requires_grad_(), k, k, bounds, 3, 0.1).sum().backward()
    assert q.grad.shape == q.shape


def test_what_is_refused() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"document ids must be \(B, T\); got \(3,\)"):
        documents(ids[0], None, torch.float32)
    with pytest.raises(
        ValueError, match=r"document bounds must be int32 \(N \+ 1,\); got torch.int"
    ):
        documents(ids, torch.tensor([0, 6]), torch.float32)
