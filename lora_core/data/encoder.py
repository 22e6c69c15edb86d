"""One record as token ids, and which of them are graded; one prompt as the ids to go on from.

Every kind of row comes through here, so that what a preference or a reward is about is tokenised
and graded as the same conversation is in supervised fine-tuning: conversations by `Grader`, a text
after a text by where its characters start, with the tokenizer's end token after it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.data.control_text import check_control_text, control_pattern
from lora_core.data.grading import Graded, Grader
from lora_core.data.offsets import grade_offsets
from lora_core.data.records import Chat, Completion, PlainText, Record, Tokens
from lora_core.data.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not graded


class Encoder:
    """Turns one record of any kind into graded tokens.

    Args:
        tok: the tokenizer.
        template: as `Grader`'s; None: the tokenizer's own, asked for by the first conversation.
        train_on: as `Grader`'s.
        control_text: "drop" (a record that spells a control token raises `ControlTextError`, and
            the caller counts it) or "keep".

    Raises:
        ValueError: a setting that is none of these; a template that does not fit.
    """

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
        """Ids of a record and which of them are graded.

        Raises:
            ControlTextError: see `control_text`.
            ValueError: what cannot be rendered or graded.
        """
        match record:
            case Chat():
                return self._chat_grader()(record.messages, record.tools)
            case Completion():
                return self._completion(record)
            case PlainText():
                self._check(record.text, "text")
                ids = self.tok.with_prefix(self.tok.encode(record.text))
                return Graded(*self._ended(ids, [True] * len(ids)))
            case Tokens():
                return self._tokens(record)
        raise TypeError(f"no row can be made of a {type(record).__name__}")

    def prompt(
        self, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Ids to generate from, the same that a graded row of this prompt begins with.

        Raises:
            ControlTextError: see `control_text`.
            ValueError: the template refuses the messages, or nothing is left to go on from.
        """
        if isinstance(prompt, str):
            self._check(prompt, "prompt")
            ids = self.tok.with_prefix(self.tok.encode(prompt))
        else:
            ids = self._chat_grader().prompt(prompt, tools)
        if not ids:
            raise ValueError("the prompt has no token; there is nothing to go on from")
        return ids

    def _chat_grader(self) -> Grader:
        if self._grader is None:
            self._grader = Grader(self.tok, *self._settings)
        return self._grader

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
