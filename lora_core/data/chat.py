"""Chat templates: sandboxed Jinja, rendered as transformers renders it, with the graded spans.

What it does: `render_chat` turns messages into text; `render_spans` also says which characters
lie in `{% generation %}` blocks, the parts an assistant wrote. `load_template` finds a template by
built-in name, by file or as text.

How: a template comes out of a downloaded folder, so it runs in jinja2's immutable sandbox with the
names transformers provides (`raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop
controls, `trim_blocks`, `lstrip_blocks`). A `{% generation %}` block writes a marker before and
after its body; the markers are cut out of the finished text and their places are the spans. They
carry a random number drawn for each render, so no content can imitate them.

How it differs from transformers: there the position is counted while the text streams out, which
is wrong when a template filters or captures a block; here the template runs twice, with and without
markers, and different texts are an error. The trade-off is a second render, some tens of
microseconds.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

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
) -> str:
    """Text of a conversation.

    Args:
        template: Jinja text.
        messages: dictionaries with `role` and `content`; further keys reach the template.
        add_generation_prompt: end with the header of an assistant turn.
        tools: JSON schemas of tools.
        variables: special tokens (`bos_token`) and whatever else the template reads.

    Raises:
        ValueError: the template is not valid Jinja, or refuses the conversation.
    """
    names = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
    return _render(template, messages, tools, names)


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


def _render(
    template: str,
    messages: Messages,
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    marks: tuple[str, str] = ("", ""),
) -> str:
    from jinja2 import TemplateError

    chat = [_with_reasoning(_plain(message)) for message in messages]
    names = {"documents": None, **_plain(variables)}
    try:
        compiled = _compile(template)
        return str(compiled.render(messages=chat, tools=_plain(tools), _marks=marks, **names))
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f" (line {line} of the template)" if line else ""
        raise ValueError(f"the chat template refuses: {error.message}{place}") from None
    except (
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"the chat template fails on this conversation: {error}") from None


@lru_cache(maxsize=64)
def _compile(template: str) -> Any:
    """A compiled template in its own sandbox."""
    from jinja2 import ext, nodes, parser, runtime
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, context: runtime.Context, caller: Any) -> str:
            opening, closing = context.resolve("_marks")
            return f"{opening}{caller()}{closing}"

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    class PublicNamespace(Namespace):
        """A namespace without underscore names, which could reach the interpreter's insides."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a chat template may not store the attribute {name!r}")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PublicNamespace
    return environment.from_string(template)


def _plain(value: Any) -> Any:
    """Rebuild a value from plain JSON types, so that the template meets no other methods.

    Raises:
        ValueError: a value that JSON does not know.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(
        "a chat template takes strings, numbers, lists and dictionaries; "
        f"got {type(value).__name__}"
    )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give reasoning under every name that templates read, as transformers does."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}
