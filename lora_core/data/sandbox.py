"""The environment in which chat templates run.

What it does: `compile_template` makes a program of Jinja text. A template comes out of a downloaded
folder, so it is not trusted: it runs in jinja2's immutable sandbox (no attribute that begins with
an underscore, no method that changes a list or dictionary, no range above 100,000), and sees plain
JSON data only (`chat.py`).

How: the names are those that transformers provides, because templates are written against them:
`raise_exception`, `strftime_now`, `namespace`, `dict`, `tojson` without HTML escapes, `{% break %}`
and `{% continue %}`, `{% generation %}`; `trim_blocks` and `lstrip_blocks` are on. jinja2 is
imported when the first template is compiled: `import lora_core` needs torch alone.

How it differs from transformers: a `{% generation %}` block writes marks around its body, given per
render under a name of the context, instead of counting characters while the text streams out.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=64)
def compile_template(template: str) -> Any:
    """A template in a sandbox of its own, ready for `.render(messages=…, _marks=(open, close), …)`.

    Raises:
        jinja2.TemplateSyntaxError: not valid Jinja.
    """
    from jinja2 import ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _namespace()
    environment.globals["dict"] = _Dictionaries()
    return environment.from_string(template)


def _generation_tag() -> Any:
    """The extension behind `{% generation %}…{% endgeneration %}`."""
    from jinja2 import ext, nodes, parser, runtime

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

    return Generation


def _namespace() -> Any:
    """A namespace without underscore names, which could reach the interpreter's insides."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **attributes: Any) -> None:  # a template may name one `self`
            self, *given = args
            Namespace.__init__(self)
            for name, value in dict(*given, **attributes).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a chat template may not store the attribute {name!r}")
            super().__setitem__(name, value)

    return PublicNamespace


class _Dictionaries:
    """What `dict` is in a template: it makes dictionaries, and shows no class."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
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
