"""A tokenizer read from a Hugging Face folder, on the `tokenizers` library alone.

What it does: text to ids and back, chat rendering with the folder's own template, and the three
facts a training run needs from a tokenizer: which ids end a turn (`eos_ids`), which ids stand
before raw text (`prefix_ids`), and whether a marker is one token (`is_token`).

How: `tokenizer.json` holds the whole algorithm; `tokenizer_config.json`, `added_tokens_decoder`,
`special_tokens_map.json`, `chat_template.jinja` and `generation_config.json` name the special
tokens, the template and the stop tokens. `encode` adds no special token unless it is asked to:
chat templates write their own, and adding them a second time is the classic double BOS.

How it differs from transformers' `AutoTokenizer`: no Python code per tokenizer class, nothing is
added to the vocabulary behind the caller's back, settings for truncation and padding left in the
file are switched off, and offsets keep leading spaces (`trim_offsets` off), because the grading of
labels rests on where a token truly starts. The trade-off: a folder with only a SentencePiece
`tokenizer.model` has to be converted once.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_core.data.chat import render_chat
from lora_core.files import atomic_write

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


class Tokenizer:
    """Text to token ids and back, with the chat template that belongs to them.

    Args:
        backend: a `tokenizers.Tokenizer`.
        config: the content of tokenizer_config.json; kept, and written again by `save`.
        chat_template: Jinja text; or several by name, among them "default"; or None.
        stop_ids: further ids that end a generation (from generation_config.json).

    Raises:
        ValueError: a special token that `config` names is not in the vocabulary.
    """

    def __init__(
        self,
        backend: Any,
        config: Mapping[str, Any] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self._trimmed = _set_trim_offsets(backend, False)
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = dict(config or {})
        named = chat_template if isinstance(chat_template, Mapping) else {"default": chat_template}
        self.templates = {name: text for name, text in named.items() if text is not None}
        self.stop_ids = tuple(stop_ids)
        self.special_tokens = {
            name: text
            for name in NAMED_TOKENS
            if (text := _token_text(self.config.get(name))) is not None
        }
        for name, text in self.special_tokens.items():
            if text and backend.token_to_id(text) is None:
                raise ValueError(
                    f"tokenizer_config.json names {name} {text!r}, which is not in tokenizer.json; "
                    "correct the name or add the token"
                )

    def __len__(self) -> int:
        return self.vocab_size

    # --- text and ids ---

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in the text become themselves."""
        return list(self._encoding(text, add_special_tokens).ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, per token, its (start, end) in characters of `text`; nothing is added."""
        encoding = self._encoding(text)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, index: int) -> str | None:
        """The vocabulary entry of an id, as stored (byte-level tokens show as such)."""
        return self.backend.id_to_token(index)

    def is_token(self, text: str) -> bool:
        """Whether `text` is encoded as exactly one token."""
        return len(self.encode(text)) == 1 and self.backend.token_to_id(text) is not None

    # --- chat ---

    @property
    def chat_template(self) -> str | None:
        """The chat template as Jinja text; of several the "default". Assigning replaces all."""
        return self.templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.templates = {} if template is None else {"default": template}

    def template_for(self, tools: Sequence[Any] | None) -> str | None:
        """The template of a conversation: where tools are given the one named "tool_use"."""
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        return self.chat_template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation under its template, as transformers renders it.

        Args:
            messages: dictionaries with `role` and `content`, at least one.
            add_generation_prompt: end with the header of an assistant turn, to be continued.
            tools: JSON schemas that the template may list.
            continue_final_message: end inside the last message instead: after its `content`, or
                after the field of this name.
            **variables: further names the template may read (`enable_thinking=False`,
                `documents=[{"title": …, "text": …}]`).

        Raises:
            ValueError: there is no template, no message, or the template refuses the conversation.
        """
        template = self.template_for(tools)
        if template is None:
            raise ValueError(
                "the tokenizer has no chat template; set tok.chat_template or pass template= "
                "(chatml, llama3, llama2, mistral, gemma, phi3, alpaca, a file or Jinja text)"
            )
        if not messages:
            raise ValueError("a chat template renders at least one message; got none")
        return render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            variables={**self.special_tokens, **variables},
            continue_final_message=continue_final_message,
        )

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids to generate from: raw text with `prefix_ids`, messages through the template.

        Training rows start with the same ids (`SFTDataset`), so that both sides meet.

        Raises:
            ValueError: there is no template, it refuses the conversation, or it writes nothing.
        """
        if isinstance(prompt, str):
            return self.with_prefix(self.encode(prompt))
        ids = self.encode(self.render(prompt, add_generation_prompt=True))
        if not ids:
            raise ValueError("the chat template writes nothing for this conversation: correct it")
        return ids

    def with_prefix(self, ids: list[int]) -> list[int]:
        """`prefix_ids` + ids, unless the ids already start with them."""
        prefix = self.prefix_ids
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    # --- facts ---

    @cached_property
    def prefix_ids(self) -> list[int]:
        """Ids the tokenizer itself puts before a raw text (BOS, or nothing), found by asking it."""
        bare, full = self.encode("x"), self.encode("x", add_special_tokens=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        raise ValueError("the tokenizer's special tokens change the text's own ids: unsupported")

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if the tokenizer names one."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the tokenizer's own end token; see `eos_ids` for everything that ends a turn."""
        return self._named_id("eos_token")

    @property
    def eos_ids(self) -> list[int]:
        """Sorted ids that end a generation.

        The union of generation_config.json's list, the tokenizer's end token and the token that
        the chat template writes after an assistant's text: these three often differ (Gemma ends
        turns with <end_of_turn> while its eos_token is <eos>).
        """
        ids = {*self.stop_ids, self.eos_id, self.end_of_turn_id()}
        return sorted(index for index in ids if index is not None)

    def end_of_turn_id(self, template: str | None = None) -> int | None:
        """Id of the first special token that a template writes after an assistant's text."""
        template = template or self.chat_template
        if template is None:
            return None
        special = self.control_tokens
        ends = [index for index in self.encode(self.answer_tail(template)) if index in special]
        return ends[0] if ends else None

    def answer_tail(self, template: str) -> str:
        """What a template writes after an assistant's text; "" where it cannot be told."""
        said = "ANSWER"
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]
        try:
            text = render_chat(template, chat, variables=self.special_tokens)
        except ValueError:  # a template may ask for more than this conversation has
            return ""
        _, found, tail = text.rpartition(said)
        return tail if found else ""

    @property
    def pad_id(self) -> int:
        """An id to fill rows with: the pad token, else the end token, else 0.

        Padding is told apart by length, never by this id, so it may equal the end token.
        """
        for index in (self._named_id("pad_token"), self.eos_id):
            if index is not None:
                return index
        return 0

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included: the number of embedding rows needed."""
        added = self.backend.get_added_tokens_decoder()
        size = self.backend.get_vocab_size(with_added_tokens=True)
        return int(max(size, max(added, default=-1) + 1))

    @cached_property
    def control_tokens(self) -> dict[int, str]:
        """Special tokens by id: text that must not reach the model through a message's content."""
        added = self.backend.get_added_tokens_decoder()
        found = {index: token.content for index, token in added.items() if token.special}
        named = {self.backend.token_to_id(text): text for text in self.special_tokens.values()}
        return found | {index: text for index, text in named.items() if index in added}

    # --- change and save ---

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Add special tokens; those already in the vocabulary are left as they are.

        Returns:
            The ids that are new, in order: the rows that embedding and head must grow by.
        """
        from tokenizers import AddedToken

        new = [token for token in dict.fromkeys(tokens) if not self.is_token(token)]
        self.backend.add_special_tokens([AddedToken(t, normalized=False) for t in new])
        self.__dict__.pop("control_tokens", None)
        return [int(self.backend.token_to_id(token)) for token in new]

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates.

        Templates go to chat_template.jinja and additional_chat_templates/NAME.jinja, and once more
        into tokenizer_config.json, for programs that read them there.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        _set_trim_offsets(self.backend, self._trimmed)
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        _set_trim_offsets(self.backend, False)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if self.templates.keys() == {"default"}:
            config["chat_template"] = self.chat_template
        elif self.templates:
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in self.templates.items()
            ]
        self._save_templates(folder)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        atomic_write(folder / "tokenizer_config.json", text + "\n")

    def _save_templates(self, folder: Path) -> None:
        """A file each; files of templates that are no more would be read again, so they go."""
        default, further = folder / TEMPLATE_FILE, folder / TEMPLATE_FOLDER
        files = {
            default if name == "default" else further / f"{name}.jinja": text
            for name, text in self.templates.items()
        }
        for file in {default, *further.glob("*.jinja")} - files.keys():
            file.unlink(missing_ok=True)
        for file, text in files.items():
            file.parent.mkdir(exist_ok=True)
            atomic_write(file, text)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.backend.to_str())
        twin = Tokenizer(backend, copy.deepcopy(self.config), self.templates, self.stop_ids)
        twin._trimmed = self._trimmed
        return twin

    def _encoding(self, text: str, add_special_tokens: bool = False) -> Any:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # which says "TextInputSequence must be str" of both
            if not isinstance(text, str):
                raise TypeError(f"only text can be encoded; got {text!r:.80}") from None
        half = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
        raise ValueError(
            f"the text is not valid Unicode: {text[half]!r} at character {half}, as bytes leave it "
            "that are no UTF-8; read it in its own encoding"
        )

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)


def _token_text(entry: object) -> str | None:
    """A special token is written as a string or as an object with its `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _set_trim_offsets(backend: Any, value: bool) -> bool:
    """Set `trim_offsets` of the post-processor, wherever it is nested; returns what it was."""
    processor = backend.post_processor
    spec = json.loads(processor.__getstate__()) if processor is not None else None
    steps = [step for step in _nested(spec) if "trim_offsets" in step]
    before = any(step["trim_offsets"] for step in steps)
    if before != value and steps:
        for step in steps:
            step["trim_offsets"] = value
        processor.__setstate__(json.dumps(spec).encode())
        backend.post_processor = processor
    return before


def _nested(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _nested(child)
    elif isinstance(node, list):
        for child in node:
            yield from _nested(child)
