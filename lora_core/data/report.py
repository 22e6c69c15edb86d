"""Counts of what became of the records of each data file."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES = 3  # places named per reason for dropping a row


@dataclass
class SourceReport:
    """What became of one file's records; the file itself, before its weight multiplies it."""

    name: str
    weight: float = 1.0
    read: int = 0
    """Records read."""
    kept: int = 0
    """Rows made (a text that was split gives several)."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first places (file:line) of each reason."""
    truncated: int = 0
    """Rows cut to the maximal length."""
    graded_cut: int = 0
    """Graded tokens lost by that."""
    longest: int = 0
    """Tokens of the longest record, before it was cut or split."""
    split: int = 0
    """Plain texts split into several rows."""
    straddles: int = 0
    """Tokens that start in a header and reach into a graded part; they are not graded."""
    tokens: int = 0
    graded: int = 0
    """Tokens the loss counts (a row's first token is never predicted, so never counted)."""
    methods: Counter[str] = field(default_factory=Counter)
    """Records by how their graded part was found."""

    def drop(self, reason: str, where: str) -> None:
        """Count a record left out."""
        self.dropped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(where)

    def keep(self, tokens: int, graded: int) -> None:
        """Count a row."""
        self.kept += 1
        self.tokens += tokens
        self.graded += graded

    def __add__(self, other: "SourceReport") -> "SourceReport":
        return SourceReport(
            name="total",
            read=self.read + other.read,
            kept=self.kept + other.kept,
            dropped=self.dropped + other.dropped,
            examples={
                reason: (self.examples.get(reason, []) + other.examples.get(reason, []))[:_EXAMPLES]
                for reason in {**self.examples, **other.examples}
            },
            truncated=self.truncated + other.truncated,
            graded_cut=self.graded_cut + other.graded_cut,
            longest=max(self.longest, other.longest),
            split=self.split + other.split,
            straddles=self.straddles + other.straddles,
            tokens=self.tokens + other.tokens,
            graded=self.graded + other.graded,
            methods=self.methods + other.methods,
        )

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON types."""
        return {**vars(self), "dropped": dict(self.dropped), "methods": dict(self.methods)}


@dataclass
class Report:
    """Counts per file (`sources`) and over all of them (`total`)."""

    max_length: int
    sources: list[SourceReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> SourceReport:
        """The counts of all files together."""
        return sum(self.sources, start=SourceReport("total"))

    def why_dropped(self) -> str:
        """One line: the reasons for leaving records out, their counts and the first places."""
        total = self.total
        reasons = [
            f"{count} x {reason} ({'; '.join(total.examples[reason])})"
            for reason, count in total.dropped.most_common()
        ]
        return f"Left out: {', '.join(reasons)}" if reasons else "Nothing was left out."

    def as_dict(self) -> dict[str, Any]:
        """The counts as plain JSON types."""
        return {
            "max_length": self.max_length,
            "sources": [source.as_dict() for source in self.sources],
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [
            f"{source.name}: {source.read} records, {source.kept} rows, {source.tokens} tokens, "
            f"{source.graded} graded ({source.graded / max(source.tokens, 1):.0%})"
            for source in self.sources
        ]
        total = self.total
        if total.truncated:
            lines.append(
                f"{total.truncated} rows cut to {self.max_length} tokens "
                f"({total.graded_cut} graded tokens lost); the longest has {total.longest}"
            )
        if total.split:
            lines.append(f"{total.split} texts split into rows of {self.max_length} tokens")
        if total.straddles:
            lines.append(f"{total.straddles} tokens straddle header and answer: not graded")
        if total.dropped:
            lines.append(self.why_dropped())
        return "\n".join(lines + self.notes)
