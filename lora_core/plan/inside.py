"""What operators hold inside themselves, which a run on fake tensors does not show.

A product with a 4-bit weight expands it a panel (CPU) or a slice (GPU) at a time; the loss holds a
chunk of logits, capped attention one of scores; a low-rank update is written out in PyTorch on a
CPU. The rules follow those operators' code and use their constants; a test compares each with what
its operator allocates.

PyTorch's own operators are taken to need nothing beside their results: what its matrix libraries
hold is theirs, not the allocator's, but for cuBLAS's workspace.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels import capped_attention, expansions, head_chunks, operands
from lora_kernels.cpu.matmul4 import FEW_ROWS, PANEL_BYTES, PANEL_COLUMNS
from lora_kernels.dispatch import backend_for
from lora_kernels.matmul4 import BACKENDS
from lora_kernels.operands import TENSORS, WIDTH

__all__ = ["CUBLAS_WORKSPACE", "GPU_SLICE", "Inside"]

GPU_SLICE = 1 << 25
"""SLICE_BYTES of lora_kernels.gpu.routes4, which cannot be imported without Triton."""
CUBLAS_WORKSPACE = 1 << 25
"""What PyTorch allocates for cuBLAS from the H100 on, before that 8 MiB; not measured here."""


@dataclass
class Inside:
    """Bytes inside an operator, by its name; and the dense weights that lie between two of them."""

    compute: torch.dtype
    """dtype of the matrix products"""
    device: str = "cpu"
    """"cpu" or "cuda": where the run would be"""
    recomputing: bool = False
    """whether a product is that of a recomputation, whose expanded weight is kept"""
    shelf: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """bytes of dense weights kept for backward, by weight (lora_kernels.expansions)"""

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Bytes that an operator holds beside its arguments and results, and the shelf's."""
        rule = _RULES.get(name)
        own = 0 if rule is None else rule(self, args)
        if name in _EXPANDING and self.recomputing:
            self._put(args[_EXPANDING[name] :])
        taken = self._take(args[_TAKING[name] :]) if name in _TAKING else 0
        return max(own, taken) + sum(self.shelf.values())

    def begin_layer(self, recomputing: bool) -> None:
        """Empty the shelf: another layer's backward pass begins."""
        self.shelf.clear()
        self.recomputing = recomputing

    def _put(self, weight: tuple[Any, ...]) -> None:
        n, k, _ = _weight(weight)
        size = n * k * self.compute.itemsize
        if self.backend == "native" or size > expansions.LIMIT:  # C never holds a weight whole
            return
        while sum(self.shelf.values()) + size > expansions.LIMIT:
            self.shelf.popitem(last=False)
        self.shelf[id(weight[0])] = size

    def _take(self, weight: tuple[Any, ...]) -> int:
        return self.shelf.pop(id(weight[0]), 0)

    @property
    def backend(self) -> str:
        """Which implementation of the operators would run."""
        return "triton" if self.device == "cuda" else backend_for(torch.empty(0), BACKENDS)

    def expanded(self, rows: int, weight: tuple[int, int, int], dtype: torch.dtype) -> int:
        """The expanded part of a weight (N, K, block) in `x Wᵀ`, x having so many rows."""
        n, k, _ = weight
        if self.backend == "native" and rows <= FEW_ROWS.get(dtype, -1):
            return 0
        return self._part(n, k * dtype.itemsize, 1)

    def expanded_dx(self, weight: tuple[int, int, int], dtype: torch.dtype) -> int:
        """The same in `dy W`, which is cut along columns."""
        n, k, block = weight
        return self._part(k, n * dtype.itemsize, block)

    def _part(self, length: int, across: int, unit: int) -> int:
        """`length` lines of `across` bytes, or as many as a panel or a slice holds."""
        if self.backend == "reference":
            return length * across
        most = GPU_SLICE if self.backend == "triton" else PANEL_BYTES
        least = PANEL_COLUMNS if self.backend == "native" and unit > 1 else 1
        lines = max(max(most // max(across, 1), least) // unit, 1) * unit
        return min(lines, length) * across


def _weight(args: tuple[Any, ...]) -> tuple[int, int, int]:
    """N, K and the block of the weight, whose tensors begin at the start of `args`."""
    n, k, block = args[TENSORS:WIDTH]
    return n, k, block


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _matmul4(inside: Inside, args: tuple[Any, ...]) -> int:
    x: Tensor = args[0]
    return inside.expanded(_rows(x), _weight(args[1:]), x.dtype)


def _matmul4_dx(inside: Inside, args: tuple[Any, ...]) -> int:
    return inside.expanded_dx(_weight(args[1:]), args[0].dtype)


def _grouped_matmul4(inside: Inside, args: tuple[Any, ...]) -> int:
    """One matrix expanded, and its rows' product, which is copied to its place; rows split evenly.

    How many rows an expert gets is not known without values; the sum over the experts is.
    """
    (x, codes), (n, _, _) = args[:2], _weight(args[1:])
    rows = -(-_rows(x) // len(codes))
    return inside.expanded(rows, _weight(args[1:]), x.dtype) + rows * n * x.dtype.itemsize


def _grouped_matmul4_dx(inside: Inside, args: tuple[Any, ...]) -> int:
    """The same of the gradient."""
    (dy, codes), (_, k, _) = args[:2], _weight(args[1:])
    rows = -(-_rows(dy) // len(codes))
    return inside.expanded_dx(_weight(args[1:]), dy.dtype) + rows * k * dy.dtype.itemsize


def _lora_linear4(inside: Inside, args: tuple[Any, ...]) -> int:
    """A panel; later, on a CPU, the base's product, the update and its negative."""
    x, weight = args[0], _weight(args[1:])
    expanded = inside.expanded(_rows(x), weight, x.dtype)
    if inside.backend == "triton":
        return expanded
    return max(expanded, 3 * _rows(x) * weight[0] * x.dtype.itemsize)


def _lora_linear4_backward(inside: Inside, args: tuple[Any, ...]) -> int:
    """A panel and, on a CPU, the base's dx beside the update's; nothing if dx is not wanted."""
    (dy, x), weight, wants_dx = args[:2], _weight(args[2:]), args[-2]
    if not wants_dx:
        return 0
    expanded = inside.expanded_dx(weight, dy.dtype)
    return expanded + (0 if inside.backend == "triton" else x.nbytes)


def _lora_update(inside: Inside, args: tuple[Any, ...]) -> int:
    """On a CPU the update, its cast to y's dtype if that is another, and its negative."""
    y, x = args[:2]
    if inside.backend == "triton" or y is None:
        return 0
    cast = 0 if y.dtype == x.dtype else y.numel() * x.dtype.itemsize
    return 2 * y.nbytes + cast


def _cross_entropy(inside: Inside, args: tuple[Any, ...]) -> int:
    """A chunk of logits, its rows of x and of dx, the places of the graded rows, W's cast."""
    hidden, weight, dtype = args[0], args[2], args[7]
    m, (classes, features) = len(hidden), weight.shape
    each = (classes + 2 * features) * dtype.itemsize
    most = max(head_chunks.CHUNK_BYTES // each, head_chunks.MIN_ROWS)
    rows = -(-m // max(-(-m // most), 1))
    narrow, wide = dtype.itemsize, max(dtype.itemsize, 4)
    cast = _cast(weight, dtype)
    sums = wide if cast and weight.numel() * narrow > head_chunks.CAST_BYTES else 0
    return rows * (classes * narrow + features * (2 * narrow + sums)) + 8 * m + cast


def _cross_entropy_dweight(inside: Inside, args: tuple[Any, ...]) -> int:
    """A slice of the sum, a block's product and logits, and the block's rows of x."""
    hidden, weight, dtype = args[2], args[4], args[9]
    narrow, wide = dtype.itemsize, max(dtype.itemsize, 4)
    classes, features = weight.shape
    block = min(head_chunks.BLOCK_ROWS, len(hidden))
    each = features * (2 * wide + narrow) + head_chunks.BLOCK_ROWS * narrow
    words = min(max(1, head_chunks.CHUNK_BYTES // each), classes)
    slice_ = words * (features * (wide + narrow) + block * narrow)
    if inside.device == "cpu" and wide != narrow:
        slice_ += words * features * wide  # of the product, to be added: see `_mixed`
    return slice_ + block * features * narrow + 8 * len(hidden) + _cast(weight, dtype)


def _capped_attention(inside: Inside, args: tuple[Any, ...]) -> int:
    """A chunk's tanh, its capped scores, and their softmax."""
    return 3 * _scores(*args[:2])


def _capped_attention_backward(inside: Inside, args: tuple[Any, ...]) -> int:
    """A chunk's tanh, softmax, slope and a product of them; the sums, if they are to be cast."""
    q, k, v = args[1:4]
    dtype = operands.wide(q.dtype)
    sums = 0 if dtype == q.dtype else (k.numel() + v.numel()) * dtype.itemsize
    return 4 * _scores(q, k) + sums


def _scores(q: Tensor, k: Tensor) -> int:
    """Bytes of a chunk of scores in float32."""
    row = q.shape[0] * q.shape[1] * k.shape[2]
    rows = min(max(1, capped_attention.CHUNK // max(1, row)), q.shape[2])
    return rows * row * operands.wide(q.dtype).itemsize


def _mixed(inside: Inside, args: tuple[Any, ...]) -> int:
    """Casts to the wider dtype, which PyTorch makes on a CPU before it adds or multiplies."""
    tensors = [t for t in args[:2] if isinstance(t, Tensor) and t.dim()]
    if inside.device != "cpu" or len(tensors) < 2 or tensors[0].dtype == tensors[1].dtype:
        return 0
    wide = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return sum(t.numel() * wide.itemsize for t in tensors if t.dtype != wide)


def _cast(weight: Tensor, dtype: torch.dtype) -> int:
    """The head's weight in the product's dtype, whole or as much as is cast at a time."""
    if weight.dtype == dtype:
        return 0
    return min(weight.numel() * dtype.itemsize, head_chunks.CAST_BYTES)


# operators that expand a weight, and those that take it from the shelf: where its tensors begin
_EXPANDING = {"lora_kernels::matmul4": 1, "lora_kernels::lora_linear4": 1}
_TAKING = {"lora_kernels::matmul4_dx": 1, "lora_kernels::lora_linear4_backward": 2}
_RULES: dict[str, Callable[[Inside, tuple[Any, ...]], int]] = {
    "lora_kernels::matmul4": _matmul4,
    "lora_kernels::matmul4_dx": _matmul4_dx,
    "lora_kernels::grouped_matmul4": _grouped_matmul4,
    "lora_kernels::grouped_matmul4_dx": _grouped_matmul4_dx,
    "lora_kernels::lora_linear4": _lora_linear4,
    "lora_kernels::lora_linear4_backward": _lora_linear4_backward,
    "lora_kernels::lora_update": _lora_update,
    "lora_kernels::capped_attention": _capped_attention,
    "lora_kernels::capped_attention_backward": _capped_attention_backward,
    "lora_kernels::linear_cross_entropy": _cross_entropy,
    "lora_kernels::linear_cross_entropy_dweight": _cross_entropy_dweight,
    **{f"aten::{name}": _mixed for name in ("add", "add_", "sub", "mul", "mul_")},
}
