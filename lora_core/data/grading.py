"""Which tokens of a conversation are graded.

What it does: `Grader(tok, template)(messages)` renders a conversation once, tokenises the text once
and says for every token whether the model is graded on it: the assistant's text and the token that
ends its turn, never a header, never another role.

How the assistant's characters are found, in this order:

1. marks: the template has `{% generation %}` blocks (a header at a block's start and white space
   after its end token, as SmolLM3's blocks have, are cut off);
2. family: a built-in marked template renders the very same text for this conversation;
3. difference: for each graded turn the text up to its header and up to its end are rendered, and
   each must be a prefix of the next longer one and of the whole, else the conversation is refused;
   so is a template whose generation prompt leaves out the header that it writes before an answer.
   The turn then ends at its first stop token (what the template writes after it is not graded).

A token is graded if and only if its first character lies in such a span. A token that starts in a
header and reaches into the answer is not graded and is counted (`straddles`).

Left out of this: a template that drops what it has no form for. transformers renders such
conversations; here a graded tool call that does not appear in the text is an error.

How it differs from the usual ways: no search for header token ids (they tokenise differently in
context), no length of a separately tokenised prompt (the last token may merge with the answer), no
fallback to grading everything. The trade-off: templates that rewrite earlier turns (Qwen3 removes
past reasoning) are refused beyond the last turn, unless the template has marks.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.data.chat import (
    BUILTIN_TEMPLATES,
    Messages,
    Span,
    builtin_template,
    has_marks,
    load_template,
    render_chat,
    render_spans,
)
from lora_core.data.control_text import any_of, check_control_text, control_pattern, strings_of
from lora_core.data.offsets import grade_offsets
from lora_core.data.tokenizer import Tokenizer
from lora_core.data.vocabulary import template_fit

TRAIN_ON = ("assistant", "last", "all")


@dataclass(frozen=True)
class Graded:
    """One tokenised text: `ids` and `graded` have a token each; `straddles` is a count."""

    ids: list[int]
    graded: list[bool]
    straddles: int = 0
    method: str = "text"


class Grader:
    """Tokenises conversations and grades their tokens.

    Args:
        tok: the tokenizer; its own chat template is used when `template` is None.
        template: a built-in name, a file, or Jinja text.
        train_on: "assistant" (every assistant turn whose message does not say `train: false`),
            "last" (only the last one of these), or "all" (the whole text, headers included).
        control_text: "refuse" content that spells a control token (raises `ControlTextError`), or
            "keep" it, so that it becomes that token.

    Raises:
        ValueError: no template; a marker the template always writes is not one token.
    """

    def __init__(
        self,
        tok: Tokenizer,
        template: str | None = None,
        train_on: str = "assistant",
        control_text: str = "refuse",
    ) -> None:
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}; got {train_on!r}")
        if control_text not in ("refuse", "keep"):
            raise ValueError(f"control_text must be refuse or keep; got {control_text!r}")
        chosen = load_template(template) if template is not None else tok.chat_template
        if chosen is None:
            raise ValueError(
                "the tokenizer has no chat template; pass template= "
                f"({', '.join(BUILTIN_TEMPLATES)}, a file or Jinja text)"
            )
        self.tok = tok
        with_tools = tok.template_for([])
        self._with_tools: Grader | None = None
        if template is None and with_tools is not None and with_tools != chosen:
            self._with_tools = Grader(tok, with_tools, train_on, control_text)
        self.template = chosen
        self.train_on = train_on
        self.control_text = control_text
        ends = {*tok.eos_ids, tok.end_of_turn_id(chosen)}
        self.stop_ids = {index for index in ends if index is not None}
        known, self._missing = template_fit(tok, chosen)
        # a template's marker forges turns, declared special or not
        self._control = control_pattern(tok, known)
        stops = (tok.control_tokens.get(i) or tok.decode([i]) for i in self.stop_ids)
        self._stop = any_of(filter(None, stops))
        self._family: str | None = None

    def __call__(self, messages: Messages, tools: Sequence[Any] | None = None) -> Graded:
        """Token ids of a conversation and which of them are graded.

        Raises:
            ControlTextError: see `control_text`.
            ValueError: the template refuses the conversation, its spans cannot be told, a marker
                is not one token, BOS stands twice, or a graded turn holds no stop token.
        """
        if tools is not None and self._with_tools is not None:
            return self._with_tools(messages, tools)
        if self.control_text == "refuse":
            self._refuse_control_text(messages, tools)
        # `train` is an instruction to this library, not a part of the conversation
        chat = [{k: v for k, v in message.items() if k != "train"} for message in messages]
        wanted = self._wanted(messages)
        text, spans, method = self._spans(chat, wanted, tools)
        self._check_markers(text)
        self._check_calls(chat, wanted, text, spans)
        ids, offsets = self.tok.encode_with_offsets(text)
        self._check_bos(ids)
        graded, straddles = grade_offsets(offsets, spans)
        if self.train_on != "all":
            self._check_stops(ids, offsets, spans)
        return Graded(ids, graded, straddles, method)

    def prompt(self, messages: Messages, tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a conversation that ends with the header of the turn to be written.

        Raises:
            ControlTextError: see `control_text`.
            ValueError: as for a whole conversation, as far as it goes.
        """
        if tools is not None and self._with_tools is not None:
            return self._with_tools.prompt(messages, tools)
        if self.control_text == "refuse":
            self._refuse_control_text(messages, tools)
        chat = [{k: v for k, v in message.items() if k != "train"} for message in messages]
        text = self._render(chat, tools, add_generation_prompt=True)
        self._check_markers(text)
        ids = self.tok.encode(text)
        self._check_bos(ids)
        return ids

    # --- spans ---

    def _wanted(self, messages: Messages) -> list[int]:
        """Positions of the messages that are to be graded."""
        turns = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("train", True)
        ]
        return turns[-1:] if self.train_on == "last" else turns

    def _spans(
        self, chat: Messages, wanted: list[int], tools: Sequence[Any] | None
    ) -> tuple[str, list[Span], str]:
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        if self.train_on == "all" and wanted == turns:
            text = self._render(chat, tools)
            return text, [(0, len(text))], "all"
        if self.train_on == "all":
            raise ValueError("train_on='all' grades every message; remove the `train: false` marks")
        if has_marks(self.template):
            text, spans = self._marked(self.template, chat, tools)
            spans = self._without_headers(text, spans, chat, tools)
            return text, self._pick(spans, turns, wanted), "marks"
        text = self._render(chat, tools)
        known = self._family_spans(chat, text, tools)
        if known is not None:
            return text, self._pick(known, turns, wanted), f"family {self._family}"
        return text, self._difference_spans(chat, wanted, text, tools), "difference"

    def _pick(self, spans: list[Span], turns: list[int], wanted: list[int]) -> list[Span]:
        if wanted == turns:
            return spans
        if len(spans) != len(turns):
            raise ValueError(
                f"the template marks {len(spans)} spans for {len(turns)} assistant turns, so that "
                "single turns cannot be told apart; use one {% generation %} block a turn"
            )
        return [span for span, turn in zip(spans, turns, strict=True) if turn in wanted]

    def _family_spans(
        self, chat: Messages, text: str, tools: Sequence[Any] | None
    ) -> list[Span] | None:
        """Spans of a built-in template that renders exactly `text`; the last match comes first."""
        names = sorted(BUILTIN_TEMPLATES, key=lambda name: name != self._family)
        for name in names:
            try:
                same, spans = self._marked(builtin_template(name), chat, tools)
            except ValueError:  # this family has no form for the conversation
                continue
            if same == text:
                self._family = name
                return spans
        return None

    def _difference_spans(
        self, chat: Messages, wanted: list[int], text: str, tools: Sequence[Any] | None
    ) -> list[Span]:
        spans = []
        for turn in wanted:
            try:
                before = self._render(chat[:turn], tools, add_generation_prompt=True)
                after = self._render(chat[: turn + 1], tools)
            except ValueError as error:
                raise ValueError(
                    f"message {turn} cannot be told from the rest: {error}; {_MARK_IT}"
                ) from None
            end = self._end_of_turn(after, len(before))
            if not (after.startswith(before) and text.startswith(after[:end])):
                raise ValueError(
                    f"the template writes the text up to message {turn} differently when more "
                    f"messages follow, so its graded part cannot be told; "
                    f"{_MARKS if turn == len(chat) - 1 else _MARK_IT}"
                )
            if not self._prompts(chat[:turn], before, tools):
                raise ValueError(
                    f"the template writes a header before message {turn}, but not as the "
                    f"generation prompt, so it cannot be told from the answer; {_MARKS}"
                )
            spans.append((len(before), end))
        return spans

    def _prompts(self, chat: Messages, before: str, tools: Sequence[Any] | None) -> bool:
        """Whether an answer follows directly on `before`, the text of `chat` and its prompt."""
        if before != self._render(chat, tools):
            return True  # a header, and what else the model writes is graded (<think>)
        probe = self._render([*chat, {"role": "assistant", "content": "x"}], tools)
        return probe[len(before) :].lstrip().startswith("x")

    def _end_of_turn(self, text: str, start: int) -> int:
        """End of the first stop token; of the last control token where content may hold stops."""
        stop = None if self.control_text == "keep" else self._stop.search(text, start)
        return self._last_control(text, start) if stop is None else stop.end()

    def _last_control(self, text: str, start: int) -> int:
        """End of the last control token, if only white space follows it; else of the text."""
        ends = [match.end() for match in self._control.finditer(text, start)]
        return ends[-1] if ends and not text[ends[-1] :].strip() else len(text)

    def _without_headers(
        self, text: str, spans: list[Span], chat: Messages, tools: Sequence[Any] | None
    ) -> list[Span]:
        """Marked spans without a turn's header before and white space after them."""
        spans = [(start, self._last_control(text[:end], start)) for start, end in spans]
        if not any(self._control.match(text, start) for start, _ in spans):
            return spans
        plain, prompt = (self._render(chat, tools, add) for add in (False, True))
        header = prompt[len(plain) :] if prompt.startswith(plain) else ""
        opening = self._control.match(header)
        cut = []
        for start, end in spans:
            found = text.startswith(header, start, end)
            if not found and opening and text.startswith(opening.group(), start, end):
                raise ValueError(
                    f"a {{% generation %}} block starts with the header {opening.group()!r} that "
                    "the generation prompt writes; mark the assistant's text alone"
                )
            cut.append((start + len(header) if found else start, end))
        return cut

    def _render(
        self, chat: Messages, tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        return render_chat(
            self.template,
            chat,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables=self.tok.special_tokens,
        )

    def _marked(
        self, template: str, chat: Messages, tools: Sequence[Any] | None
    ) -> tuple[str, list[Span]]:
        return render_spans(template, chat, tools=tools, variables=self.tok.special_tokens)

    # --- guards ---

    def _refuse_control_text(self, messages: Messages, tools: Sequence[Any] | None) -> None:
        for key, text in strings_of({"messages": list(messages), "tools": list(tools or ())}):
            check_control_text(text, self._control, key)

    def _check_markers(self, text: str) -> None:
        missing = sorted(marker for marker in self._missing if marker in text)
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(
                f"the template writes {names}, not one token each in this tokenizer; add them with "
                f"--add-tokens '{','.join(missing)}' (tok.add_tokens), or choose another template"
            )

    def _check_calls(self, chat: Messages, wanted: list[int], text: str, spans: list[Span]) -> None:
        """Refuse a template that leaves tool calls out: it would grade an answer of nothing."""
        apart = len(spans) == len(wanted)
        parts = [text[start:end] for start, end in spans] if apart else [text] * len(wanted)
        for turn, part in zip(wanted, parts, strict=True):
            for name in _called(chat[turn]):
                if name not in part:
                    raise ValueError(
                        f"the template leaves out the tool call {name!r} of message {turn}; choose "
                        "a template with a form for tool calls"
                    )

    def _check_bos(self, ids: list[int]) -> None:
        if self.tok.bos_id is not None and ids[:2] == [self.tok.bos_id] * 2:
            raise ValueError(
                f"the text starts with {self.tok.special_tokens['bos_token']!r} twice; the "
                "template should write it once and the messages not at all"
            )

    def _check_stops(
        self, ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]
    ) -> None:
        starts = [start for start, _ in offsets]
        for start, end in spans:
            inside = ids[bisect_left(starts, start) : bisect_left(starts, end)]
            if self.stop_ids.isdisjoint(inside):
                names = [self.tok.decode([i]) for i in self.tok.eos_ids]
                raise ValueError(
                    f"no stop token ({', '.join(names) or 'the tokenizer names none'}) among the "
                    "graded tokens of an assistant turn: the model would never learn to end it; "
                    "put the end-of-turn token inside {% generation %}, or name it as eos_token"
                )


def _called(message: Mapping[str, Any]) -> list[str]:
    """Names of the functions that a message calls, written as OpenAI does or flat."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    functions = [call.get("function", call) for call in calls]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    return [name for name in names if isinstance(name, str)]


_MARKS = "pass a template with {% generation %} around the assistant's text (template=)"
_MARK_IT = f"{_MARKS}, or train_on='last'"
