"""Command-line flags from dataclasses: a field's name, type, default and docstring become a flag.

One source for the library's configuration and the command line's: `TrainConfig.batch_size` is
`--batch-size`, its help is the line written under the field, its checks are `__post_init__`'s.
A flag that was not given leaves no trace, so the dataclass's default (or a configuration file's
value) stays in force.
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any


def field_help(cls: type) -> dict[str, str]:
    """The docstring written under each field of a dataclass, on one line, by field name."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node, following in zip(tree.body, tree.body[1:], strict=False):
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and documented:
                assert isinstance(following, ast.Expr)
                assert isinstance(following.value, ast.Constant)
                texts[node.target.id] = " ".join(str(following.value.value).split())
    return texts


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def _number_of(kinds: Collection[type]) -> Any:
    def parse(text: str) -> Any:
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError:
                    continue
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")

    return parse


def _options(annotation: Any) -> dict[str, Any] | None:
    """The argparse keywords of a field's type; None for a type that no flag can hold."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else [annotation]
    kinds = [k for k in members if k is not type(None)]
    if any(typing.get_origin(k) is typing.Literal for k in kinds):
        choices = [c for k in kinds for c in typing.get_args(k)]
        return {"choices": choices, "type": type(choices[0])}
    if bool in kinds:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if str in kinds:  # a str beside a sequence: words with commas stay for the dataclass to read
        return {"type": str}
    if kinds and all(k in (int, float) for k in kinds):
        return {"type": _number_of(kinds), "metavar": "N"}
    return None


def add_dataclass_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    skip: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    title: str | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Add a flag for each field of a dataclass.

    Args:
        parser: where the flags go.
        cls: a dataclass; the docstring under a field is the flag's help.
        skip: fields without a flag.
        rename: field -> flag name, where the command line's word differs.
        title: the group's heading in `--help`.
        defaults: field -> what `--help` says of its default, where the field's own is not used.
    """
    group = parser.add_argument_group(title or cls.__name__)
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        options = _options(hints[field.name])
        if field.name in skip or options is None:
            continue
        flag = (rename or {}).get(field.name, field.name).replace("_", "-")
        value = (defaults or {}).get(field.name, field.default)
        # a default of None means what the help says none means
        default = "" if value in (None, dataclasses.MISSING) else f" [{value}]"
        if options["type"] is str and "choices" not in options:
            options["metavar"] = field.name.upper()
        text = (texts.get(field.name, "") + default).replace("%", "%%")
        group.add_argument(
            f"--{flag}",
            dest=f"{cls.__name__}.{field.name}",
            default=argparse.SUPPRESS,
            help=text,
            **options,
        )


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that were given as flags, by field name."""
    prefix = f"{cls.__name__}."
    return {k.removeprefix(prefix): v for k, v in vars(args).items() if k.startswith(prefix)}


def add_opening_flags(parser: Any, *, adapter: bool = True) -> None:
    """The flags that `open_model` needs."""
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder [the adapter's base]")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="adapter folder, as of finetune")
    parser.add_argument(
        "--quantize",
        choices=["nf4", "fp4", "int4", "none"],
        help="4-bit code of the base [as the adapter was trained; else none]",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … [the accelerator, else cpu]")
