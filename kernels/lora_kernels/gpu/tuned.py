"""Which route a product takes at how many rows: measured where it was measured, else a default.

Three routes compute `x Wᵀ` (routes4.py). Which is fastest depends on the rows of x, the shape of W
and the GPU, so the crossovers are data: `tuned.json`, written by `python -m benchmarks.gpu --tune`,
holds for a GPU's name and a shape the largest number of rows for each route.

    {"NVIDIA H200": {"4096x14336/bfloat16": {"planes": 4, "halves": 128, "dx": 64,
                     "tiles": {"halves": {"16": {"warps": 8}, "64": {"splits": 2}}}}, …}}

`tiles` names, for a route, the fields in which a tile differs from the route's default tile, for up
to as many rows as its key says.

Where nothing was measured the default below holds. It comes from counting, not from a clock. The
16-bit route costs 5 to 6 instructions a weight for 16 rows as for one and issues one pass over the
codes for each tile of 64 or more rows; expanding first costs a fixed 2.5 bytes a weight, after
which the vendor's product runs near the peak. With the compute rates of an H200 the two meet
between 100 and 200 rows. Two int8 planes need fewer instructions a weight and four times the
matrix-unit time, and one more launch: they pay for the fewest rows of a large weight.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["DEFAULT", "TUNED", "Crossover", "crossover", "read_tuned", "tile_fields"]

TUNED = Path(__file__).with_name("tuned.json")


class Crossover(NamedTuple):
    """The largest number of rows for which a route is taken; 0 means never."""

    planes: int
    """rows of x up to which `x Wᵀ` runs on int8 planes"""
    halves: int
    """rows of x up to which, beyond `planes`, it decodes to 16 bits inside the product"""
    dx: int
    """rows of dy up to which `dy W` decodes inside the product"""


DEFAULT = Crossover(planes=4, halves=128, dx=64)
PLANES_PAY = 1 << 24  # weights: below, the launch that splits x costs more than decoding saves


@functools.cache
def read_tuned(path: Path = TUNED) -> dict[str, dict[str, Any]]:
    """The measured table, GPU name to shape to crossover; empty when there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def crossover(gpu: str | None, n: int, k: int, dtype: torch.dtype) -> Crossover:
    """The crossovers of one weight.

    Args:
        gpu: the device's name, or None for the interpreter.
        n: out_features.
        k: in_features.
        dtype: of x, 16-bit.

    Returns:
        What was measured for this GPU and shape, or the default.
    """
    measured = _entry(gpu, n, k, dtype)
    if measured:
        return Crossover(measured["planes"], measured["halves"], measured["dx"])
    if torch.version.hip is not None or n * k < PLANES_PAY:
        return DEFAULT._replace(planes=0)  # AMD has no byte permute in these kernels
    return DEFAULT


@functools.cache
def tile_fields(
    gpu: str | None, n: int, k: int, dtype: torch.dtype, way: str, rows: int
) -> dict[str, int]:
    """What a measured tile changes in the default one.

    Args:
        gpu: the device's name, or None for the interpreter.
        n: out_features.
        k: in_features.
        dtype: of x, 16-bit.
        way: "planes", "halves" or "dx".
        rows: of x, or of dy.

    Returns:
        Field to value: those of the smallest number of rows measured that is no smaller than
        `rows`; empty where nothing was measured.
    """
    tiles = _entry(gpu, n, k, dtype).get("tiles", {}).get(way, {})
    enough = [measured for measured in map(int, tiles) if measured >= rows]
    return tiles[str(min(enough))] if enough else {}


def _entry(gpu: str | None, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = read_tuned().get(gpu or "", {})
    return shapes.get(f"{n}x{k}/{str(dtype).removeprefix('torch.')}", {})
