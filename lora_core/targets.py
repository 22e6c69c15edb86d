"""Which modules an option means: the one matcher behind `targets`, `exclude` and `skip`.

An option is one of

* a list of names: each is an exact name (`"model.layers.0.mlp.up_proj"`) or a dotted suffix of one
  (`"up_proj"` matches `"….mlp.up_proj"`, never `"….gate_up_proj"`);
* a string: `"all-linear"` (every module of the wanted kind but the output head), or a regular
  expression that has to match a whole name (`re.fullmatch`);
* a callable `(name, module) -> bool`.

PEFT matches in the same way and lets a pattern that matches nothing pass in silence; here it is an
error that says which names come nearest, because a misspelt target trains less than was asked for.

Names are those of the model before any adapter was attached. A host that wraps a module declares
the attribute it keeps the module under (`wraps = "base"`); it then stands in the walk under the
name of what it wraps, and a second adapter finds the same names as the first.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from torch import nn

__all__ = [
    "Targets",
    "in_head",
    "nearest",
    "output_head_name",
    "pattern_value",
    "select_modules",
    "sites",
    "targets_for",
    "uncompiled",
    "unwrap",
]

Targets: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]
Value = TypeVar("Value")


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside any number of hosts; a module that is no host returns itself."""
    while isinstance(attribute := getattr(type(module), "wraps", None), str):
        module = getattr(module, attribute)
    return module


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` was given, whose names have no `_orig_mod`."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def sites(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the model under its original names: hosts stand for what they wrap.

    Args:
        model: any module; a module reachable under two names is listed under both.
        prefix: what the names start with.

    Yields:
        (name, module) in module order, parents first; the outermost host where there are several.
    """
    yield prefix, model
    for child_name, child in unwrap(model)._modules.items():
        if child is not None:
            yield from sites(child, f"{prefix}.{child_name}" if prefix else child_name)


def output_head_name(model: nn.Module) -> str | None:
    """Name of the output head, as the model or a part of it tells it.

    A layer that ends in the vocabulary is what `get_output_embeddings()` returns, in transformers'
    models and this library's. A classifier is no embedding, and would be grown with the vocabulary
    if it were called one: this library's encoders have `get_output_head()` for it.

    Args:
        model: any module.

    Returns:
        The head's name, or None when there are no such methods or they return None.
    """
    for _, part in sites(model):
        for method in ("get_output_embeddings", "get_output_head"):
            ask = getattr(unwrap(part), method, None)
            head = ask() if callable(ask) else None
            if isinstance(head, nn.Module):
                wanted = unwrap(head)
                return next((name for name, m in sites(model) if unwrap(m) is wanted), None)
    return None


def in_head(name: str, head: str | None) -> bool:
    """Whether a module is the output head or, as in RoBERTa's classifier, a layer of it.

    Args:
        name: the module's name.
        head: what `output_head_name` returned.

    Returns:
        Whether it is.
    """
    return head is not None and (name == head or name.startswith(f"{head}."))


def nearest(wanted: str, names: Sequence[str]) -> str:
    """Say which names come nearest: `nearest names: 'a', 'b'`, or list some when none is near."""
    last = {name.rsplit(".", 1)[-1] for name in names}
    close = difflib.get_close_matches(wanted, sorted(last.union(names)), n=3, cutoff=0.5)
    if close:
        return "nearest names: " + ", ".join(repr(name) for name in close)
    some = sorted(last)[:5]
    return "names here: " + ", ".join(repr(name) for name in some) if some else "no names here"


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    r"""Value of the first pattern that matches the name, as PEFT's: `re.match((.*\.)?(key)$)`.

    Args:
        patterns: rank_pattern or alpha_pattern, in order.
        name: a module's name.
        default: what holds where no pattern matches.

    Returns:
        The value.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def targets_for(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """Return the option that means modules of these names and no others, as text can hold it.

    Args:
        model: the module they are in.
        names: theirs.

    Returns:
        Last parts of the names; the whole names, where last parts would mean more; a regular
        expression, where a whole name is also the end of another's (`"0"` and `"1.0"`).
    """
    chosen = set(names)
    every = [name for name, _ in sites(model) if name]
    for listed in ({name.rsplit(".", 1)[-1] for name in chosen}, chosen):
        if {name for name in every if not listed.isdisjoint(_ends(name))} == chosen:
            return sorted(listed)
    return "|".join(re.escape(name) for name in sorted(chosen))


def _ends(name: str) -> Iterator[str]:
    """A name and its dotted suffixes."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def select_modules(
    model: nn.Module,
    targets: Targets,
    *,
    kind: Callable[[nn.Module], bool],
    linear: Callable[[nn.Module], bool] | None = None,
    exclude: Targets | None = None,
    option: str = "targets",
) -> list[str]:
    """Names of the modules that an option means.

    Args:
        model: the module to look through. The model itself is never selected.
        targets: list of names or suffixes, "all-linear", regular expression, or predicate.
        kind: which modules the option is about, called with the module inside any host.
        linear: which of them "all-linear" means; None: all.
        exclude: the same forms; what it matches is left out.
        option: what the option is called in messages.

    Returns:
        Names in module order, each module once (under its first name).

    Raises:
        TypeError: an option of another form.
        ValueError: a pattern that matches nothing, or nothing left; names the nearest names.
    """
    every = [(name, unwrap(module)) for name, module in sites(model) if name]
    candidates = [(name, module) for name, module in every if kind(module)]
    if not candidates:
        raise ValueError(f"{option}: the model has no module of the wanted kind")
    if targets == "all-linear" and linear is not None:
        candidates = [(name, module) for name, module in candidates if linear(module)]
    chosen = _matching(model, every, candidates, targets, option)
    if exclude is not None and not (isinstance(exclude, Sequence) and len(exclude) == 0):
        left_out = _matching(model, every, candidates, exclude, f"exclude of {option}")
        chosen = {key: name for key, name in chosen.items() if key not in left_out}
    if not chosen:
        raise ValueError(
            f"{option}: nothing is selected out of {len(candidates)} candidates; "
            + ("every match is excluded" if exclude is not None else "the predicate took none")
        )
    first = {id(module): name for name, module in reversed(candidates)}
    order = {name: i for i, (name, _) in enumerate(candidates)}
    return sorted((first[key] for key in chosen), key=order.__getitem__)


def _matching(
    model: nn.Module,
    every: list[tuple[str, nn.Module]],
    candidates: list[tuple[str, nn.Module]],
    targets: Targets,
    option: str,
) -> dict[int, str]:
    """Modules by identity that one option matches; strict about each of its patterns."""
    if isinstance(targets, str):
        tests = [(targets, _string_test(model, targets, option))]
    elif callable(targets):
        return {id(module): name for name, module in candidates if targets(name, module)}
    elif isinstance(targets, Sequence):
        tests = [(pattern, _suffix_test(pattern, option)) for pattern in targets]
        if not tests:
            raise ValueError(f'{option}: the list is empty; name modules, or use "all-linear"')
    else:
        raise TypeError(
            f"{option}: needs a list of names, a string or a callable (name, module) -> bool; "
            f"got {type(targets).__name__}"
        )
    chosen: dict[int, str] = {}
    for pattern, test in tests:
        hits = {id(module): name for name, module in candidates if test(name)}
        if not hits:
            raise ValueError(_nothing(pattern, test, every, candidates, option))
        chosen.update(hits)
    return chosen


def _string_test(model: nn.Module, targets: str, option: str) -> Callable[[str], bool]:
    if targets == "all-linear":
        head = output_head_name(model)
        return lambda name: not in_head(name, head)
    try:
        expression = re.compile(targets)
    except re.error as error:
        raise ValueError(f"{option}: {targets!r} is no regular expression: {error}") from None
    return lambda name: expression.fullmatch(name) is not None


def _suffix_test(pattern: object, option: str) -> Callable[[str], bool]:
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"{option}: the list may hold only names, got {pattern!r}")
    return lambda name: name == pattern or name.endswith("." + pattern)


def _nothing(
    pattern: str,
    test: Callable[[str], bool],
    every: list[tuple[str, nn.Module]],
    candidates: list[tuple[str, nn.Module]],
    option: str,
) -> str:
    """The message for a pattern that matches no candidate."""
    other = next(((name, module) for name, module in every if test(name)), None)
    names = nearest(pattern, [name for name, _ in candidates])
    if other is not None:
        return (
            f"{option}: {pattern!r} matches only modules of another kind, such as {other[0]!r} "
            f"({type(other[1]).__name__}); {names}"
        )
    return f"{option}: {pattern!r} matches no module; {names}"
