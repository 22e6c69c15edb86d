"""Products of groups of rows with a matrix each: `y_i = x_i W_eᵀ`, e being the group of row i.

A layer of experts sends every token to a few of many matrices. Its rows are sorted by matrix, so
that a group is a slice, and each matrix that has rows is read once:

    grouped_linear    y (n, N) = x (n, K) of the groups times W (E, N, K)
    grouped_outer     G (E, N, K): G_e = dy_eᵀ x_e, the gradient of W
    grouped_matmul4   grouped_linear with W in 4 bits; of the matrices only those hit are expanded

Each is one opaque operator, because how long the groups are is known to the device alone. n, N and
K are not in question: a compiler and fake tensors see plain shapes, and no graph breaks.

    a CPU           the lengths are read and the groups multiplied one after the other
    a GPU           likewise: one wait for the lengths, which all products of the layer share; for
                    dense bfloat16 PyTorch's grouped product (`one_kernel`), which needs none
    graph capture   nothing may be read: without `one_kernel` every matrix multiplies every row, E
                    times the work, which a step of one token with its few rows bears

Against a dense loop with masks (transformers' `eager` experts) rows are gathered once instead of
once an expert, and the gradient of W is written once instead of being summed out of E tensors of
its whole size. Order and hence bits depend on nothing but the arguments: no atomic additions.

Ref: Gale et al. 2022 (MegaBlocks), arXiv:2211.15841, section 3.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.operands import SCHEMA, TENSORS, WIDTH, Weight4, flat

__all__ = [
    "Groups",
    "grouped_linear",
    "grouped_linear_reference",
    "grouped_matmul4",
    "groups_of",
    "one_kernel",
    "part4",
]

_GROUPS = "Tensor ends, int[]? stops"
torch.library.define(
    "lora_kernels::grouped_linear", f"(Tensor x, Tensor weight, {_GROUPS}) -> Tensor"
)
torch.library.define("lora_kernels::grouped_outer", f"(Tensor dy, Tensor x, {_GROUPS}) -> Tensor")
torch.library.define("lora_kernels::grouped_matmul4", f"(Tensor x, {SCHEMA}, {_GROUPS}) -> Tensor")
torch.library.define(
    "lora_kernels::grouped_matmul4_dx", f"(Tensor dy, {SCHEMA}, {_GROUPS}) -> Tensor"
)


class Groups(NamedTuple):
    """Where the groups of sorted rows end.

    Attributes:
        ends: int32 (E,), one past the last row of each group.
        stops: the same as numbers, or None: they are asked for only if needed.
    """

    ends: Tensor
    stops: list[int] | None = None


def groups_of(index: Tensor, count: int, weight: Tensor | None = None) -> Groups:
    """The groups of rows that are sorted by matrix.

    Args:
        index: (n,) int64, ascending: the matrix of each row, in [0, count).
        count: E.
        weight: (E, N, K), what dense rows are to be multiplied by, if it is dense.

    Returns:
        The groups. Their lengths are read from the device here, once for all products, unless a
        compiler, fake tensors or a capture forbid it, or nothing needs them.
    """
    every = torch.arange(count, device=index.device)
    ends = torch.searchsorted(index, every, right=True, out_int32=True)
    unknown = torch.compiler.is_compiling() or type(ends) is not Tensor or ends.is_meta
    if unknown or _captured(ends) or (weight is not None and one_kernel(weight)):
        return Groups(ends)
    return Groups(ends, ends.tolist())


def one_kernel(weight: Tensor) -> bool:
    """Whether PyTorch multiplies all groups in one kernel: bfloat16 on a GPU, rows of 16 bytes."""
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return all(size % 8 == 0 for size in weight.shape[1:])


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply each group of rows by its matrix: `y_i = x_i W_eᵀ`.

    Args:
        x: (n, K), floating-point, sorted by group.
        weight: (E, N, K), of x's dtype and device.
        groups: `groups_of`'s.

    Returns:
        (n, N), differentiable any number of times in x and weight.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    fits = x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[2]
    if not fits or len(groups.ends) != len(weight):
        raise ValueError(
            f"x must be (n, K) and weight (E, N, K) with E = {len(groups.ends)} groups; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"x and weight must be of one dtype on one device; got {x.dtype} on {x.device} and "
            f"{weight.dtype} on {weight.device}"
        )
    return torch.ops.lora_kernels.grouped_linear(x, weight, *groups)


def grouped_linear_reference(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """The definition, in differentiable PyTorch; arguments and result as `grouped_linear`'s."""
    parts = x.tensor_split(groups.ends[:-1].cpu().long())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


