"""Tables of a CPU run, and the figures that are asked for, computed from its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Shape = tuple[int, int]
ASKED = (14336, 4096)
"""the shape that the figures are asked of, with 2 threads on AVX-512"""
STREAM = "streaming read"
"""who a row is of that shows the limit, not a contender"""
HEAD = (
    f"{'':<22}{'median [20 %, 80 %]':<32}{'× ours':>8}{'rate':>16}{'of streaming':>14}{'error':>10}"
)


def table(title: str, rows: Sequence[Row]) -> str:
    """One task on one shape, everybody beside ours, which is the first row."""
    lines = [f"\n{title}", HEAD]
    for row in rows:
        median, low, high = (1e3 * seconds for seconds in row["seconds"])
        times = f"{median:9.3f} ms [{low:.3f}, {high:.3f}]"
        more = f"{row['seconds'][0] / rows[0]['seconds'][0]:.2f}" if row["who"] != STREAM else ""
        share = "" if row["share_of_streaming"] is None else f"{row['share_of_streaming']:.1%}"
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        lines.append(f"{row['who']:<22}{times:<32}{more:>8}{rate(row):>16}{share:>14}{error:>10}")
    return "\n".join(lines)


def rate(row: Row) -> str:
    """Bytes a second where memory is the limit, else operations."""
    seconds = row["seconds"][0]
    if row["bytes"] is not None:
        return f"{row['bytes'] / seconds / 1e9:.1f} GB/s"
    n, k = row["shape"]
    return f"{2 * row['m'] * n * k / seconds / 1e9:.0f} Gflop/s"


@dataclass(frozen=True)
class Figure:
    """Something asked for, and what was measured on each shape."""

    text: str
    wanted: float
    values: dict[Shape, float]
    at_most: bool = False

    def reached(self) -> bool | None:
        """Whether the shape asked for has it; None if it was not measured."""
        value = self.values.get(ASKED)
        if value is None:
            return None
        return value <= self.wanted if self.at_most else value >= self.wanted


def figures(rows: Iterable[Row]) -> list[Figure]:
    """What the CPU backend is to reach; each is a ratio within one task, or of one task's peers."""
    rows = list(rows)
    ours, bnb, packed, dense = "ours", "bitsandbytes", "bitsandbytes packed", "dense bf16"
    seconds: dict[tuple[Shape, str, str], float] = {}
    for row in rows:
        if "seconds" in row:
            place = tuple(row["shape"]), row["task"]
            seconds[*place, row["who"]] = row["seconds"][0]
            if row["ours"]:
                seconds[*place, ours] = row["seconds"][0]
    shapes = list(dict.fromkeys(shape for shape, _, _ in seconds))

    def ratio(above: Sequence[tuple[str, str]], below: tuple[str, str]) -> dict[Shape, float]:
        """Time of the fastest of some over the time of another, where both were measured."""
        found = {}
        for shape in shapes:
            tops = [seconds[shape, *key] for key in above if (shape, *key) in seconds]
            if tops and (shape, *below) in seconds:
                found[shape] = min(tops) / seconds[shape, *below]
        return found

    def beside(task: str, *others: str) -> dict[Shape, float]:
        return ratio([(task, other) for other in others], (task, ours))

    one, some, many = "forward m=1", "forward m=64", "forward m=512"
    kept = ratio([("expand", bnb)], ("expand kept", ours))
    shares = {
        tuple(row["shape"]): row["share_of_streaming"]
        for row in rows
        if row.get("ours") and row["task"] == one
    }
    slower = ratio([(many, ours)], (many, dense))
    avx2 = ratio([(one, "lora-core avx2")], (one, "lora-core avx512"))
    return [
        Figure("expand bf16, into memory that is kept: times bitsandbytes", 9, kept),
        Figure("expand bf16, both in new memory: times bitsandbytes", 9, beside("expand", bnb)),
        Figure("M = 1: times bitsandbytes' training layout", 25, beside(one, bnb)),
        Figure("M = 1: times bitsandbytes' packed layout", 1.4, beside(one, packed)),
        Figure("M = 1: times dense bf16", 3, beside(one, dense)),
        Figure("M = 1: share of the streaming bandwidth", 0.7, shares),
        Figure("M = 64: times bitsandbytes' best", 2, beside(some, bnb, packed)),
        Figure("M = 512: our time over dense bf16's", 1.15, slower, at_most=True),
        Figure("quantize: times bitsandbytes", 10, beside("quantize", bnb)),
        Figure("M = 1: AVX2's time over AVX-512's", 2, avx2, at_most=True),
    ]


def summary(found: Sequence[Figure], ours: str) -> str:
    """The figures as a table, each shape a column; `ours` says which contender they are of."""
    shapes = list(dict.fromkeys(shape for figure in found for shape in figure.values))
    columns = "".join(f"{f'{n}x{k}':>13}" for n, k in shapes)
    asked = f"{ASKED[0]}x{ASKED[1]}"
    lines = [f"\n{f'Figures to reach, by {ours}':<60}{'wanted':>8}{columns}  on {asked}"]
    for figure in found:
        wanted = f"{'≤' if figure.at_most else '≥'} {figure.wanted:g}"
        values = "".join(
            f"{figure.values[shape]:>13.2f}" if shape in figure.values else f"{'-':>13}"
            for shape in shapes
        )
        verdict = {True: "reached", False: "not reached", None: "not measured"}[figure.reached()]
        lines.append(f"{figure.text:<60}{wanted:>8}{values}  {verdict}")
    return "\n".join(lines)
