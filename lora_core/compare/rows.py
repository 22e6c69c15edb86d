"""Rows of the table: the records of one variant, its seeds together, and its figures by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_core.compare.results import Record, estimate, over_seeds
from lora_core.compare.variants import METHODS
from lora_core.evaluate.estimate import Estimate

Cell = Estimate | float | str | None


@dataclass
class Row:
    """One variant."""

    name: str
    """method, and what a sweep gave it"""
    method: str
    """key of METHODS"""
    swept: Mapping[str, Any]
    """what a sweep gave it"""
    done: list[Record] = field(default_factory=list)
    """records with figures, one a seed"""
    failed: list[Record] = field(default_factory=list)
    """records without"""

    def over(self, take: Callable[[Record], Estimate | float | None]) -> Estimate | float | None:
        """A figure of all seeds: one seed's with its interval, of more the mean and min–max.

        Args:
            take: a record -> its figure; None where it has none.
        """
        found = [take(record) for record in self.done]
        known = [value for value in found if value is not None]
        return over_seeds(known) if known else None

    def quality(self, name: str) -> Estimate | float | None:
        """A measure of the answers."""
        return self.over(lambda r: _estimate(r["quality"].get(name)))

    def measured(self, name: str) -> Estimate | float | None:
        """loss, perplexity, accuracy or forgetting; None where it was not measured."""
        return self.over(lambda r: _estimate(r.get(name)))

    def number(self, name: str, scale: float = 1.0) -> Estimate | float | None:
        """A plain number of the records, such as train_seconds."""
        return self.over(lambda r: None if r.get(name) is None else r[name] * scale)

    @property
    def share(self) -> float | None:
        """Trained parameters by all, in [0, 1]."""
        return self.done[0]["trainable"] / self.done[0]["parameters"] if self.done else None

    def request_tokens(self) -> float | None:
        """Tokens of a request: its prompt with examples and system text, and virtual tokens."""
        if not self.done:
            return None
        prompts = [_estimate(r["prompt_tokens"]) for r in self.done]
        virtual = self.done[0]["settings"].get("virtual_tokens", 0)
        return sum(p.value for p in prompts if p is not None) / len(prompts) + virtual

    def latency(self, state: str, name: str) -> Estimate | float | None:
        """Milliseconds in a state: base, unmerged or merged; None where there is no such state."""

        def take(record: Record) -> float | None:
            found = record["latency"].get(state)
            return None if found is None else 1000 * found[name]

        return self.over(take)

    def in_use(self, name: str) -> Estimate | float | None:
        """Milliseconds of the variant as it comes out of training, its adapter unmerged."""
        attached = bool(self.done) and "unmerged" in self.done[0]["latency"]
        return self.latency("unmerged" if attached else "base", name)

    @property
    def mergeable(self) -> str | None:
        """Whether its adapter folds into the weights."""
        if not self.done or self.done[0]["mergeable"] is None:
            return None
        return "yes" if self.done[0]["mergeable"] else "no"


def _estimate(facts: Mapping[str, Any] | None) -> Estimate | None:
    return None if facts is None else estimate(facts)


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Records put together by variant, in their order.

    Args:
        records: of one comparison.

    Returns:
        One row a variant, its seeds in it.
    """
    found: dict[str, Row] = {}
    for record in records:
        name = record["name"]
        row = found.setdefault(name, Row(name, record["method"], record["swept"]))
        (row.done if record["status"] == "done" else row.failed).append(record)
    return list(found.values())


def forgetting_cell(row: Row) -> Cell:
    """What was lost on general text; where nothing is trained, nothing can be."""
    if not METHODS[row.method].trains:
        return "0, as untrained" if row.done else None
    return row.measured("forgetting")
