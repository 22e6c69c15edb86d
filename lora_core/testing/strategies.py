"""hypothesis strategies for what adapters, quantizers and operators are fed with.

A strategy draws a small description (shape, dtype, scale, kind, seed), not a tensor: the
description is what a failing case shows and what shrinks, and its `tensor()` or `tensors()` makes
the same numbers every time. Sizes sit at and around powers of two, where blocks and masks end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_core.testing.runner import load_hypothesis

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1025)
KINDS = ("normal", "constant", "zeros", "zero blocks", "outliers", "ties")


@dataclass(frozen=True)
class Weight:
    """The description of one weight.

    `kind` is "normal"; "constant" (every element equal); "zeros"; "zero blocks" (the first half is
    zero); "outliers" (one in fifty is 100 times as large); "ties" (multiples of 1/64, so that many
    are equal and many lie halfway between two levels of a 4-bit code).
    """

    shape: tuple[int, ...]
    kind: str
    dtype: torch.dtype
    scale: float
    seed: int

    def tensor(self) -> Tensor:
        """Make the weight, `shape` in `dtype`, the same numbers every time."""
        generator = torch.Generator().manual_seed(self.seed)
        w = torch.randn(self.shape, generator=generator)
        if self.kind == "constant":
            w = torch.ones(self.shape)
        elif self.kind == "zeros":
            w = torch.zeros(self.shape)
        elif self.kind == "zero blocks":
            w.view(-1)[: w.numel() // 2] = 0.0
        elif self.kind == "outliers":
            w = torch.where(torch.rand(self.shape, generator=generator) < 0.02, 100 * w, w)
        elif self.kind == "ties":
            w = (w * 64).round().clamp(-64, 64) / 64
        return (w * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Operands:
    """The description of an operator's arguments: normal numbers of given shapes."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    seed: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Make the arguments, the same numbers every time."""
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(torch.randn(s, generator=generator).to(self.dtype) for s in self.shapes)


def sizes(smallest: int = 0, largest: int = 129) -> "SearchStrategy[int]":
    """Draw sizes of one dimension: 0, 1, odd ones, and those at and beside powers of two."""
    fitting = [n for n in SIZES if smallest <= n <= largest]
    if not fitting:
        raise ValueError(f"no size lies between {smallest} and {largest}; the sizes are {SIZES}")
    return load_hypothesis("hypothesis.strategies").sampled_from(fitting)


def shapes(
    dims: int = 3, smallest: int = 0, largest: int = 129
) -> "SearchStrategy[tuple[int, ...]]":
    """Draw shapes of 1 to `dims` dimensions; zero elements are among them when `smallest` is 0."""
    st = load_hypothesis("hypothesis.strategies")
    return st.lists(sizes(smallest, largest), min_size=1, max_size=dims).map(tuple)


def ranks(largest: int = 33) -> "SearchStrategy[int]":
    """Draw ranks r from 1 to `largest`."""
    return load_hypothesis("hypothesis.strategies").integers(1, largest)


def scales(smallest: int = -6, largest: int = 6) -> "SearchStrategy[float]":
    """Draw powers of two, 2**smallest to 2**largest; 1.0 is the simplest."""
    st = load_hypothesis("hypothesis.strategies")
    exponents = sorted(range(smallest, largest + 1), key=abs)
    return st.sampled_from(exponents).map(lambda exponent: 2.0**exponent)


def dtypes(among: Sequence[torch.dtype] = FLOATS) -> "SearchStrategy[torch.dtype]":
    """Draw one of the dtypes; the first is the simplest."""
    return load_hypothesis("hypothesis.strategies").sampled_from(list(among))


def seeds() -> "SearchStrategy[int]":
    """Draw seeds."""
    return load_hypothesis("hypothesis.strategies").integers(0, 2**31 - 1)


def weights(
    dims: int = 2, largest: int = 129, among: Sequence[torch.dtype] = FLOATS
) -> "SearchStrategy[Weight]":
    """Draw weights: shapes (empty and odd ones too), scales, dtypes, outliers, zeros and ties."""
    st = load_hypothesis("hypothesis.strategies")
    return st.builds(
        Weight,
        shape=shapes(dims, 0, largest),
        kind=st.sampled_from(KINDS),
        dtype=dtypes(among),
        scale=scales(),
        seed=seeds(),
    )


def operands(
    *specs: str, smallest: int = 0, largest: int = 65, among: Sequence[torch.dtype] = FLOATS
) -> "SearchStrategy[Operands]":
    """Draw arguments whose dimensions are named, so that those of one name agree.

    `operands("m k", "k n")` draws the two factors of a matrix product.

    Args:
        specs: one per argument, names separated by spaces; "" is a scalar.
        smallest: least size of a dimension; 0 draws empty tensors too.
        largest: greatest size.
        among: dtypes to draw from; the arguments share one.

    Returns:
        A strategy of `Operands`.
    """
    st = load_hypothesis("hypothesis.strategies")
    names = sorted({name for spec in specs for name in spec.split()})

    def described(drawn: dict[str, int], dtype: torch.dtype, seed: int) -> Operands:
        return Operands(tuple(tuple(drawn[n] for n in s.split()) for s in specs), dtype, seed)

    drawn = st.fixed_dictionaries({name: sizes(smallest, largest) for name in names})
    return st.builds(described, drawn, dtypes(among), seeds())
