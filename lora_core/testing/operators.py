r"""`check_operator`: a hand-written operator against the plain PyTorch that defines it.

Three computations of each output and of each gradient: the operator's, the reference's in the same
dtype, and the reference's in float64, which counts as the truth. The operator may err by

    max|ours - truth| <= 2 max|reference - truth| + 2 eps max|truth|

so nothing has to be guessed for each operator and dtype: PyTorch's own error is the yardstick, and
two roundings of the largest value keep a lucky yardstick from failing a good operator.

Ref: the criterion is that of Dao's flash-attention tests; the floor is ours.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lora_core.testing.runner import run_property
from lora_core.testing.strategies import Operands, operands

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Operator: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class _Run:
    """What one call and two backward passes through it gave."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    again: list[Tensor | None]


@dataclass(frozen=True)
class _Arguments:
    """A drawn tuple, with a short form for messages."""

    values: tuple[Any, ...]

    def tensors(self) -> tuple[Any, ...]:
        return self.values

    def __repr__(self) -> str:
        return f"({', '.join(_short(value) for value in self.values)})"


def check_operator(
    op: Operator,
    reference: Operator,
    *,
    inputs: "SearchStrategy[Any] | None" = None,
    device: torch.device | str = "cpu",
    examples: int = 25,
) -> None:
    """Check an operator against its definition; see the module's docstring for the bound.

    Outputs have the reference's shapes and dtypes; outputs and the gradient of every floating
    argument are as accurate as the reference's; the backward pass runs twice; strided arguments
    with an expanded cotangent, and empty ones, do as well as contiguous ones; nothing writes into
    the arguments, the outputs or the cotangents.

    Args:
        op: takes tensors, returns one or a tuple of them.
        reference: the same function in differentiable PyTorch that accepts float64.
        inputs: strategy of the arguments: `operands("m k", "k n")`, or any that draws tuples;
            integer tensors and other values are passed through. Default: as many tensors of one
            shape as `reference` has positional parameters without a default.
        device: where the tensors are moved to.
        examples: number of cases.

    Raises:
        AssertionError: a property fails; shows the smallest failing case.
    """
    drawn = operands(*["rows columns"] * _arity(reference)) if inputs is None else inputs

    def check(case: Operands | _Arguments) -> None:
        values = [v.to(device) if isinstance(v, Tensor) else v for v in case.tensors()]
        for strided in (False, True):
            truth = _evaluate(reference, [_double(v) for v in values], strided)
            theirs = _evaluate(reference, values, strided)
            ours = _evaluate(op, values, strided)
            _compare(ours, theirs, truth, " of non-contiguous arguments" if strided else "")

    run_property(check, drawn.map(_described), examples)


def _described(drawn: Any) -> Operands | _Arguments:
    return drawn if isinstance(drawn, Operands) else _Arguments(tuple(drawn))


def _short(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _arity(reference: Operator) -> int:
    """Number of positional parameters without a default."""
    parameters = inspect.signature(reference).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters)


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _prepared(value: Any, strided: bool) -> Any:
    """A fresh copy to call with; strided: every other element of a larger buffer, NaN between."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    if strided:
        filler = torch.full_like(copy, torch.nan if copy.is_floating_point() else 0)
        copy = torch.stack((copy, filler), dim=-1)[..., 0]
    return copy.requires_grad_(value.is_floating_point())


def _cotangents(outputs: list[Tensor], strided: bool) -> list[Tensor]:
    """Numbers that are the same in every dtype; strided: one element, expanded."""
    generator = torch.Generator().manual_seed(0)
    if strided:
        return [torch.full((), 0.75).to(out).expand(out.shape) for out in outputs]
    drawn = [torch.randn(out.shape, generator=generator) for out in outputs]
    # 6 binary digits are exact in float16 and in bfloat16
    return [((d * 8).round() / 8).to(out) for d, out in zip(drawn, outputs, strict=True)]


def _evaluate(fn: Operator, values: Sequence[Any], strided: bool) -> _Run:
    """Call `fn`, go backward twice, and watch that nothing is written to."""
    arguments = [_prepared(value, strided) for value in values]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    result = fn(*arguments)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    kept = [out.detach().clone() for out in outputs]
    cotangents = _cotangents(outputs, strided)
    given = [d.clone() for d in cotangents]
    graded = [i for i, out in enumerate(outputs) if out.requires_grad]

    def backward() -> list[Tensor | None]:
        if not graded or not leaves:
            return [None] * len(leaves)
        out, d = [outputs[i] for i in graded], [cotangents[i] for i in graded]
        return list(torch.autograd.grad(out, leaves, d, retain_graph=True, allow_unused=True))

    gradients, again = backward(), backward()
    _unchanged(arguments, values, "argument")
    _unchanged(outputs, kept, "output")
    _unchanged(cotangents, given, "cotangent")
    return _Run([out.detach() for out in outputs], gradients, again)


def _unchanged(now: Sequence[Any], before: Sequence[Any], what: str) -> None:
    for i, (a, b) in enumerate(zip(now, before, strict=True)):
        same = not isinstance(a, Tensor) or torch.equal(a.detach().nan_to_num(), b.nan_to_num())
        assert same, f"{what} {i} was written to"


def _compare(ours: _Run, theirs: _Run, truth: _Run, where: str) -> None:
    """Form and accuracy of every output and gradient, and of the second backward pass."""
    assert len(ours.outputs) == len(theirs.outputs), (
        f"{len(ours.outputs)} outputs, the reference has {len(theirs.outputs)}"
    )
    for i, (a, b, t) in enumerate(zip(ours.outputs, theirs.outputs, truth.outputs, strict=True)):
        assert a.dtype == b.dtype, f"output {i} is {a.dtype}, the reference's is {b.dtype}"
        _accurate(a, b, t, f"output {i}{where}")
    for name, grads in (("gradient", ours.gradients), ("second backward's gradient", ours.again)):
        for i, (g, r, d) in enumerate(zip(grads, theirs.gradients, truth.gradients, strict=True)):
            if r is None or d is None:
                continue
            assert g is not None, f"no {name} of floating argument {i}{where}"
            _accurate(g, r, d, f"{name} of floating argument {i}{where}")


def _accurate(ours: Tensor, theirs: Tensor, truth: Tensor, what: str) -> None:
    """`max|ours - truth| <= 2 max|theirs - truth| + 2 eps max|truth|`."""
    assert ours.shape == truth.shape, (
        f"{what} has shape {tuple(ours.shape)}, the reference's {tuple(truth.shape)}"
    )
    if not truth.is_floating_point():
        assert torch.equal(ours, truth), f"{what} differs from the reference's"
        return
    if truth.numel() == 0:
        return
    error, yardstick = _worst(ours, truth), _worst(theirs, truth)
    floor = 2 * torch.finfo(ours.dtype).eps * float(truth.nan_to_num(0, 0, 0).abs().max())
    assert error <= 2 * yardstick + floor, (
        f"{what} is off by {error:.3g}, PyTorch's by {yardstick:.3g}; "
        f"allowed 2 x that + {floor:.3g}"
    )


def _worst(got: Tensor, truth: Tensor) -> float:
    """Largest difference; equal infinities and NaN at the same place do not differ."""
    got = got.double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    return float(torch.where(same, 0.0, (got - truth).abs()).nan_to_num(torch.inf).max())
