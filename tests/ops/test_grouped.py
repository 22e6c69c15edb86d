"""Products of groups of rows with a matrix each: values, gradients, compiler, captured graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lora_core.quant import NF4Stack, quantize_4bit
from lora_kernels import grouped, grouped_linear, grouped_matmul4, groups_of
from lora_kernels.grouped import Groups, grouped_linear_reference, part4
from lora_kernels.operands import flat

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def make(lengths: Sequence[int], n: int = 7, k: int = 5) -> tuple[Tensor, Tensor, Groups]:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    x = torch.randn(len(index), k)
    return x, torch.randn(len(lengths), n, k), groups_of(index, len(lengths))


def step(
    multiply: Callable[..., Tensor], x: Tensor, w: Tensor, groups: Groups, dy: Tensor
) -> list[Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = multiply(x, w, groups)
    return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]


@given(lengths=LENGTHS, n=st.integers(1, 9), k=st.integers(1, 9), half=st.booleans())
def test_as_accurate_as_pytorch(
    as_accurate_as: Callable[..., None], lengths: list[int], n: int, k: int, half: bool
) -> None:
    x, w, groups = make(lengths, n, k)
    dtype = torch.bfloat16 if half else torch.float32
    x, w, dy = x.to(dtype), w.to(dtype), torch.randn(len(x), n).to(dtype)
    ours = step(grouped_linear, x, w, groups, dy)
    theirs = step(grouped_linear_reference, x, w, groups, dy)
    truth = step(grouped_linear_reference, x.double(), w.double(), groups, dy.double())
    for values in zip(ours, theirs, truth, strict=True):
        as_accurate_as(*values)


def test_every_element_is_written(poison: None) -> None:
    x, w, groups = make([2, 0, 3])
    for values in step(grouped_linear, x, w, groups, torch.ones(5, 7)):
        assert values.isfinite().all()


def test_groups_are_read_once_and_only_where_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.tensor([0, 0, 2])
    assert groups_of(index, 4).stops == [2, 2, 3, 3]
    with FakeTensorMode():
        assert groups_of(torch.empty(3, dtype=torch.int64), 4).stops is None
    monkeypatch.setattr(grouped, "_captured", lambda _: True)
    assert groups_of(index, 4).stops is None


def test_derivatives_of_any_order() -> None:
    x, w, groups = make([2, 0, 3], 4, 3)
    inputs = (x.double().requires_grad_(), w.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, groups), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_linear(x, w, groups), inputs)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")  # compiled below


def test_operators_meet_torch_s_own_checks() -> None:
    x, w, groups = make([2, 0, 3])
    dy = torch.randn(5, 7, requires_grad=True)
    x.requires_grad_()
    w.requires_grad_()
    stack = NF4Stack([quantize_4bit(torch.randn(8, 64)) for _ in range(3)])
    x4, dy4 = torch.randn(5, 64, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    ops: Any = torch.ops.lora_kernels
    for operator, arguments in (
        (ops.grouped_linear, (x, w)),
        (ops.grouped_outer, (dy, x)),
        (ops.grouped_matmul4, (x4, *flat(stack.weight4))),
        (ops.grouped_matmul4_dx, (dy4, *flat(stack.weight4))),
    ):
        torch.library.opcheck(operator.default, (*arguments, *groups), test_utils=CHECKS)


@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("k", [64, 48])  # rows of whole blocks, and not
def test_4_bit_matrices_one_by_one_bit_for_bit(k: int, dq: bool, backend: str) -> None:
    """The operator of one matrix is the definition, in every backend."""
    weights = [quantize_4bit(torch.randn(8, k), double_quant=dq) for _ in range(4)]
    stack = NF4Stack(weights)
    x, _, groups = make([3, 0, 1, 2], 8, k)
    x.requires_grad_()
    y = grouped_matmul4(x, stack.weight4, groups)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    start = 0
    for number, stop in enumerate(groups.stops or []):
        layer, part = stack.layer(number), x.detach()[start:stop].requires_grad_()
        if stop > start:
            own = layer(part)
            (own_dx,) = torch.autograd.grad(own, part, torch.ones_like(own))
            assert torch.equal(y[start:stop], own)
            assert torch.equal(dx[start:stop], own_dx)
        start = stop
    assert torch.equal(part4(stack.weight4, 2).codes.view(-1), weights[2].packed)


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_way_that_reads_no_length_gives_the_same(
    four_bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a captured graph does, on a CPU."""
    x, w, groups = make([3, 0, 2], 8, 64)
    stack = NF4Stack([quantize_4bit(m) for m in w]).weight4
    dy = torch.randn(5, 8)

    def run(known: Groups) -> list[Tensor]:
        if not four_bit:
            return step(grouped_linear, x, w, known, dy)
        own = x.clone().requires_grad_()
        y = grouped_matmul4(own, stack, known)
        return [y.detach(), *torch.autograd.grad(y, own, dy)]

    plain = run(groups)
    monkeypatch.setattr(grouped, "_captured", lambda _: True)
    for ours, theirs in zip(run(Groups(groups.ends)), plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_pytorch_s_one_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is taken for bfloat16; here its CPU form shows that it is called rightly."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped product")
    x, w, groups = make([3, 0, 2], 16, 8)
    x, w, dy = x.bfloat16(), w.bfloat16(), torch.randn(5, 16).bfloat16()
    plain = step(grouped_linear, x, w, groups, dy)
    monkeypatch.setattr(grouped, "one_kernel", lambda _: True)
    for ours, theirs in zip(step(grouped_linear, x, w, groups, dy), plain, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


def test_compiled_without_a_break_for_any_groups() -> None:
    def forward(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
        return grouped_linear(x, w, groups_of(index, len(w))).sin()

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for lengths in ([2, 0, 3], [0, 5, 0]):
        x, w, _ = make(lengths)
        index = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        assert torch.equal(compiled(x, w, index), forward(x, w, index))


def test_messages() -> None:
    x, w, groups = make([2, 0, 3])
    with pytest.raises(ValueError, match=r"x must be \(n, K\) and weight \(E, N, K\) with E = 3"):
        grouped_linear(x[:, 1:], w, groups)
    with pytest.raises(ValueError, match=r"of one dtype on one device; got torch\.float64 on cpu"):
        grouped_linear(x.double(), w, groups)
    stack = NF4Stack([quantize_4bit(torch.randn(8, 64)) for _ in range(2)])
    with pytest.raises(ValueError, match=r"x must be \(n, 64\) for 2 matrices; got \(5, 5\) and 3"):
        grouped_matmul4(x, stack.weight4, groups)
