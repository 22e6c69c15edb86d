"""The output head and its cross-entropy, some rows or some words at a time.

What `linear_cross_entropy` runs: `grade` goes through the graded rows in chunks, makes each one's
logits, judges them in place and multiplies their gradient out; `weight_gradient` goes through the
vocabulary in slices. Products are PyTorch's own on every device; what lies between two of them is
one kernel (cross_entropy.py). The formulas, and what each choice costs, are in
linear_cross_entropy.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.cross_entropy import Grading, grade_columns, grade_rows
from lora_kernels.operands import wide

__all__ = ["IGNORE", "Graded", "Head", "Wants", "grade", "weight_gradient"]

IGNORE = -100  # the target of a row that is not graded
# of logits, x and dx at a time: 245 rows of 128,256 words and 4096 features in 16 bits
CHUNK_BYTES = 1 << 26
# rows a chunk has at least: each chunk reads W, and fewer rows would wait for it. Rows of more than
# a 64th of CHUNK_BYTES (some 250,000 words in float32) so take more than CHUNK_BYTES
MIN_ROWS = 64
BLOCK_ROWS = 2048  # of x that meet a slice of the vocabulary at a time, for dW
CAST_BYTES = 1 << 25  # of W in another dtype than its own, at a time


class Head(NamedTuple):
    """A head whose logits are x Wᵀ + b + s (x Aᵀ) Bᵀ, in the order of the schema."""

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None
    """(V,)"""
    down: Tensor | None
    """A, (r, H)"""
    up: Tensor | None
    """B, (V, r)"""
    scaling: Tensor | None
    """s, (1,)"""


class Wants(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool
    update: bool


class Graded(NamedTuple):
    """What one pass over the graded rows gives; without elements where not wanted."""

    losses: Tensor
    """(M,), 0 where not graded"""
    norms: Tensor
    """(M, 2): m and S of each row, if the weight's gradient is wanted"""
    dhidden: Tensor
    dbias: Tensor
    ddown: Tensor
    dup: Tensor


