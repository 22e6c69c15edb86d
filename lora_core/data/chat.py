"""Chat templates: sandboxed Jinja, rendered as transformers renders it, with the graded spans.

What it does: `render_chat` turns messages into text; `render_spans` also says which characters
lie in `{% generation %}` blocks, the parts an assistant wrote. `load_template` finds a template by
built-in name, by file or as text.

How: a template comes out of a downloaded folder, so it runs in a sandbox (`sandbox.py`) and sees
plain data. A `{% generation %}` block writes a marker before and after its body; the markers are
cut out of the finished text and their places are the spans. They carry a random number drawn for
each render, so no content can imitate them.

How it differs from transformers: there the position of a marked block is counted while the text
streams out, which is wrong when a template filters or captures a block; here the template runs
twice, with and without markers, and different texts are an error. The trade-off is a second render,
some tens of microseconds. Values that JSON does not know are refused here, where transformers shows
the template a placeholder such as "<ndarray>"; a tool is a JSON schema, never a Python function.
"""

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lora_core.data.sandbox import compile_template

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]

BUILTIN_TEMPLATES = ("alpaca", "chatml", "gemma", "llama2", "llama3", "mistral", "phi3")
# names under which a message's reasoning is passed; templates read the first (or `thinking`)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# what control markers look like when a template spells them out
_MARKER = re.compile(r"<\|[^\s<>|]+\|>|<(?:start|end)_of_\w+>")


def builtin_template(name: str) -> str:
    """Text of a built-in template, graded spans marked."""
    if name not in BUILTIN_TEMPLATES:
        raise ValueError(f"no built-in template {name!r}; there are {', '.join(BUILTIN_TEMPLATES)}")
    file = resources.files("lora_core.data") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def load_template(template: str | Path) -> str:
    """A template's text from a built-in name, Jinja text, or a file (a `Path` is always a file).

    Raises:
        ValueError: none of the three.
        FileNotFoundError: a `Path` that is no file.
    """
    if isinstance(template, Path):
        return template.read_text(encoding="utf-8")
    name = template
    if name in BUILTIN_TEMPLATES:
        return builtin_template(name)
    if "{{" in name or "{%" in name:
        return name
    if os.path.isfile(name):  # unlike Path's, it takes names of any length
        return Path(name).read_text(encoding="utf-8")
    raise ValueError(
        f"template {name[:80]!r} is neither a built-in name ({', '.join(BUILTIN_TEMPLATES)}), "
        "nor a file, nor Jinja text"
    )


