"""Which tile is fastest for a route, a shape and a number of rows, and from where on which route.

The candidates are a route's default tile and those that differ from it in the size of a program's
tile and its warps, or in the splits. One that does not compile, does not fit the device or gives a
wrong answer drops out; the others are timed in turns as CUDA graphs. `compile_only` stops before
the clock: several processes can fill Triton's cache on disk with what one process then times.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu.contenders import Contender, Route
from benchmarks.gpu.problem import DTYPES
from benchmarks.gpu.timing import Row, admitted, answer, bench, inputs_of, timed

# rows at which each way is tried; a route that has lost at one count is not tried far beyond
ROWS = {
    "planes": (1, 2, 4, 8, 16),
    "halves": (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512),
    "dx": (1, 4, 16, 32, 64, 128, 192, 256, 384, 512),
}
BETTER = 0.98  # of the default's time: less is noise
# sizes and warps that the kernels have
TILES: dict[str, tuple[dict[str, int], ...]] = {
    "planes": ({"features": 16}, {"features": 64}, {"warps": 2}, {"warps": 8}),
    "halves": (
        {"features": 32, "warps": 2},
        {"features": 64, "warps": 2},
        {"features": 128, "warps": 4},
        {"features": 128, "warps": 8},
    ),
    "dx": (
        {"features": 16, "warps": 4},
        {"features": 32, "warps": 4},
        {"features": 32, "warps": 8},
        {"features": 64, "warps": 4},
        {"features": 64, "warps": 8},
    ),
}
FEWEST_ROWS = {"planes": 2, "halves": 16, "dx": 16}  # of a tile


def candidates(way: str, n: int, k: int, m: int, dtype: Any) -> list[dict[str, int]]:
    """Fields in which tiles differ from the default one, which comes first."""
    from lora_kernels.gpu import matmul4, matmul4_dx, planes4

    default = {
        "planes": planes4.default_tile,
        "halves": matmul4.default_tile,
        "dx": matmul4_dx.default_dx_tile,
    }[way](m, n, k, dtype)
    found: list[dict[str, int]] = [{}, *TILES[way]]
    found += [{"splits": s} for s in (default.splits * 2, default.splits // 2, 1) if s]
    rows = default.rows // 2
    while rows >= FEWEST_ROWS[way]:  # more rows than the default's would stay empty
        found.append({"rows": rows})
        rows //= 2
    tiles = [dataclasses.replace(default, **fields) for fields in found]
    return [fields for i, fields in enumerate(found) if tiles[i] not in tiles[:i]]


class Tile(Contender):
    """A route with some fields of its tile changed."""

    form = "codes"

    def __init__(self, way: str, fields: dict[str, int]) -> None:
        self.way, self.fields = way, fields
        self.name = f"{way} {json.dumps(fields)}"
        self.route = Route("halves" if way == "dx" else way)
        self.hold = self.route.hold  # type: ignore[method-assign]

    def run(self, inputs: tuple[Any, ...], held: Any) -> Any:
        """Multiply."""
        product = self.route.dx if self.way == "dx" else self.route.forward
        return product(held, *inputs, fields=self.fields)


def tune(job: Row) -> Iterator[Row]:
    """Judge and time the candidates of one way, shape and number of rows.

    Args:
        job: `way` ("planes", "halves", "dx"), `shape`, `m`, `dtype`, `banned`, `compile_only`,
            `smoke`.

    Yields:
        A row for each candidate, and one for the route that expands, with which it competes.
    """
    way, (n, k), m, dtype = job["way"], job["shape"], job["m"], DTYPES[job["dtype"]]
    task = "dx" if way == "dx" else "forward"
    it, inputs = bench(n, k, dtype), inputs_of(task, n, k, m, dtype)
    truth = answer(task, it, inputs)
    facts = {"kind": "tile", "way": way, "shape": [n, k], "m": m, "dtype": job["dtype"]}
    runs: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {}
    kept: dict[str, dict[str, int] | None] = {}
    wanted = candidates(way, n, k, m, dtype)
    for fields in wanted[:2] if job["smoke"] else wanted:
        tile = Tile(way, fields)
        yield {"kind": "trying", "who": tile.name}  # whom to blame if nothing comes after it
        run, held = functools.partial(tile.run, inputs), it.forms(tile)
        why = "it ended an earlier process" if tile.name in job["banned"] else None
        why = why or admitted("", [], run, held[0], truth)[0]
        if why is None:
            runs[tile.name], kept[tile.name] = (run, held), fields
        elif not job["compile_only"]:
            yield facts | {"fields": fields, "refused": why}
    yield {"kind": "trying", "who": None}
    if job["compile_only"]:
        return
    expand = Route("dense")
    product = expand.dx if way == "dx" else expand.forward
    runs["dense"], kept["dense"] = (lambda held: product(held, *inputs), it.forms(expand)), None
    for name, timing in timed(runs, "graph", job["smoke"]):
        if name is None or timing is None:
            yield {"kind": "trying", "who": name}
            continue
        row = facts | {"fields": kept[name]}
        if isinstance(timing, harness.Timing):
            yield row | {"seconds": [timing.median, timing.low, timing.high]}
        else:
            yield row | {"refused": timing}


def best_of(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """The table of `lora_kernels.gpu.tuned` for one GPU: shape and dtype to crossovers and tiles.

    A way is taken up to the largest number of rows at which it, and at all fewer that were
    measured, is no slower than what would be taken instead.
    """
    points: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        if row["kind"] != "tile" or "seconds" not in row:
            continue
        shape = f"{row['shape'][0]}x{row['shape'][1]}/{row['dtype']}"
        point = points.setdefault(shape, {}).setdefault(row["way"], {}).setdefault(row["m"], {})
        name = "dense" if row["fields"] is None else json.dumps(row["fields"])
        point[name] = row["seconds"][0]
    return {shape: _entry(ways) for shape, ways in points.items()}


def _entry(ways: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"tiles": {}}
    best: dict[str, dict[int, float]] = {}
    for way, by_rows in ways.items():
        for m, times in sorted(by_rows.items()):
            own = {name: seconds for name, seconds in times.items() if name != "dense"}
            if not own:
                continue
            name = min(own, key=own.__getitem__)
            if own[name] > BETTER * own.get("{}", float("inf")):
                name = "{}"
            best.setdefault(way, {})[m] = own[name]
            entry["tiles"].setdefault(way, {})[str(m)] = json.loads(name)
    never = float("inf")
    dense = {way: {m: t.get("dense", never) for m, t in ways[way].items()} for way in ways}
    if "halves" in ways:
        planes, halves = best.get("planes", {}), best.get("halves", {})
        entry["planes"] = _last(planes, lambda m: min(halves.get(m, never), dense["planes"][m]))
        fused = {m: min(halves[m], planes.get(m, never)) for m in halves}
        entry["halves"] = _last(fused, lambda m: dense["halves"][m])
    if "dx" in ways:
        entry["dx"] = _last(best.get("dx", {}), lambda m: dense["dx"][m])
    return entry


def _last(own: dict[int, float], other: Callable[[int], float]) -> int:
    """The last number of rows before the first at which another way is faster, or 0."""
    taken = 0
    for m in sorted(own):
        if own[m] > other(m):
            break
        taken = m
    return taken


def write_tuned(path: Path, gpu: str, entries: dict[str, dict[str, Any]]) -> None:
    """Put measured entries into the table on disk; other GPUs and shapes stay as they are.

    Args:
        path: `lora_kernels.gpu.tuned.TUNED`.
        gpu: the device's name.
        entries: from `best_of`; crossovers that were not measured keep their value, or take the
            default.
    """
    from lora_kernels.gpu.tuned import DEFAULT

    table = json.loads(path.read_text()) if path.exists() else {}
    shapes = table.setdefault(gpu, {})
    for shape, entry in entries.items():
        before = DEFAULT._asdict() | shapes.get(shape, {})
        tiles = before.get("tiles", {}) | entry["tiles"]
        shapes[shape] = before | entry | {"tiles": tiles}
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def jobs(shapes: Iterable[list[int]], dtype: str, smoke: bool) -> list[Row]:
    """What to tune, the fewest rows of all shapes first."""
    every = [(m, way) for way, rows in ROWS.items() for m in rows]
    if smoke:
        every = [(2, "planes"), (5, "halves"), (5, "dx")]
    base = {"kind": "tune", "dtype": dtype, "smoke": smoke, "compile_only": False}
    return [
        base | {"way": way, "shape": shape, "m": m} for m, way in sorted(every) for shape in shapes
    ]
