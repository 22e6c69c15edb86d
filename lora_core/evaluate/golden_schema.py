"""Answers that are JSON under a schema, through the `jsonschema` package (extra `evaluate`).

The answer is JSON as a whole: a sentence before it or a code fence around it fails, as it would
fail in the program that reads it, and the reason says that it was the fence. NaN and Infinity,
which Python's reader lets pass, are no JSON.

A schema is checked when the golden file is read. References to other documents are refused:
frozen prompts should not wait for a server, and `jsonschema` left to itself would ask one.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_core.evaluate.shown import cut

_FENCE = re.compile(r"\s*```\w*\s*\n(.*?)\n?```\s*", re.DOTALL)


def schema_test(schema: Any, where: str) -> Callable[[str], str | None]:
    """A function that says why an answer is not JSON under a schema.

    Args:
        schema: JSON Schema, an object; the draft is that of its `$schema`, else 2020-12.
        where: what error messages start with.

    Returns:
        answer -> why it fails, None where it passes.

    Raises:
        ImportError: `jsonschema` is missing.
        ValueError: it is no schema, or refers to what is not in it.
    """
    try:
        import jsonschema
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise ImportError(
            f"{where}: JSON schemas need jsonschema: pip install 'lora-core[evaluate]'"
        ) from None
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be a JSON object; got {type(schema).__name__}")
    latest = jsonschema.Draft202012Validator
    draft = jsonschema.validators.validator_for(
        schema, default=None if "$schema" in schema else latest
    )
    if draft is None:
        raise ValueError(f"{where} is of an unknown draft, $schema {schema['$schema']!r:.80}")
    try:
        draft.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{where} is no JSON schema: {_told(error)}") from None
    # an empty registry: nothing is fetched
    validator = draft(schema, registry=Registry())
    _check_references(schema, draft.META_SCHEMA["$schema"], where)

    def test(answer: str) -> str | None:
        value, why = _read(answer)
        if why is not None:
            return why
        try:
            errors = sorted(validator.iter_errors(value), key=lambda e: list(map(str, e.path)))
        except RecursionError:
            return "nests too deep to be checked"
        except Unresolvable as error:
            return f"cannot be checked: the schema refers to what is not in it: {error}"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return f"does not validate: {_told(errors[0])}{more}" if errors else None

    return test


def _read(answer: str) -> tuple[Any, str | None]:
    """The JSON value of an answer, or why it has none."""
    try:
        return json.loads(answer, parse_constant=_refuse_constant), None
    except RecursionError:
        return None, "nests too deep to be read"
    except ValueError as error:
        if fenced := _FENCE.fullmatch(answer):
            inner = _read(fenced[1])[1]
            return None, inner or "is JSON inside of a code fence; the fence is no JSON"
        return None, f"is not JSON: {error}"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _told(error: Any) -> str:
    """The message of a jsonschema error, short, with the place in the value."""
    place = "".join(f"[{part!r}]" for part in error.absolute_path)
    return cut(f"{place}: {error.message}" if place else error.message, 160)


def _references(schema: Mapping[str, Any]) -> Iterator[str]:
    """Values of "$ref", wherever they stand."""
    for node in _objects(schema):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]


def _objects(node: Any) -> Iterator[Mapping[str, Any]]:
    """The objects of a schema, itself first; not those that are data."""
    if isinstance(node, Mapping):
        yield node
        for key, value in node.items():
            if key not in ("const", "enum", "default", "examples"):
                yield from _objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from _objects(value)


def _check_references(schema: Mapping[str, Any], dialect: str, where: str) -> None:
    """Refuse references that lead out of a schema; with inner $ids the test itself has to."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    resource = specification_with(dialect).create_resource(schema)
    base = resource.id() or ""
    resolver = Registry().with_resource(base, resource).resolver(base)
    inner = any("$id" in node for node in _objects(schema) if node is not schema)
    for reference in () if inner else _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise ValueError(
                f"{where} refers to {reference!r}, which is not in it: write it into its $defs"
            ) from None
