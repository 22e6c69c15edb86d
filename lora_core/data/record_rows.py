"""Rows of preferences and prompts: files in, a view of tokenised rows out, and a report.

What pairs, rated completions and prompts share, and share with supervised rows: files are mixed by
weight, records that spell a control token are dropped and counted, everything that is left out is
counted by reason with its first places, and `split` is a function of the seed. One rule is stricter
than for supervised rows: rows of the same *prompt* stay on one side, since a pair held out tells
nothing of generalisation where another pair of its prompt was trained on.

A subclass says how a line is read, how a record is tokenised, and what a row is. Tokens are held as
arrays of 4 bytes; a view (`select`, `split`, a slice) is an order over the same entries.
"""

import copy
import json
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

from lora_core.data.batch import split_positions
from lora_core.data.control_text import ControlTextError
from lora_core.data.encoder import Encoder
from lora_core.data.lines import read_rows
from lora_core.data.mixing import Source, mix, short_names, weighted_files
from lora_core.data.records import Record, rename_columns
from lora_core.data.report import Report, SourceReport
from lora_core.data.tokenizer import Tokenizer

Row = TypeVar("Row")
Kind = TypeVar("Kind", bound=Record)


@dataclass(frozen=True)
class Entry:
    """A tokenised record as it is held."""

    where: str
    source: int
    """number of the file it came from"""
    prompt: bytes
    """digest of the prompt as it was written"""
    held: Any
    """what the subclass makes rows of"""
    length: int
    """tokens"""


