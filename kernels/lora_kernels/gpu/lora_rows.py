"""What the kernels of LoRA for many rows share: tiles, whose row is whose, what is dropped."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Dropout", "Tile", "bounds", "fit", "options", "own_rows", "parts", "scaled"]


class Tile(NamedTuple):
    """What one program handles, and how it is compiled."""

    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


class Dropout(NamedTuple):
    """What is dropped: elements whose number of 65536 is below the threshold.

    Attributes:
        seed: int64 (1,), where x is.
        threshold: 0 to 65535.
    """

    seed: Tensor
    threshold: int


@triton.jit
def own_rows(rows_ptr, i, m, adapters):
    """Adapter of each row, -1 for none; without a list of them all rows have the first."""
    if rows_ptr is None:
        return tl.where(i < m, 0, -1)
    else:
        own = tl.load(rows_ptr + i, mask=i < m, other=-1)
        return tl.where(own < adapters, own, -1)


@triton.jit
def bounds(own, adapters):
    """Lowest and highest adapter of a tile; nothing between them if no row has any."""
    return tl.min(tl.where(own >= 0, own, adapters), 0), tl.max(own, 0)


@triton.jit
def scaled(value, scaling_ptr, adapter):
    """s times a value; without scalings the value."""
    if scaling_ptr is None:
        return value
    else:
        return value * tl.load(scaling_ptr + adapter)


def fit(tiles: tuple[Tile, Tile], r: int) -> Tile:
    """The first tile if it takes all ranks, else the second."""
    return tiles[0] if r <= tiles[0].ranks else tiles[1]


def parts(dropout: Dropout | None) -> tuple[Tensor | None, int]:
    """Seed and threshold as kernels take them."""
    return (None, 0) if dropout is None else dropout


def options(tile: Tile) -> dict[str, int]:
    """A tile as launch options."""
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANKS": tile.ranks}
    return {**constants, "num_warps": tile.warps, "num_stages": tile.stages}
