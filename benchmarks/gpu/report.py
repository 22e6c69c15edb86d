"""What a GPU run leaves behind: JSON that is whole after every row, targets, and Markdown."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, tuple[int, int], int, str, str]  # task, shape, m, who, mode
OURS, BNB, DENSE = "lora-core", "bitsandbytes", "dense"
OFTEN = 50  # rows between two writings of the Markdown, for a run that is cut
SHOWN = 3  # cases named for one reason
LARGE = 4096 * 14336  # weights of the shapes that the share of the floor is asked of
NOTE = (
    "Median microseconds in a CUDA graph [20 %, 80 %], then in plain calls. Floor: share of that "
    "time in which the 4-bit weight's bytes could be copied, or the operations done. Error: root "
    "mean square against float64, of its own. ×: their time over ours."
)


class Report:
    """Rows as they come, in a file that is valid JSON at every moment."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, []  # type: Path | None, list[Row]

    def add(self, row: Row) -> None:
        """Keep a row and write all of them."""
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = ",\n".join(json.dumps(one) for one in self.rows)
            replace(self.path, f"[\n{lines}\n]\n")
            if len(self.rows) % OFTEN == 0:
                self.finish()

    def of(self, kind: str) -> list[Row]:
        """Rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def finish(self) -> None:
        """Write the Markdown beside the JSON."""
        if self.path is not None:
            replace(self.path.with_suffix(".md"), markdown(self))


def replace(path: Path, text: str) -> None:
    """Write a file in one step: whoever reads it sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def slug(name: str) -> str:
    """A machine's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- targets -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that is asked for, and the worst that was measured."""

    text: str
    wanted: float
    values: dict[str, float]
    """where to what was measured there"""
    at_most: bool = False

    def worst(self) -> tuple[str, float] | None:
        """The value furthest from what is wanted, with its place."""
        pick = max if self.at_most else min
        return pick(self.values.items(), key=lambda entry: entry[1]) if self.values else None

    def met(self) -> bool | None:
        """None where nothing was measured."""
        worst = self.worst()
        if worst is None:
            return None
        return worst[1] <= self.wanted if self.at_most else worst[1] >= self.wanted


def timed(rows: Iterable[Row]) -> dict[Key, Row]:
    """Timed rows of the contenders as they are used, routes by themselves left out."""
    found: dict[Key, Row] = {}
    for row in rows:
        if row["kind"] == "time" and "seconds" in row and not row["routes"]:
            shape = (row["shape"][0], row["shape"][1])
            found[row["task"], shape, row["m"], row["who"], row["mode"]] = row
    return found


def targets(rows: Iterable[Row]) -> list[Target]:
    """The targets for an H200; all but the last from CUDA graphs."""
    known = timed(rows)

    def ratios(task: str, who: str, counts: Iterable[int]) -> dict[str, float]:
        """How many times as long another takes as we do."""
        found = {}
        for (t, shape, m, one, mode), row in known.items():
            other = known.get((t, shape, m, who, mode))
            if (t, one, mode) == (task, OURS, "graph") and m in counts and other:
                found[place(shape, m)] = other["seconds"][0] / row["seconds"][0]
        return found

    def shares(task: str, m: int, least: int = 0) -> dict[str, float]:
        return {
            place(shape, m): row["share_of_floor"]
            for (t, shape, count, one, mode), row in known.items()
            if (t, count, one, mode) == (task, m, OURS, "graph")
            and shape[0] * shape[1] >= least
            and row["share_of_floor"] is not None
        }

    def overhead(m: int) -> dict[str, float]:
        return {where: 1 / ratio for where, ratio in ratios("step", DENSE, (m,)).items()}

    exact = {
        place(shape, m): row["error"] / known[task, shape, m, DENSE, mode]["error"]
        for (task, shape, m, one, mode), row in known.items()
        if (task, one, mode) == ("forward", OURS, "graph")
        and (task, shape, m, DENSE, mode) in known
    }
    return [
        Target("expand: share of copy bandwidth", 0.85, shares("expand", 0)),
        Target("expand: times as fast as bitsandbytes", 1.2, ratios("expand", BNB, (0,))),
        Target("M = 1: times as fast as bitsandbytes", 1.5, ratios("forward", BNB, (1,))),
        Target(
            "M = 1, 58.7 M weights: share of the memory floor", 0.7, shares("forward", 1, LARGE)
        ),
        Target(
            "M = 4 … 64: times as fast as bitsandbytes",
            2.5,
            ratios("forward", BNB, (4, 8, 16, 32, 64)),
        ),
        Target("forward + backward, M = 2048: times dense", 1.12, overhead(2048), True),
        Target("forward + backward, M = 8192: times dense", 1.05, overhead(8192), True),
        Target("error: times dense's", 1.05, exact, True),
    ]


