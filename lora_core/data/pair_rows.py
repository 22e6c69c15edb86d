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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_core.data.encoder import Encoder
from lora_core.data.preferences import Prompted, Text, parse_prompted
from lora_core.data.record_rows import RecordRows
from lora_core.data.report import SourceReport

TOO_LONG = "prompt leaves no room for a completion"


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
        return (array("i", ids), record.prompt, record.fields), len(ids)

    def _row(self, position: int) -> PromptRow:
        entry = self._entry(position)
        ids, prompt, fields = entry.held
        return PromptRow(tuple(ids), prompt, fields, entry.where)
