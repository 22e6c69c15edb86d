"""Pairs, rated completions and prompts as token ids.

A pair is rendered and graded as two conversations of supervised fine-tuning (encoder.py), and then
told apart in tokens: the prompt is what both sides begin with before either is graded, at least one
token; the rest is each side's completion, with its graded flags. A token that straddles a prompt's
end and an answer's beginning differs between the sides, and so falls to the completions, ungraded.

Too long: completions are cut from the right, and counted. A prompt is never cut, for it would be
another question: one that leaves no room for a graded token is dropped, counted and named. Dropped
likewise: a pair whose sides grade the same tokens, which prefers nothing.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from lora_core.data.branches import Branched
from lora_core.data.encoder import Encoder
from lora_core.data.grading import Graded
from lora_core.data.preferences import (
    Pair,
    Prompted,
    Rated,
    Text,
    parse_pair,
    parse_prompted,
    parse_rated,
)
from lora_core.data.record_rows import RecordRows
from lora_core.data.records import Chat, Completion
from lora_core.data.report import SourceReport

NO_ROOM = "prompt leaves no room for a completion"
SAME = "chosen and rejected are the same"
UNGRADED = "chosen and rejected differ only in ungraded tokens (does the prompt end in a space?)"


@dataclass(frozen=True)
class PromptRow:
    """A prompt to be answered."""

    ids: tuple[int, ...]
    """what generation goes on from: raw text, or messages with the header of the next turn"""
    prompt: Text
    """as it was written, for the reward"""
    fields: dict[str, Any]
    """the row's further fields, for the reward"""
    where: str = ""
    """its file:line"""
    tools: list[Any] | None = None
    """the tools that the template told of"""


@dataclass(frozen=True)
class PairRow(Branched):
    """A prompt with its (chosen, rejected) completions."""

    margin: float | None = None
    """how much better the chosen one is, where the data say so"""


@dataclass(frozen=True)
class RatedRow(Branched):
    """A prompt with (its completion, another prompt's completion)."""

    label: bool = True
    """whether its completion is good"""


class Side(NamedTuple):
    """A completion as it is held: ids of 4 bytes, flags of one."""

    ids: "array[int]"
    graded: bytes


class PairRows(RecordRows[PairRow, Pair]):
    """Pairs; `max_length` is that of a prompt with either of its completions."""

    what = "pair"

    @staticmethod
    def _parse(row: Mapping[str, Any], where: str) -> Pair:
        return parse_pair(row, where)

    def _hold(self, record: Pair, encoder: Encoder, counts: SourceReport) -> tuple[Any, int] | None:
        texts = {"chosen": record.chosen, "rejected": record.rejected}
        sides = [_graded(encoder, record, text, counts) for text in texts.values()]
        for key, side in zip(texts, sides, strict=True):
            if not any(side.graded[1:]):
                counts.drop(f"no graded token in {key}", record.where)
                return None
        prompt, completions = _told_apart(sides)
        if len(prompt) >= self.max_length:
            counts.drop(NO_ROOM, record.where)
            return None
        if _told(completions[0]) == _told(completions[1]):
            alike = completions[0].ids == completions[1].ids
            counts.drop(SAME if alike else UNGRADED, record.where)
            return None
        cut = [_cut(side, self.max_length - len(prompt)) for side in completions]
        if not all(any(side.graded) for side in cut):
            counts.drop(NO_ROOM, record.where)
            return None
        if _told(cut[0]) == _told(cut[1]):
            counts.drop(f"{SAME} in the first {self.max_length} tokens", record.where)
            return None
        _count(counts, prompt, completions, cut)
        return (prompt, cut, record.margin), len(prompt) + max(len(side.ids) for side in cut)

    def _row(self, position: int) -> PairRow:
        entry = self._entry(position)
        prompt, sides, margin = entry.held
        return PairRow(tuple(prompt), *_tuples(sides), entry.where, margin)

    @property
    def margins(self) -> list[float | None]:
        """Per row, its margin."""
        return [self._entries[i].held[2] for i in self.order]