def place(shape: tuple[int, int], m: int) -> str:
    """Where a figure was taken."""
    return f"{shape[0]}×{shape[1]}" + (f", M = {m}" if m else "")


# --- Markdown ----------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The run as tables."""
    tables = [
        *_tasks(timed(report.rows)),
        _routes(report.of("time")),
        _tiles(report.of("tile")),
        _missing(report),
    ]
    return "\n\n".join([summary(report).rstrip(), *(t for t in tables if t)]) + "\n"


def summary(report: Report) -> str:
    """The machine, what was wrong, and the targets: the end of what a run prints."""
    facts = (report.of("facts") or [{}])[0]
    sections = [
        _head(facts, (report.of("ceilings") or [{}])[0]),
        _checks(report.of("check")),
        _targets(targets(report.rows), bool(facts.get("smoke"))) if report.of("time") else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(facts: Row, ceilings: Row) -> str:
    shown = ("python", "torch", "triton", "cuda", "capability", "bitsandbytes", "command", "time")
    lines = [f"# {facts.get('machine', 'unknown machine')}", ""]
    if facts.get("smoke"):
        lines += ["**A smoke run on toy sizes: the figures mean nothing.**", ""]
    lines.append(", ".join(f"{name} {facts[name]}" for name in shown if facts.get(name)))
    if ceilings:
        copy, product = ceilings["bytes_per_second"] / 1e9, ceilings["flops_per_second"] / 1e12
        launch = ceilings["launch_in_graph_seconds"] * 1e6
        lines.append("")
        lines.append(f"Measured in this run: a copy moves {copy:.0f} GB/s, a large product runs at")
        lines.append(f"{product:.0f} TFLOP/s, a launch in a CUDA graph takes {launch:.2f} µs.")
    return "\n".join(lines)


def _checks(rows: list[Row]) -> str:
    if not rows:
        return ""
    wrong = [row for row in rows if not row.get("passed")]
    lines = ["## Correctness", "", f"{len(rows) - len(wrong)} of {len(rows)} cases passed."]
    return "\n".join([*lines, *_grouped(wrong)])


def _grouped(rows: list[Row]) -> list[str]:
    """A line for each reason, with the first of those it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        why = row.get("failure") or row.get("refused") or "; ".join(row.get("problems", []))
        reasons.setdefault(why, []).append(label(row))
    lines = []
    for why, labels in reasons.items():
        more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
        lines.append(f"* **{', '.join(labels[:SHOWN])}**{more}: {why}")
    return lines


def _targets(every: list[Target], smoke: bool) -> str:
    rows = []
    for target in every:
        worst, sign = target.worst(), "≤" if target.at_most else "≥"
        seen = "not measured" if worst is None else f"{worst[1]:.3g} ({worst[0]})"
        verdict = {None: "", True: "met", False: "**missed**"}[None if smoke else target.met()]
        rows.append([target.text, f"{sign} {target.wanted:g}", seen, verdict])
    return "## Targets\n\n" + table(["target", "wanted", "worst measured", ""], rows)


def _tasks(known: dict[Key, Row]) -> Iterator[str]:
    for task in dict.fromkeys(key[0] for key in known):
        places = dict.fromkeys(key[1:3] for key in known if key[0] == task)
        who = [w for w in (OURS, BNB, DENSE) if any(k[0] == task and k[3] == w for k in known)]
        head = ["N×K", "M"]
        for one in who:
            head += [f"{one} µs", "eager", "floor", "error"]
            head += [] if one == OURS else ["×"]
        rows = []
        for shape, m in places:
            cells = [f"{shape[0]}×{shape[1]}", str(m) if m else ""]
            ours = known.get((task, shape, m, OURS, "graph"))
            for one in who:
                graph = known.get((task, shape, m, one, "graph"))
                cells += _cells(graph, known.get((task, shape, m, one, "eager")))
                if one != OURS:
                    cells.append(_ratio(graph, ours))
            rows.append(cells)
        yield f"## {task}\n\n{NOTE}\n\n{table(head, rows)}"


def _cells(graph: Row | None, eager: Row | None) -> list[str]:
    share = graph.get("share_of_floor") if graph else None
    error = (graph or eager or {}).get("error")
    return [
        microseconds(graph, spread=True),
        microseconds(eager),
        "" if share is None else f"{share:.0%}",
        "" if error is None else f"{error:.2g}",
    ]


def _ratio(theirs: Row | None, ours: Row | None) -> str:
    if theirs is None or ours is None:
        return ""
    return f"{theirs['seconds'][0] / ours['seconds'][0]:.2f}"


def microseconds(row: Row | None, spread: bool = False) -> str:
    """A time as text."""
    if row is None:
        return ""
    median, low, high = (1e6 * seconds for seconds in row["seconds"])
    return f"{median:.2f}" + (f" [{low:.2f}, {high:.2f}]" if spread else "")


def _routes(rows: list[Row]) -> str:
    known = {}
    for row in rows:
        if row["routes"] and "seconds" in row and row["mode"] == "graph":
            known[row["task"], *row["shape"], row["m"], row["who"]] = row
    if not known:
        return ""
    who = list(dict.fromkeys(key[-1] for key in known))
    lines = []
    for task, n, k, m in dict.fromkeys(key[:-1] for key in known):
        times = [known.get((task, n, k, m, one)) for one in who]
        fastest = min((t for t in times if t), key=lambda row: row["seconds"][0])
        lines.append([task, f"{n}×{k}", str(m), *map(microseconds, times), fastest["who"]])
    note = f"Each route by itself, microseconds in a CUDA graph; {OURS} is the one chosen."
    return f"## Routes\n\n{note}\n\n" + table(["task", "N×K", "M", *who, "fastest"], lines)


def _tiles(rows: list[Row]) -> str:
    points: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            points.setdefault((row["way"], *row["shape"], row["m"]), []).append(row)
    lines = []
    for (way, n, k, m), tried in points.items():
        own = [row for row in tried if row["fields"] is not None]
        if not own:
            continue
        best = min(own, key=lambda row: row["seconds"][0])
        default = next((row for row in own if not row["fields"]), None)
        dense = next((row for row in tried if row["fields"] is None), None)
        cells = [microseconds(default), microseconds(best), json.dumps(best["fields"])]
        lines.append([way, f"{n}×{k}", str(m), *cells, microseconds(dense), str(len(own))])
    if not lines:
        return ""
    head = ["way", "N×K", "M", "default µs", "best µs", "differs in", "expanding µs", "tried"]
    return "## Tiles\n\n" + table(head, lines)


def _missing(report: Report) -> str:
    lost = [
        row
        for row in report.rows
        if row["kind"] != "check" and (row.get("refused") or row.get("failure"))
    ]
    late = [row["label"] for row in report.of("skipped")]
    lines = _grouped(lost)
    if late:
        lines.append(f"* no time was left for {len(late)} jobs: {'; '.join(late)}")
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(row: Row) -> str:
    """A job or a row in a few words, which `--only` is matched against."""
    names = ("kind", "task", "family", "way", "who", "mode", "dtype")
    words = [str(row[name]) for name in names if row.get(name)]
    if row.get("routes"):
        words.append("routes")
    if "nested" in row:
        words.append("nested" if row["nested"] else "plain")
    if row.get("shape"):
        words.append("x".join(map(str, row["shape"])))
    if row.get("block_size"):
        words.append(f"{row['code']}/{row['block_size']}")
    if row.get("m"):
        words.append(f"m={row['m']}")
    return " ".join(words)
