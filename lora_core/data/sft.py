"""Supervised rows: JSON Lines in, {"input_ids", "labels"} out, and a report of what happened.

What it does: `SFTDataset.from_jsonl` reads one file or several with weights, tokenises and grades
every record (`lora_core.data.grading`), fits it into `max_length`, drops rows that could teach
nothing, and counts all of that per source in `.report`.

Rows that are too long are fitted as `lora_core.data.fit` says, sources mixed as
`lora_core.data.mixing` says.

How it differs from the known loaders: rows are held as two flat arrays (5 bytes a token), labels
come from character spans and never from comparing ids with a pad token, and a conversation whose
graded part cannot be told is an error instead of a warning. The trade-off: everything is tokenised
before the first step.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from lora_core.data.control_text import ControlTextError
from lora_core.data.encoder import IGNORED, Encoder
from lora_core.data.fit import split_text, truncate
from lora_core.data.grading import Graded
from lora_core.data.mixing import Source, mix, short_names, weighted_files
from lora_core.data.records import PlainText, Record, parse_records, read_records
from lora_core.data.report import Report, SourceReport
from lora_core.data.tokenizer import Tokenizer

Row = dict[str, Any]  # "input_ids", "labels": list[int]; "source": str, if there are several


class Rows(Sequence[Row]):
    """A view of tokenised rows: a sequence of {"input_ids", "labels"}, both lists of T integers.

    Rows of several files also have "source", the name of the file, so that a training loop can
    report the loss per source.
    """

    def __init__(self, store: "_Store", order: Sequence[int]) -> None:
        self._store = store
        self.order = array("q", order)

    @property
    def names(self) -> list[str]:
        """Names of the files, by number: file names where they differ, else the paths."""
        return self._store.names

    @property
    def source(self) -> list[int]:
        """Per row, the number of the file it came from."""
        return [self._store.source[i] for i in self.order]

    @property
    def lengths(self) -> list[int]:
        """Tokens per row."""
        return [self._store.length(i) for i in self.order]

    @property
    def graded_counts(self) -> list[int]:
        """Tokens per row that the loss counts."""
        return [sum(self._store.row(i)[1][1:]) for i in self.order]

    @property
    def where(self) -> list[str]:
        """Per row, its file:line."""
        return [self._store.where[i] for i in self.order]

    def select(self, indices: Iterable[int]) -> "Rows":
        """The rows at these positions, in this order, without a copy of their tokens."""
        return Rows(self._store, [self.order[i] for i in indices])

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        ids, graded = self._store.row(self.order[index])
        labels = [i if keep else IGNORED for i, keep in zip(ids, graded, strict=True)]
        row: Row = {"input_ids": ids.tolist(), "labels": labels}
        if len(self.names) > 1:
            row["source"] = self.names[self._store.source[self.order[index]]]
        return row


class SFTDataset(Rows):
    """Rows for supervised fine-tuning, with the `report` of how they were made.

    Args:
        records: JSON-like objects in any of the formats; `from_jsonl` reads them from files.
        tok: from `load_tokenizer`.
        template: built-in name, file or Jinja text; None takes the tokenizer's own.
        max_length: tokens a row, at least 2.
        columns: this library's name to the records', {"prompt": "question"}.
        train_on: "assistant", "last" or "all" (see `Grader`).
        seed: of the sample drawn for a fractional weight, and of the order of several files.
        control_text: what to do with content that spells a control token: "drop" the row and
            count it, or "keep" it as that token (for prompts rendered beforehand).

    Raises:
        ValueError: what cannot be read, rendered or graded, with its place; or no row is left.
    """

    def __init__(
        self,
        records: Iterable[Mapping[str, Any]],
        tok: Tokenizer,
        template: str | None = None,
        max_length: int = 2048,
        columns: Mapping[str, str] | None = None,
        train_on: str = "assistant",
        seed: int = 0,
        control_text: str = "drop",
    ) -> None:
        encoder = Encoder(tok, template, train_on, control_text)
        parsed = parse_records(records, columns)
        self._build([("records", parsed, 1.0)], encoder, max_length, seed)

    @classmethod
    def from_jsonl(
        cls,
        path: Source | Sequence[Source],
        tok: Tokenizer,
        template: str | None = None,
        max_length: int = 2048,
        columns: Mapping[str, str] | None = None,
        train_on: str = "assistant",
        seed: int = 0,
        control_text: str = "drop",
        progress: Callable[[Iterable[Record]], Iterable[Record]] | None = None,
    ) -> "SFTDataset":
        """Read, tokenise and grade JSON Lines files.

        Args:
            path: a file, or a list of files or (file, weight) pairs.
            tok: as for the class, and so are the following.
            template: built-in name, file or Jinja text.
            max_length: tokens a row.
            columns: this library's name to the files'.
            train_on: "assistant", "last" or "all".
            seed: of samples and of the mixed order.
            control_text: "drop" or "keep".
            progress: wraps the records of a file (a `tqdm`, for one).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: file:line of what cannot be read, rendered or graded; or no row is left.
        """
        pairs = weighted_files(path)
        watch = progress or (lambda records: records)
        names = short_names([Path(file) for file, _ in pairs])
        sources = [
            (name, watch(read_records(file, columns)), weight)
            for name, (file, weight) in zip(names, pairs, strict=True)
        ]
        dataset = cls.__new__(cls)
        encoder = Encoder(tok, template, train_on, control_text)
        dataset._build(sources, encoder, max_length, seed)
        return dataset

    def _build(
        self,
        sources: list[tuple[str, Iterable[Record], float]],
        encoder: Encoder,
        max_length: int,
        seed: int,
    ) -> None:
        """Fill this object with the rows of (name, records, weight) sources."""
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens; got {max_length}")
        store = _Store([name for name, _, _ in sources])
        self.report = Report(max_length=max_length)
        numbers: list[range] = []  # of each source's rows in the store
        for number, (name, records, weight) in enumerate(sources):
            counts = SourceReport(name=name, weight=weight)
            first = len(store.source)
            for record in records:
                for graded in _fitted(encoder, record, max_length, counts):
                    store.add(graded, number, record.where)
            numbers.append(range(first, len(store.source)))
            self.report.sources.append(counts)
        self.report.notes = encoder.notes()
        if not store.source:
            raise ValueError(f"no row is left to train on. {self.report.why_dropped()}")
        order = mix([len(rows) for rows in numbers], [weight for _, _, weight in sources], seed)
        super().__init__(store, [numbers[s][row] for s, row in order])


class _Store:
    """All rows end to end: ids (4 bytes) and graded flags (1 byte) a token."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.ids = array("i")
        self.graded = bytearray()
        self.ends = array("q", [0])
        self.source = array("i")
        self.where: list[str] = []

    def add(self, row: Graded, source: int, where: str) -> None:
        self.ids.extend(row.ids)
        self.graded.extend(row.graded)
        self.ends.append(len(self.ids))
        self.source.append(source)
        self.where.append(where)

    def length(self, index: int) -> int:
        return self.ends[index + 1] - self.ends[index]

    def row(self, index: int) -> "tuple[array[int], bytearray]":
        span = slice(self.ends[index], self.ends[index + 1])
        return self.ids[span], self.graded[span]


def _fitted(
    encoder: Encoder, record: Record, max_length: int, report: SourceReport
) -> list[Graded]:
    """The rows a record gives (none, one, or the parts of a long text), counted in the report."""
    report.read += 1
    try:
        row = encoder(record)
    except ControlTextError as error:
        report.drop("control token in the content", f"{record.where}: {error}")
        return []
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    report.methods[row.method] += 1
    report.straddles += row.straddles
    report.longest = max(report.longest, len(row.ids))
    if not any(row.graded[1:]):  # the first token has nothing before it to be predicted from
        report.drop("no graded token", record.where)
        return []
    if len(row.ids) <= max_length:
        rows = [row]
    elif isinstance(record, PlainText):
        rows = split_text(row, max_length)
        report.split += 1
    else:
        rows = [truncate(row, max_length, keep_first=row.ids[0] == encoder.tok.bos_id)]
        report.truncated += 1
        report.graded_cut += sum(row.graded[1:]) - sum(rows[0].graded[1:])
    for part in rows:
        report.keep(len(part.ids), sum(part.graded[1:]))
    return rows