def grouped_matmul4(x: Tensor, weight: Weight4, groups: Groups) -> Tensor:
    """Multiply each group of rows by its 4-bit matrix; only matrices with rows are expanded.

    Args:
        x: (n, K), floating-point, sorted by group.
        weight: of E matrices (N, K): each of its tensors but the tables has E as its first size.
        groups: `groups_of`'s.

    Returns:
        (n, N) in the dtype of x, differentiable any number of times in x.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.in_features or len(groups.ends) != len(weight.codes):
        raise ValueError(
            f"x must be (n, {weight.in_features}) for {len(weight.codes)} matrices; got "
            f"{tuple(x.shape)} and {len(groups.ends)} groups"
        )
    return torch.ops.lora_kernels.grouped_matmul4(x, *flat(weight), *groups)


def part4(weight: Weight4, number: int) -> Weight4:
    """One of stacked 4-bit matrices; it shares their memory."""
    absmax, offset = weight.scale_absmax, weight.scale_offset
    return weight._replace(
        codes=weight.codes[number],
        scales=weight.scales[number],
        scale_absmax=None if absmax is None else absmax[number],
        scale_offset=None if offset is None else offset[number],
    )


# --- inside the operators ------------------------------------------------------------------------


def _captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _hit(ends: Tensor, stops: Sequence[int] | None) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and which."""
    start = 0
    for number, stop in enumerate(ends.tolist() if stops is None else stops):
        if stop > start:
            yield number, slice(start, stop)
        start = stop


def _owners(ends: Tensor, rows: int) -> Tensor:
    """(n, 1): the group of each row."""
    every = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, every, right=True)[:, None]


