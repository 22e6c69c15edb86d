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

from lora_core.data.control_text import ControlTextError, check_control_text, control_pattern
from lora_core.data.fit import split_text, truncate
from lora_core.data.grading import Graded, Grader
from lora_core.data.mixing import mix
from lora_core.data.offsets import grade_offsets
from lora_core.data.records import (
    Chat,
    Completion,
    PlainText,
    Record,
    Tokens,
    parse_records,
    read_records,
)
from lora_core.data.report import Report, SourceReport
from lora_core.data.tokenizer import Tokenizer

Row = dict[str, Any]  # "input_ids", "labels": list[int]; "source": str, if there are several
Source = str | Path | tuple[str | Path, float]
IGNORED = -100  # the label of a token that is not graded


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
        encoder = _Encoder(tok, template, train_on, control_text)
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
        pairs = _sources(path)
        watch = progress or (lambda records: records)
        names = _short_names([Path(file) for file, _ in pairs])
        sources = [
            (name, watch(read_records(file, columns)), weight)
            for name, (file, weight) in zip(names, pairs, strict=True)
        ]
        dataset = cls.__new__(cls)
        encoder = _Encoder(tok, template, train_on, control_text)
        dataset._build(sources, encoder, max_length, seed)
        return dataset

    def _build(
        self,
        sources: list[tuple[str, Iterable[Record], float]],
        encoder: "_Encoder",
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


class _Encoder:
    """Turns one record of any kind into graded tokens."""

    def __init__(
        self, tok: Tokenizer, template: str | None, train_on: str, control_text: str
    ) -> None:
        if control_text not in ("drop", "keep"):
            raise ValueError(f"control_text must be drop or keep; got {control_text!r}")
        self.tok = tok
        self._settings = (template, train_on, "keep" if control_text == "keep" else "refuse")
        self._control = None if control_text == "keep" else control_pattern(tok)
        # made at once if asked for, so that a wrong template is reported for any data
        self._grader = Grader(tok, *self._settings) if template is not None else None
        self._train_on = train_on

    def __call__(self, record: Record) -> Graded:
        match record:
            case Chat():
                if self._grader is None:
                    self._grader = Grader(self.tok, *self._settings)
                return self._grader(record.messages, record.tools)
            case Completion():
                return self._completion(record)
            case PlainText():
                self._check(record.text, "text")
                ids = self.tok.with_prefix(self.tok.encode(record.text))
                return Graded(*self._ended(ids, [True] * len(ids)))
            case Tokens():
                return self._tokens(record)
        raise TypeError(f"no row can be made of a {type(record).__name__}")

    def _completion(self, record: Completion) -> Graded:
        """prompt + completion tokenised together; tokens that start in the completion graded."""
        self._check(record.prompt, "prompt")
        self._check(record.completion, "completion")
        text = record.prompt + record.completion
        ids, offsets = self.tok.encode_with_offsets(text)
        start = 0 if self._train_on == "all" else len(record.prompt)
        graded, straddles = grade_offsets(offsets, [(start, len(text))])
        whole = self.tok.with_prefix(ids)
        graded = [False] * (len(whole) - len(ids)) + graded
        return Graded(*self._ended(whole, graded), straddles=straddles)

    def _ended(self, ids: list[int], graded: list[bool]) -> tuple[list[int], list[bool]]:
        """The tokenizer's end token after the text, graded, unless it is there already."""
        if self.tok.eos_id is None:
            raise ValueError(
                "the tokenizer names no eos_token, so that the text has no end; name one in "
                "tokenizer_config.json"
            )
        if ids and ids[-1] == self.tok.eos_id:
            return ids, graded
        return [*ids, self.tok.eos_id], [*graded, True]

    def _tokens(self, record: Tokens) -> Graded:
        size = self.tok.vocab_size
        for index, token in enumerate(record.input_ids):
            if not 0 <= token < size:
                raise ValueError(f"input_ids[{index}] is {token}; the tokenizer has {size} ids")
        labels = record.labels if record.labels is not None else record.input_ids
        return Graded(list(record.input_ids), [label != IGNORED for label in labels])

    def _check(self, text: str, key: str) -> None:
        if self._control is not None:
            check_control_text(text, self._control, key)

    def notes(self) -> list[str]:
        """What a reader of the report should know about the template."""
        if self._grader is not None and "strftime_now" in self._grader.template:
            return ["the template writes today's date: rows differ from day to day"]
        return []


def _fitted(
    encoder: _Encoder, record: Record, max_length: int, report: SourceReport
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


def _short_names(files: list[Path]) -> list[str]:
    """File names if they tell the files apart, else the whole paths, numbered if need be."""
    for names in ([file.name for file in files], [str(file) for file in files]):
        if len(set(names)) == len(names):
            return names
    return [f"{file}#{number}" for number, file in enumerate(files)]


def _sources(path: Source | Sequence[Source]) -> list[tuple[str | Path, float]]:
    """(file, weight) pairs of a file, a pair, or a list of either."""
    if isinstance(path, str | Path):
        return [(path, 1.0)]
    if isinstance(path, tuple) and len(path) == 2 and isinstance(path[1], int | float):
        return [(path[0], float(path[1]))]
    pairs = [(one, 1.0) if isinstance(one, str | Path) else one for one in path]
    if not pairs:
        raise ValueError("no data file given")
    return [(file, float(weight)) for file, weight in pairs]