class RecordRows(Sequence[Row], Generic[Row, Kind]):
    """Rows of JSON-like objects, with the `report` of how they were made.

    Args:
        records: the objects; `from_jsonl` reads them from files.
        tok: from `load_tokenizer`.
        template: built-in name, file or Jinja text; None takes the tokenizer's own.
        max_length: tokens of a row, at least 2.
        columns: this library's name to the records', {"prompt": "question"}.
        train_on: "assistant" or "last": which of a completion's turns are graded.
        seed: of the sample drawn for a fractional weight, and of the order of several files.
        control_text: what to do with content that spells a control token: "drop" the row and
            count it, or "keep" it as that token.

    Raises:
        ValueError: what cannot be read, rendered or graded, with its place; or no row is left.
    """

    what: ClassVar[str]
    """of the rows, in messages"""

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
        rows = ((f"records[{number}]", dict(row)) for number, row in enumerate(records))
        encoder = _encoder(tok, template, train_on, control_text)
        self._build([("records", rows, 1.0)], columns or {}, encoder, max_length, seed)

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
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    ) -> Self:
        """Read and tokenise JSON Lines files.

        Args:
            path: a file, or a list of files or (file, weight) pairs.
            tok: as for the class, and so are the following.
            template: built-in name, file or Jinja text.
            max_length: tokens of a row.
            columns: this library's name to the files'.
            train_on: "assistant" or "last".
            seed: of samples and of the mixed order.
            control_text: "drop" or "keep".
            progress: wraps the lines of a file (a `tqdm`, for one).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: file:line of what cannot be read, rendered or graded; or no row is left.
        """
        pairs = weighted_files(path)
        watch = progress or (lambda rows: rows)
        names = short_names([Path(file) for file, _ in pairs])
        sources = [
            (name, watch(read_rows(file)), weight)
            for name, (file, weight) in zip(names, pairs, strict=True)
        ]
        made = cls.__new__(cls)
        encoder = _encoder(tok, template, train_on, control_text)
        made._build(sources, columns or {}, encoder, max_length, seed)
        return made

    # --- what a subclass says ---

    @staticmethod
    @abstractmethod
    def _parse(row: Mapping[str, Any], where: str) -> Kind:
        """A line's object as a record; ValueError with its place."""

    @abstractmethod
    def _hold(self, record: Kind, encoder: Encoder, counts: SourceReport) -> tuple[Any, int] | None:
        """What is kept of a record, and its tokens; None where it was dropped, and counted."""

    @abstractmethod
    def _row(self, position: int) -> Row:
        """The row at a position, not negative."""

    def _built(self) -> None:
        """Called once all records are there: what depends on a row's neighbours."""

    # --- making ---

    def _build(
        self,
        sources: list[tuple[str, Iterable[tuple[str, dict[str, Any]]], float]],
        columns: Mapping[str, str],
        encoder: Encoder,
        max_length: int,
        seed: int,
    ) -> None:
        """Fill this object with the rows of (name, lines, weight) sources."""
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens; got {max_length}")
        self.max_length = max_length
        self.report = Report(max_length=max_length)
        self._entries: list[Entry] = []
        numbers: list[range] = []  # of each source's entries
        for number, (name, lines, weight) in enumerate(sources):
            counts = SourceReport(name=name, weight=weight)
            first = len(self._entries)
            for where, row in lines:
                record = self._parse(rename_columns(row, columns, where), where)
                self._take(record, encoder, counts, number)
            numbers.append(range(first, len(self._entries)))
            self.report.sources.append(counts)
        self.report.notes = encoder.notes()
        if not self._entries:
            raise ValueError(f"no {self.what} is left to train on. {self.report.why_dropped()}")
        weights = [weight for _, _, weight in sources]
        order = mix([len(entries) for entries in numbers], weights, seed)
        self.order = array("q", [numbers[source][row] for source, row in order])
        self._built()

    def _take(self, record: Kind, encoder: Encoder, counts: SourceReport, source: int) -> None:
        """Tokenise a record and keep it, or count it as dropped."""
        counts.read += 1
        try:
            made = self._hold(record, encoder, counts)
        except ControlTextError as error:
            counts.drop("control token in the content", f"{record.where}: {error}")
            return
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        if made is not None:
            held, length = made
            key = digest((record.prompt, record.tools))  # type: ignore[attr-defined]  # all have
            self._entries.append(Entry(record.where, source, key, held, length))

    # --- a view ---

    def _entry(self, position: int) -> Entry:
        return self._entries[self.order[position]]

    @property
    def names(self) -> list[str]:
        """Names of the files, by number: file names where they differ, else the paths."""
        return [source.name for source in self.report.sources]

    @property
    def source(self) -> list[int]:
        """Per row, the number of the file it came from."""
        return [self._entries[i].source for i in self.order]

    @property
    def lengths(self) -> list[int]:
        """Tokens per row: the prompt and, where there are several completions, the longest."""
        return [self._entries[i].length for i in self.order]

    @property
    def where(self) -> list[str]:
        """Per row, its file:line."""
        return [self._entries[i].where for i in self.order]

    @property
    def prompts(self) -> int:
        """How many different prompts the rows have."""
        return len({self._entries[i].prompt for i in self.order})

    def select(self, indices: Iterable[int]) -> Self:
        """The rows at these positions, in this order, without a copy of their tokens."""
        view = copy.copy(self)
        view.order = array("q", [self.order[i] for i in indices])
        return view

    def split(self, fraction: float, seed: int = 0) -> tuple[Self, Self]:
        """A seeded split into (train, eval); rows of one prompt always stay on one side.

        Raises:
            ValueError: the fraction is out of range, or all rows have one prompt.
        """
        keys = [self._entries[i].prompt for i in self.order]
        train, held_out = split_positions(keys, fraction, seed)
        return self.select(train), self.select(held_out)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Row]:
        return (self._row(position) for position in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> "Row | Self":
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._row(range(len(self))[index])


def digest(value: Any) -> bytes:
    """A short fingerprint of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return blake2b(text.encode(), digest_size=12).digest()


def _encoder(tok: Tokenizer, template: str | None, train_on: str, control_text: str) -> Encoder:
    if train_on == "all":
        raise ValueError(
            "train_on all grades the prompt, which is the same on both sides and is not judged: "
            "choose assistant or last"
        )
    return Encoder(tok, template, train_on, control_text)