@torch.library.impl("lora_kernels::grouped_linear", "default")
def _linear(x: Tensor, weight: Tensor, ends: Tensor, stops: Sequence[int] | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if one_kernel(weight):
            return _in_one_kernel(x, weight, ends)
        out = x.new_empty(len(x), weight.shape[1])
        if stops is None and _captured(x):
            owners = _owners(ends, len(x))
            for number, matrix in enumerate(weight):
                out = torch.where(owners == number, x @ matrix.t(), out)
            return out
        for number, rows in _hit(ends, stops):
            torch.mm(x[rows], weight[number].t(), out=out[rows])
        return out


def _in_one_kernel(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """PyTorch's grouped product; it wants one side of each operand without gaps."""
    dense = weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()
    weight = weight if dense else weight.contiguous()
    return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)


@torch.library.impl("lora_kernels::grouped_outer", "default")
def _outer(dy: Tensor, x: Tensor, ends: Tensor, stops: Sequence[int] | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        out = x.new_zeros(len(ends), dy.shape[1], x.shape[1])
        if one_kernel(out):
            return F.grouped_mm(dy.contiguous().t(), x.contiguous(), offs=ends)
        if stops is None and _captured(x):
            owners = _owners(ends, len(x))
            for number in range(len(ends)):
                torch.mm(torch.where(owners == number, dy, 0).t(), x, out=out[number])
            return out
        for number, rows in _hit(ends, stops):
            torch.mm(dy[rows].t(), x[rows], out=out[number])
        return out


def _matmul4(x: Tensor, ends: Tensor, stops: Any, weight: Weight4, dx: bool) -> Tensor:
    """Both products with 4-bit matrices: group by group, by the operators of one matrix."""
    width = weight.in_features if dx else weight.out_features

    def times(part: Tensor, number: int) -> Tensor:
        own = flat(part4(weight, number))
        if dx:
            return torch.ops.lora_kernels.matmul4_dx(part, *own)
        return torch.ops.lora_kernels.matmul4(part, *own, None)

    out = x.new_empty(len(x), width)
    if stops is None and _captured(x):
        owners = _owners(ends, len(x))
        for number in range(len(ends)):
            out = torch.where(owners == number, times(x, number), out)
        return out
    for number, rows in _hit(ends, stops):
        out[rows] = times(x[rows], number)
    return out


def _unflat(args: Sequence[Any]) -> Weight4:
    codes, scales, table, absmax, offset, scale_table, arranged = args[:TENSORS]
    n, k, block = args[TENSORS:WIDTH]
    return Weight4(codes, scales, table, n, k, block, absmax, offset, scale_table, arranged)


@torch.library.impl("lora_kernels::grouped_matmul4", "default")
def _grouped4(x: Tensor, *args: Any) -> Tensor:
    return _matmul4(x, args[WIDTH], args[WIDTH + 1], _unflat(args), dx=False)


@torch.library.impl("lora_kernels::grouped_matmul4_dx", "default")
def _grouped4_dx(dy: Tensor, *args: Any) -> Tensor:
    return _matmul4(dy, args[WIDTH], args[WIDTH + 1], _unflat(args), dx=True)


# --- shapes and gradients ------------------------------------------------------------------------


def _fake_linear(x: Tensor, weight: Tensor, ends: Tensor, stops: object) -> Tensor:
    return x.new_empty(len(x), weight.shape[1])


def _fake_outer(dy: Tensor, x: Tensor, ends: Tensor, stops: object) -> Tensor:
    return x.new_empty(len(ends), dy.shape[1], x.shape[1])


def _fake4(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(len(x), args[TENSORS])


def _fake4_dx(dy: Tensor, *args: Any) -> Tensor:
    return dy.new_empty(len(dy), args[TENSORS + 1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.stops = inputs[3]


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        turned = weight.transpose(1, 2)
        dx = torch.ops.lora_kernels.grouped_linear(dy, turned, ends, ctx.stops)
    if ctx.needs_input_grad[1]:
        dweight = torch.ops.lora_kernels.grouped_outer(dy, x, ends, ctx.stops)
    return dx, dweight, None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, ends = ctx.saved_tensors
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = torch.ops.lora_kernels.grouped_linear(x, grad, ends, ctx.stops)
    if ctx.needs_input_grad[1]:
        dx = torch.ops.lora_kernels.grouped_linear(dy, grad.transpose(1, 2), ends, ctx.stops)
    return ddy, dx, None, None


def _save4(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the weight as it is stored; x is not needed."""
    weight = inputs[1 : 1 + WIDTH]
    ctx.save_for_backward(*weight[:TENSORS], inputs[1 + WIDTH])
    ctx.sizes, ctx.stops = weight[TENSORS:], inputs[2 + WIDTH]


def _turned4(name: str) -> Any:
    """Each product with 4-bit matrices is the other's gradient."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *weight, ends = ctx.saved_tensors
        out = None
        if ctx.needs_input_grad[0]:
            other = getattr(torch.ops.lora_kernels, name)
            out = other(grad, *weight, *ctx.sizes, ends, ctx.stops)
        return (out, *[None] * (WIDTH + 2))

    return backward


for _name, _fake, _setup, _backward in (
    ("grouped_linear", _fake_linear, _save, _linear_backward),
    ("grouped_outer", _fake_outer, _save, _outer_backward),
    ("grouped_matmul4", _fake4, _save4, _turned4("grouped_matmul4_dx")),
    ("grouped_matmul4_dx", _fake4_dx, _save4, _turned4("grouped_matmul4")),
):
    torch.library.register_fake(f"lora_kernels::{_name}", _fake)
    torch.library.register_autograd(f"lora_kernels::{_name}", _backward, setup_context=_setup)