class RatedRows(RecordRows[RatedRow, Rated]):
    """Rated completions, each beside one that answers another prompt.

    What the policy gains over the reference anyway is estimated on prompts with completions that
    are not theirs (losses/kto.py). Which one goes with a row is a function of the data (the next
    in the files with another prompt), so that the reference can be asked beforehand, a batch may
    hold any rows, and a resumed run sees what the first one would have seen.
    """

    what = "rated completion"
    _others: "array[int]"
    """per entry, the one whose completion goes with it"""

    @staticmethod
    def _parse(row: Mapping[str, Any], where: str) -> Rated:
        return parse_rated(row, where)

    def _hold(
        self, record: Rated, encoder: Encoder, counts: SourceReport
    ) -> tuple[Any, int] | None:
        graded = _graded(encoder, record, record.completion, counts)
        if not any(graded.graded[1:]):
            counts.drop("no graded token in completion", record.where)
            return None
        prompt, whole = _told_apart([graded])
        cut = _cut(whole[0], self.max_length - len(prompt))
        if not any(cut.graded):
            counts.drop(NO_ROOM, record.where)
            return None
        _count(counts, prompt, whole, [cut])
        return (prompt, cut, record.label), len(prompt) + len(cut.ids)

    def _built(self) -> None:
        keys = [entry.prompt for entry in self._entries]
        if len(set(keys)) < 2:
            raise ValueError(
                f"all {len(keys)} rows have one prompt: how far the policy has moved is measured "
                "on completions of other prompts; give two different ones at least"
            )
        self._others = array("q", _next_other(keys))

    def _row(self, position: int) -> RatedRow:
        entry = self._entry(position)
        prompt, own, label = entry.held
        other = self._entries[self._others[self.order[position]]].held[1]
        sides = [own, _cut(other, max(self.max_length - len(prompt), 1))]
        return RatedRow(tuple(prompt), *_tuples(sides), entry.where, label)

    @property
    def labels(self) -> list[bool]:
        """Per row, whether its completion is good."""
        return [self._entries[i].held[2] for i in self.order]


class PromptRows(RecordRows[PromptRow, Prompted]):
    """Prompts; those of more than `max_length` tokens are dropped, counted and named."""

    what = "prompt"

    @staticmethod
    def _parse(row: Mapping[str, Any], where: str) -> Prompted:
        return parse_prompted(row, where)

    def _hold(
        self, record: Prompted, encoder: Encoder, counts: SourceReport
    ) -> tuple[Any, int] | None:
        ids = encoder.prompt(record.prompt, record.tools)
        counts.longest = max(counts.longest, len(ids))
        if len(ids) > self.max_length:
            counts.drop(f"prompt of more than {self.max_length} tokens", record.where)
            return None
        counts.keep(len(ids), 0)
        return (array("i", ids), record.prompt, record.fields, record.tools), len(ids)

    def _row(self, position: int) -> PromptRow:
        entry = self._entry(position)
        ids, prompt, fields, tools = entry.held
        return PromptRow(tuple(ids), prompt, fields, entry.where, tools)


# --- sides in tokens ---


def _graded(
    encoder: Encoder, record: Pair | Rated, completion: Text, counts: SourceReport
) -> Graded:
    """A prompt with a completion, as supervised fine-tuning would have them."""
    if isinstance(record.prompt, str):
        assert isinstance(completion, str)  # texts follow texts
        row = encoder(Completion(record.where, record.prompt, completion))
    else:
        row = encoder(Chat(record.where, [*record.prompt, *completion], record.tools))
    counts.methods[row.method] += 1
    counts.straddles += row.straddles
    counts.longest = max(counts.longest, len(row.ids))
    return row


def _told_apart(rows: Sequence[Graded]) -> "tuple[array[int], list[Side]]":
    """The ungraded tokens that all begin with, one at least, and what follows in each."""
    columns = zip(*(zip(row.ids, row.graded, strict=True) for row in rows), strict=False)
    alike = takewhile(lambda each: len(set(each)) == 1 and not each[0][1], columns)
    # the very first token is never predicted, so that it is prompt whatever its flag
    length = sum(1 for _ in alike) or int(len({row.ids[0] for row in rows}) == 1)
    if not length:
        raise ValueError(
            "the prompt has no token, and the tokenizer puts none before a text: the first token "
            "of an answer is predicted from nothing; give a prompt"
        )
    sides = [Side(array("i", row.ids[length:]), bytes(row.graded[length:])) for row in rows]
    return array("i", rows[0].ids[:length]), sides


def _cut(side: Side, room: int) -> Side:
    room = max(room, 0)
    return Side(side.ids[:room], side.graded[:room])


def _told(side: Side) -> list[int]:
    """The tokens that are graded: what the side says."""
    return [token for token, graded in zip(side.ids, side.graded, strict=True) if graded]


def _count(
    counts: SourceReport, prompt: Sequence[int], whole: Sequence[Side], cut: Sequence[Side]
) -> None:
    lost = sum(sum(side.graded) for side in whole) - sum(sum(side.graded) for side in cut)
    counts.truncated += any(len(a.ids) > len(b.ids) for a, b in zip(whole, cut, strict=True))
    counts.graded_cut += lost
    counts.keep(
        len(prompt) + sum(len(side.ids) for side in cut), sum(sum(side.graded) for side in cut)
    )


def _tuples(
    sides: Sequence[Side],
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[bool, ...], ...]]:
    return tuple(tuple(s.ids) for s in sides), tuple(tuple(map(bool, s.graded)) for s in sides)


def _next_other(keys: Sequence[bytes]) -> list[int]:
    """For each position the next one, round the end, with another key; two keys at least."""
    count = len(keys)
    found = [0] * count
    # backwards, twice round: a position whose neighbour is alike has its neighbour's answer
    for position in range(2 * count - 1, -1, -1):
        here, after = position % count, (position + 1) % count
        found[here] = after if keys[after] != keys[here] else found[after]
    return found
