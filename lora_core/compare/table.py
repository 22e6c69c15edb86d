r"""The comparison as tables: what each variant gives, and what it costs.

Two tables, since one would have sixteen columns and be read by nobody. Figures with intervals keep
them. With one seed an interval is that of the held-out rows (95 %): what another sample of
questions might give. With several seeds it is the least and the greatest: what another run might
give. The caption says which.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lora_core.compare.rows import Cell, Row, forgetting_cell
from lora_core.evaluate.estimate import Estimate
from lora_core.report.cells import estimate_text, number

_LEFT_OUT = ("rouge1", "rouge2", "empty_answers")  # compare.json has them
_SEARCHED = (
    "of the defaults, those of prefix, prompt, ptuning and bottleneck-pfeiffer are the best of a "
    "few on other rows of the shipped task; the rest was tried at one rate or takes its kin's"
)


@dataclass(frozen=True)
class Column:
    """One column: its heading, and what a row has in it."""

    heading: str
    """with its unit"""
    cell: Callable[[Row], Cell]
    """text, a number, an estimate, or None for nothing"""


def quality_columns(rows: Sequence[Row]) -> list[Column]:
    """Columns of the table of what variants give.

    Args:
        rows: their first good record names the measures.

    Returns:
        The columns; of ROUGE's three kinds the longest common subsequence alone.
    """
    return [
        Column("variant", lambda row: row.name),
        *(Column(name, partial(_quality, name)) for name in shown_measures(rows)),
        Column("loss (nats/token)", lambda row: row.measured("loss")),
        Column("forgetting (bits/byte)", forgetting_cell),
    ]


def shown_measures(rows: Sequence[Row]) -> list[str]:
    """Names of the measures of the answers that are shown, the first of them drawn.

    Args:
        rows: their first good record names the measures.
    """
    names = next((list(row.done[0]["quality"]) for row in rows if row.done), [])
    return [name for name in names if name not in _LEFT_OUT]


def _quality(name: str, row: Row) -> Cell:
    return row.quality(name)


def cost_columns() -> list[Column]:
    """Columns of the table of what variants cost."""
    return [
        Column("variant", lambda row: row.name),
        Column("trained", lambda row: row.done[0]["trainable"] if row.done else None),
        Column("share", _share),
        Column("rate", lambda row: row.done[0]["settings"].get("lr") if row.done else None),
        Column("peak memory (MB)", lambda row: _rounded(row.number("memory", 1e-6))),
        Column("of the whole process", lambda row: _rounded(row.number("memory_whole", 1e-6))),
        Column("training (s)", lambda row: _rounded(row.number("train_seconds"), 1)),
        Column("tokens/s", lambda row: _rounded(row.number("tokens_per_second"))),
        Column("tokens a request", lambda row: _rounded(row.request_tokens(), 1)),
        Column("first token (ms)", lambda row: _rounded(row.in_use("first_token"), 2)),
        Column("ms a token", lambda row: _rounded(row.in_use("per_token"), 2)),
        Column("merged", lambda row: _rounded(row.latency("merged", "per_token"), 2)),
        Column("adapter off", lambda row: _rounded(_off(row), 2)),
        Column("on disk (bytes)", lambda row: row.done[0].get("bytes") if row.done else None),
        Column("mergeable", lambda row: row.mergeable),
    ]


def _share(row: Row) -> Cell:
    return None if row.share is None else f"{row.share:.2%}"


def _off(row: Row) -> Estimate | float | None:
    """The base's time where there is an adapter to switch off."""
    return row.latency("base", "per_token") if row.mergeable is not None else None


def _rounded(value: Estimate | float | None, places: int = 0) -> Cell:
    if isinstance(value, Estimate) or value is None:
        return value
    rounded = round(value, places)
    return int(rounded) if places == 0 else rounded


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader has to know of the columns.

    Args:
        rows: of the table.
    """
    seeds = max((len(row.done) for row in rows), default=0)
    spread = (
        f"mean over {seeds} seeds [least, greatest]; variants that no seed changes ran once and "
        "show their 95 % interval over rows"
        if seeds > 1
        else "[…]: 95 % interval over held-out rows, one seed"
    )
    return [
        spread,
        f"rates: as given, else of each method; {_SEARCHED}; --sweep lr=…",
        "forgetting: bits per byte of general text, after less before; 4 bits' cost included",
        "peak memory: above what the interpreter with torch took before the base was loaded",
        "it is of loading and training, or of loading and answering where nothing is trained",
        "tokens a request: the prompt with examples and system text, and virtual tokens",
        "ms: medians of single requests, the adapter on, merged and off in turns: compare in a row",
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    """One line a failed variant and seed."""
    return [
        f"{record['name']} (seed {record['seed']}) failed: {record['failed']}"
        for row in rows
        for record in row.failed
    ]


def text_of(cell: Cell) -> str:
    """A cell as text."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return estimate_text(cell, count=False)
    return number(cell)


def cells(columns: Sequence[Column], row: Row) -> list[Cell]:
    """A row's cells; a variant that failed for every seed says so in place of its first figure."""
    if not row.done:
        return [row.name, "failed", *[None] * (len(columns) - 2)]
    return [column.cell(row) for column in columns]


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table in Markdown.

    Args:
        columns: headings and cells.
        rows: variants.
    """
    lines = [[column.heading for column in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[text_of(cell) for cell in cells(columns, row)] for row in rows]
    return "\n".join(f"| {' | '.join(_escaped(c) for c in line)} |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def aligned(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """A table for the terminal: columns padded, the first to the left.

    Args:
        columns: headings and cells.
        rows: variants.
    """
    lines = [[column.heading for column in columns]]
    lines += [[text_of(cell) for cell in cells(columns, row)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