class _Parts:
    """The head in the product's dtype: what is small cast once, a large weight a slice at a time.

    Args:
        head: as the operator got it.
        dtype: of the product.
    """

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        self.weight, self.dtype = head.weight, dtype
        self.classes, self.features = head.weight.shape
        if head.weight.numel() * dtype.itemsize <= CAST_BYTES:
            self.weight = head.weight.to(dtype)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.down = self.up = None
        if head.down is not None and head.up is not None and head.scaling is not None:
            self.down = head.down.to(dtype)  # (r, H)
            self.up = (head.up * head.scaling).to(dtype)  # (V, r), s on it

    def slices(self, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        """Words and their rows of W in the product's dtype; in one piece if nothing is cast."""
        cast = self.weight.dtype != self.dtype
        rows = CAST_BYTES // (self.features * self.dtype.itemsize) if cast else last - first
        for start in range(first, last, max(1, rows)):
            stop = min(start + max(1, rows), last)
            yield start, stop, self.weight[start:stop].to(self.dtype)

    def logits(self, x: Tensor, first: int, last: int, out: Tensor) -> Tensor | None:
        """Write the logits of some words for x (n, H) into out; h = x Aᵀ (n, r) if there is one."""
        for start, stop, w in self.slices(first, last):
            z = out[:, start - first : stop - first]
            if self.bias is None:
                torch.mm(x, w.t(), out=z)
            else:
                torch.addmm(self.bias[start:stop], x, w.t(), out=z)
        if self.down is None or self.up is None:
            return None
        h = x @ self.down.t()
        out.addmm_(h, self.up[first:last].t())
        return h

    def back(self, dz: Tensor) -> Tensor:
        """dz W, (n, H) of dz (n, V)."""
        total: Tensor | None = None
        for start, stop, w in self.slices(0, self.classes):
            part = dz[:, start:stop] @ w
            if stop - start == self.classes:
                return part
            total = part.to(wide(part.dtype)) if total is None else total.add_(part)
        assert total is not None  # V is at least 1
        return total


class _Sums:
    """The gradients of all rows, of which those of a chunk are added at a time.

    Args:
        hidden: (M, H).
        head: as the operator got it.
        dtype: of the sums.
        wants: which of them are asked for.
    """

    def __init__(self, hidden: Tensor, head: Head, dtype: torch.dtype, wants: Wants) -> None:
        self.wants, self.head = wants, head
        # without gaps, whatever the layout of hidden: so a compiler has been told
        self.hidden = hidden.new_zeros(hidden.shape if wants.hidden else 0)

        def zeros(t: Tensor | None, wanted: bool) -> Tensor:
            shape = t.shape if t is not None and wanted else 0
            return hidden.new_zeros(shape, dtype=dtype)

        self.bias = zeros(head.bias, wants.bias)
        self.down, self.up = zeros(head.down, wants.update), zeros(head.up, wants.update)

    def add(self, parts: _Parts, index: Tensor, x: Tensor, dz: Tensor, h: Tensor | None) -> None:
        """Take in a chunk: dz (n, V) and h (n, r) of the rows x (n, H) at `index`."""
        dh = None if parts.up is None else dz @ parts.up  # (n, r), s in it
        if self.wants.hidden:
            dx = parts.back(dz)
            if dh is not None and parts.down is not None:
                dx.add_(dh @ parts.down)
            self.hidden.index_copy_(0, index, dx.to(self.hidden.dtype))
        if self.wants.bias:
            for rows in torch.split(dz, MIN_ROWS):  # of which a float32 copy is made
                self.bias += rows.sum(0, dtype=self.bias.dtype)
        if self.wants.update and dh is not None and h is not None:
            self.down += dh.t() @ x
            self.up += dz.t() @ h

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients in their tensors' dtypes."""
        head, found = self.head, [self.hidden]
        if self.wants.update and head.scaling is not None:
            self.up *= head.scaling
        for total, t in ((self.bias, head.bias), (self.down, head.down), (self.up, head.up)):
            found.append(total if t is None else total.to(t.dtype))
        return found[0], found[1], found[2], found[3]


def grade(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    dtype: torch.dtype,
    grading: Grading,
    wants: Wants,
) -> Graded:
    """Judge the graded rows, and find the gradients of the sum of their losses but W's.

    Args:
        hidden: (M, H).
        targets: int64 (M,), -100 where not graded.
        head: what makes the logits.
        dtype: of the products.
        grading: cap, scale and smoothing.
        wants: which gradients; if none, the logits are judged and nothing else.

    Returns:
        Losses, and the gradients that are wanted.
    """
    m, classes = len(hidden), len(head.weight)
    losses = hidden.new_zeros(m, dtype=wide(dtype))
    norms = hidden.new_zeros((m, 2) if wants.weight else (0, 2), dtype=wide(dtype))
    sums = _Sums(hidden, head, wide(dtype), wants)
    parts = _Parts(head, dtype)
    wants_now = wants.hidden or wants.bias or wants.update
    graded = (targets != IGNORE).nonzero().view(-1)
    each = (classes + 2 * hidden.shape[1]) * dtype.itemsize  # of logits, x and dx
    rows = _even(len(graded), CHUNK_BYTES // each)
    chunk = hidden.new_empty((rows, classes), dtype=dtype)  # the only logits there are
    for index in torch.split(graded, rows) if rows else ():
        x, z = hidden.index_select(0, index).to(dtype), chunk[: len(index)]
        h = parts.logits(x, 0, classes, z)
        loss, norm = grade_rows(z, targets[index], grading, wants_now)
        losses.index_copy_(0, index, loss)
        if wants.weight:
            norms.index_copy_(0, index, norm)
        if wants_now:
            sums.add(parts, index, x, z, h)
    return Graded(losses, norms, *sums.finish())


def _even(rows: int, most: int) -> int:
    """Rows a chunk, the chunks being of one size as nearly as can be."""
    chunks = -(-rows // max(most, MIN_ROWS))
    return -(-rows // max(chunks, 1))


def weight_gradient(
    factor: Tensor,
    norms: Tensor,
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    dtype: torch.dtype,
    grading: Grading,
) -> Tensor:
    """W's gradient of `factor` times the sum of the losses, a slice of the vocabulary at a time.

    Args:
        factor: (), the gradient of the sum.
        norms: (M, 2), from `grade`.
        hidden: (M, H).
        targets: int64 (M,).
        head: what made the logits.
        dtype: of the products.
        grading: cap, scale and smoothing.

    Returns:
        (V, H) in W's dtype: each element summed in float32 over blocks of rows, and rounded once.
    """
    classes, features = head.weight.shape
    parts, dweight = _Parts(head, dtype), torch.empty_like(head.weight)
    blocks = torch.split((targets != IGNORE).nonzero().view(-1), BLOCK_ROWS)
    # a word's row of the sum, of a block's product and of its float32 copy, which the addition
    # makes on a CPU; and its column of logits
    each = features * (2 * wide(dtype).itemsize + dtype.itemsize) + BLOCK_ROWS * dtype.itemsize
    words = min(classes, max(1, CHUNK_BYTES // each))
    # one piece of memory for all slices, as freed pieces of this size leave gaps
    sums = hidden.new_empty(words * features, dtype=wide(dtype))
    products = hidden.new_empty(words * features, dtype=dtype)
    logits = hidden.new_empty(words * max(map(len, blocks)), dtype=dtype)
    for first in range(0, classes, words):
        last = min(first + words, classes)
        total = _matrix(sums, last - first, features).zero_()
        for index in blocks:
            x, t = hidden.index_select(0, index).to(dtype), targets[index]
            z = _matrix(logits, len(x), last - first)
            parts.logits(x, first, last, z)
            grade_columns(z, t, norms[index], first, classes, grading)
            total += torch.mm(z.t(), x, out=_matrix(products, last - first, features))
        dweight[first:last] = total.mul_(factor)
    return dweight


def _matrix(room: Tensor, rows: int, columns: int) -> Tensor:
    """The first elements of a flat tensor as a matrix."""
    return room[: rows * columns].view(rows, columns)
