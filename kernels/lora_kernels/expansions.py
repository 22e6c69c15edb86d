"""Expansions of 4-bit weights that a recomputation and the backward pass after it share.

Without activation checkpointing a step expands a weight twice: for `x Wᵀ` and for `dy W`. With it a
layer runs again just before its own backward pass, and the count is three. The second and the third
expansion are of the same weight and milliseconds apart. So what a recomputation expands is kept
until the gradient of that product asks for it:

    forward          expand                 drop
    recomputation    expand      put on the shelf
    backward                     taken from the shelf, then dropped

What it costs: the dense weights of one layer, 2 bytes a weight in 16 bits, at the very moment when
memory is fullest. An 8B model has 218 M weights a layer, 436 MB; so a shelf holds LIMIT bytes at
most, and what was put there first makes room. Backward goes the other way round than the
recomputation, so the newest are wanted first: in that model the shelf holds `down_proj`'s 117 MB,
and its expansion is the one that is saved.

A shelf belongs to the checkpoint of one layer and dies with it, when autograd frees the layer's
graph: after its backward pass, or with an exception on the way. The next layer's recomputation
clears it too. Products whose gradient for x is not wanted, as in the first layer, leave theirs to
that. An entry holds the codes as well, so that their address is no other weight's as long as it is
looked up.

Who uses it: products that expand a weight whole, which are the reference and a GPU's products of
many rows (gpu/routes4.py). A CPU's C operators expand a weight in panels that stay in the cache
(cpu/matmul4.py) and never hold it whole. There keeping does not pay: of a product of 2048 rows with
a weight of 58.7 M, 280 ms, expanding is 10 ms; a dense copy of float32 would be written to memory
and read again, 2 x 235 MB, which takes as long.
"""

import threading
import weakref
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from lora_kernels.expand4 import dequantize4, expand4
from lora_kernels.operands import Weight4

__all__ = ["LIMIT", "Shelf", "checkpoint_contexts", "expanded", "room", "taken"]

LIMIT = 1 << 27  # bytes of dense weights that one layer's shelf holds

_Key = tuple[int, int, int, torch.dtype]


class _Here(threading.local):
    """Of this thread: a layer's recomputation and its backward pass run in the same one."""

    shelf: "weakref.ref[Shelf] | None" = None  # of the layer that was recomputed last
    filling: bool = False  # whether its recomputation is under way


_HERE = _Here()


class Shelf:
    """The context of one layer's recomputation; holds what it expanded until that is taken.

    Args:
        limit: bytes at most; None: LIMIT.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = LIMIT if limit is None else limit
        self.held: OrderedDict[_Key, tuple[Tensor, Tensor]] = OrderedDict()

    def __enter__(self) -> Self:
        last = None if _HERE.shelf is None else _HERE.shelf()
        if last is not None:
            last.held.clear()
        self.outer = _HERE.filling
        _HERE.shelf, _HERE.filling = weakref.ref(self), True
        return self

    def __exit__(self, *_: object) -> None:
        _HERE.filling = self.outer

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weights held."""
        return sum(dense.nbytes for _, dense in self.held.values())

    def put(self, weight: Weight4, dense: Tensor) -> None:
        """Keep a dense weight, in the place of the oldest ones if need be.

        Args:
            weight: codes and scales of W (N, K).
            dense: W (N, K), no larger than the limit.
        """
        self.held.pop(_key(weight, dense.dtype), None)
        while self.nbytes + dense.nbytes > self.limit:
            self.held.popitem(last=False)
        self.held[_key(weight, dense.dtype)] = (weight.codes, dense)


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What `torch.utils.checkpoint.checkpoint` takes as `context_fn`.

    Returns:
        The context of the forward pass, which keeps nothing, and of the recomputation, which does.
    """
    return nullcontext(), Shelf()


def room(weight: Weight4, dtype: torch.dtype) -> Tensor | None:
    """A tensor to expand a weight into, if a recomputation is under way that keeps it.

    Args:
        weight: codes and scales of W (N, K).
        dtype: of the expansion.

    Returns:
        (N, K) for the caller to fill at once, or None: nobody will ask for it.
    """
    shelf = _HERE.shelf() if _HERE.filling and _HERE.shelf is not None else None
    n, k = weight.out_features, weight.in_features
    if shelf is None or n * k * dtype.itemsize > shelf.limit:
        return None
    dense = torch.empty(n, k, dtype=dtype, device=weight.codes.device)
    shelf.put(weight, dense)
    return dense


def expanded(weight: Weight4, dtype: torch.dtype) -> Tensor:
    """`expand4`, the result kept for the gradient of this product if that will come soon.

    Args:
        weight: codes and scales of W (N, K).
        dtype: of the result.

    Returns:
        (N, K), not to be written to.
    """
    dense = room(weight, dtype)
    if dense is None:
        return expand4(weight, dtype)
    w, size = weight, weight.out_features * weight.in_features
    tensors = (w.codes, w.scales, w.table, w.block_size, size, dtype)
    dequantize4(*tensors, nested=w.nested, out=dense)
    return dense


def taken(weight: Weight4, dtype: torch.dtype) -> Tensor | None:
    """What the recomputation of this layer left of a weight; it is given out once.

    Args:
        weight: codes and scales of W (N, K).
        dtype: of the expansion.

    Returns:
        (N, K), not to be written to, or None: expand it.
    """
    shelf = None if _HERE.shelf is None else _HERE.shelf()
    found = None if shelf is None else shelf.held.pop(_key(weight, dtype), None)
    return None if found is None else found[1]


def _key(weight: Weight4, dtype: torch.dtype) -> _Key:
    """A weight by where its codes lie and how often they were written to."""
    codes = weight.codes
    return codes.data_ptr(), codes._version, weight.scales.data_ptr(), dtype