def has_marks(template: str) -> bool:
    """Whether a template marks what the assistant writes with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def template_markers(template: str) -> list[str]:
    """Control markers (`<|im_start|>`) that a template spells out, in order of appearance."""
    return list(dict.fromkeys(_MARKER.findall(template)))


def render_chat(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    continue_final_message: bool | str = False,
) -> str:
    """Text of a conversation.

    Args:
        template: Jinja text.
        messages: dictionaries with `role` and `content`; further keys reach the template, except
            those whose value is None.
        add_generation_prompt: end with the header of an assistant turn.
        tools: JSON schemas of tools.
        variables: special tokens (`bos_token`), `documents`, and whatever else the template reads.
        continue_final_message: leave the last message open, so that the model writes on: the text
            ends with its `content`, or with the field of this name.

    Raises:
        ValueError: the template is not valid Jinja, or refuses the conversation; or the last
            message cannot be left open.
    """
    names = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
    if not continue_final_message:
        return _render(template, messages, tools, names)
    if add_generation_prompt:
        raise ValueError(
            "continue_final_message and add_generation_prompt exclude each other: the text ends "
            "inside the last message or with a new header"
        )
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    return _render_open(template, messages, tools, names, field)


def render_spans(
    template: str,
    messages: Messages,
    *,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[Span]]:
    """Text of a conversation and the (start, end) characters of its `{% generation %}` blocks.

    Raises:
        ValueError: as `render_chat`; also nested blocks, or blocks whose marking changes the text.
    """
    names = {**(variables or {}), "add_generation_prompt": False}
    nonce = f"\ue000{secrets.token_hex(8)}"
    marked = _render(template, messages, tools, names, marks=(f"{nonce}<", f"{nonce}>"))
    before, *pieces = marked.split(nonce)  # each piece starts with < or >
    spans: list[Span] = []
    position, start = len(before), None
    for piece in pieces:
        if piece[:1] == "<" and start is None:
            start = position
        elif piece[:1] == ">" and start is not None:
            spans.append((start, position))
            start = None
        else:
            raise ValueError("the template nests {% generation %} blocks; mark each part once")
        position += len(piece) - 1
    text = before + "".join(piece[1:] for piece in pieces)
    if start is not None or text != _render(template, messages, tools, names):
        raise ValueError(
            "the template changes the text of a {% generation %} block after rendering it (a "
            "filter around the block?); mark the text where it is written"
        )
    return text, spans


def _render_open(
    template: str,
    messages: Messages,
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    field: str,
) -> str:
    """Text up to the end of the last message's `field`: a tag there says where to cut.

    The tag ends with a blank. A template that trims takes the blank away, and with it would have
    taken the blanks that end the field: they are cut off too.
    """
    if not messages:
        raise ValueError("continue_final_message needs a message; the conversation is empty")
    tag = f"\ue000{secrets.token_hex(8)}"
    last, said = _tagged(_message(messages[-1]), field, f"{tag} ")
    if not any(name in template for name in last if tag[1:] in str(last[name])):
        raise ValueError(f"the chat template reads no {field!r}, so it cannot be continued")
    text = _render(template, [*messages[:-1], last], tools, variables)
    if tag not in text or said.strip() not in text:
        raise ValueError(f"the chat template leaves out or changes the {field!r} to be continued")
    place = text.rindex(tag)
    return text[:place] if text.startswith(f"{tag} ", place) else text[:place].rstrip()


def _tagged(message: dict[str, Any], field: str, tag: str) -> tuple[dict[str, Any], str]:
    """A message with a tag after the text of a field, and that text."""
    said = message.get(field)
    if isinstance(said, list):  # parts: the last one with text
        place = max((i for i, part in enumerate(said) if "text" in part), default=None)
        if place is not None:
            part = {**said[place], "text": said[place]["text"] + tag}
            parts = [*said[:place], part, *said[place + 1 :]]
            return {**message, field: parts}, said[place]["text"]
    if not isinstance(said, str):
        raise ValueError(f"the last message has no text in {field!r} to continue; got {said!r}")
    # reasoning goes by several names; the template reads one of them
    names = _REASONING if field in _REASONING else (field,)
    return {**message, **{k: said + tag for k in names if message.get(k) == said}}, said


def _render(
    template: str,
    messages: Messages,
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    marks: tuple[str, str] = ("", ""),
) -> str:
    from jinja2 import TemplateError

    names = {"documents": None, **_plain(variables)}
    for what, items in (("tools", tools), ("documents", names["documents"])):
        if items is not None and not all(isinstance(item, Mapping) for item in items):
            raise ValueError(f"{what} must be a list of dictionaries; got {items!r:.80}")
    chat = [_message(message) for message in messages]
    try:
        compiled = compile_template(template)
        return str(compiled.render(messages=chat, tools=_plain(tools), _marks=marks, **names))
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f" (line {line} of the template)" if line else ""
        raise ValueError(f"the chat template refuses: {_one_line(error.message)}{place}") from None
    except Exception as error:  # noqa: BLE001 - a template is a program and can fail in any way
        raise ValueError(
            f"the chat template fails on this conversation: {_one_line(error)}"
        ) from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _plain(value: Any) -> Any:
    """Rebuild a value from plain JSON types, so that the template meets no other methods.

    Raises:
        ValueError: a value that JSON does not know.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):  # an enumeration's member, say: its value without its methods
            return plain.__str__(value) if plain is str else plain(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    raise ValueError(
        "a chat template takes strings, numbers, lists and dictionaries; "
        f"got {type(value).__name__}"
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it: what is None is absent, reasoning under every name."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a dictionary with role and content; got {message!r:.80}")
    present = {key: item for key, item in _plain(message).items() if item is not None}
    found = next((present[key] for key in _REASONING if key in present), None)
    if found is None:
        return present
    return {"thinking": found, **present, "reasoning_content": found}
