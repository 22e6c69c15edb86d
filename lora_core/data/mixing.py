"""Mix several sources by weight.

Weight w shows each row of a file w times an epoch: the whole part of w as full copies, the rest as
a sample drawn with the seed. Several sources are then shuffled together with the seed. Without
weights, files are simply joined. One file with weight 1 keeps its order.
"""

import random
from collections.abc import Sequence
from math import floor
from pathlib import Path
from typing import TypeAlias

Source: TypeAlias = str | Path | tuple[str | Path, float]
"""A file, or a file and its weight."""


def mix(lengths: Sequence[int], weights: Sequence[float], seed: int = 0) -> list[tuple[int, int]]:
    """One epoch's (source, row) pairs: each row `weight` times.

    Args:
        lengths: rows per source.
        weights: per source how often a row is shown; the whole part as copies, the rest as a
            sample without repetition.
        seed: of the sample and of the joint shuffle (one source with weight 1 keeps its order).

    Raises:
        ValueError: a weight is not positive and finite, or so small that it shows no row.
    """
    generator = random.Random(seed)
    order: list[tuple[int, int]] = []
    for source, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
        if not 0 < weight < float("inf"):
            raise ValueError(f"a data weight must be positive; got {weight} for source {source}")
        copies = floor(weight)
        extra = generator.sample(range(length), round((weight - copies) * length))
        if length and not copies and not extra:
            raise ValueError(
                f"a data weight of {weight} shows none of the {length} rows of source {source}; "
                "raise it or leave the source out"
            )
        order += [(source, row) for row in [*range(length)] * copies + sorted(extra)]
    if len(lengths) > 1:
        generator.shuffle(order)
    return order


def short_names(files: list[Path]) -> list[str]:
    """File names if they tell the files apart, else the whole paths, numbered if need be."""
    for names in ([file.name for file in files], [str(file) for file in files]):
        if len(set(names)) == len(names):
            return names
    return [f"{file}#{number}" for number, file in enumerate(files)]


def weighted_files(path: Source | Sequence[Source]) -> list[tuple[str | Path, float]]:
    """(file, weight) pairs of a file, a pair, or a list of either."""
    if isinstance(path, str | Path):
        return [(path, 1.0)]
    if isinstance(path, tuple) and len(path) == 2 and isinstance(path[1], int | float):
        return [(path[0], float(path[1]))]
    pairs = [(one, 1.0) if isinstance(one, str | Path) else one for one in path]
    if not pairs:
        raise ValueError("no data file given")
    return [(file, float(weight)) for file, weight in pairs]
