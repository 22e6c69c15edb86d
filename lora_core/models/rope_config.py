"""From config.json's words for rotary positions to the parameters that `Rotary` takes, and back.

Three dialects are in circulation. transformers 5 has one object `rope_parameters`, or one per layer
type (Gemma 3). Before it, `rope_theta`, `partial_rotary_factor` and `rope_scaling` lay side by
side, Gemma 3 adding `rope_local_base_freq` for its sliding layers. And some keep
`original_max_position_embeddings` outside (Phi-3). What the library holds is one flat mapping that
determines the frequencies alone: what depends on `max_position_embeddings` is worked out here.

Against transformers, where the same file is read silently: a file whose `rope_parameters` and
`rope_scaling` contradict each other is refused (transformers takes `rope_scaling`, and forgets the
other's theta), and so are a scaling without a type (transformers runs the plain rotation) and keys
that belong to another rotation (transformers warns and ignores them). Each would run a model as
something it may not be.
"""

from collections.abc import Mapping
from typing import Any

from lora_core.models.rope import ROPE_TYPES, RopeParameters
from lora_core.models.rope_check import brief, check_rope, is_positive

__all__ = ["check_rope", "read_rope", "read_rope_by_type", "rope_to_dict"]

_CONTEXT = "original_max_position_embeddings"
_FULL, _SLIDING = "full_attention", "sliding_attention"
# what only a scaling has: without a type it would say nothing
_OWN = {key for kind in ROPE_TYPES.values() for key in (*kind.needed, *kind.optional)} - {_CONTEXT}


def read_rope(
    raw: Mapping[str, Any], *, theta: float = 10000.0, aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The rotation that a config.json describes, one for all layers.

    Args:
        raw: config.json's content, with the family's values of absent keys. Read are
            `rope_parameters`, `rope_scaling`, `rope_theta`, `partial_rotary_factor`,
            `max_position_embeddings` and `original_max_position_embeddings`.
        theta: the family's `rope_theta`.
        aliases: the family's other names of rope types, e.g. {"su": "longrope"}.

    Returns:
        `rope_type`, `rope_theta` and what else the file says, for `check_rope`.

    Raises:
        TypeError: a key that must hold an object holds something else.
        ValueError: a nested `rope_parameters`, or two dialects that contradict each other.
    """
    new, old = _object(raw, "rope_parameters"), _object(raw, "rope_scaling")
    nested = [key for key, value in (new or {}).items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"rope_parameters holds an object each for {', '.join(nested)}: this family takes one "
            "for all layers"
        )
    outer = {key: raw[key] for key in ("partial_rotary_factor", _CONTEXT) if _given(raw, key)}
    context = raw.get("max_position_embeddings")
    found = [
        _normal(part, raw.get("rope_theta"), name, outer, context, aliases)
        for name, part in (("rope_parameters", new), ("rope_scaling", old))
        if part
    ]
    if not found:
        found = [_normal({}, raw.get("rope_theta"), "", outer, context, aliases)]
    return _agreed([{"rope_theta": _theta(new, theta)} | rope for rope in found])


def read_rope_by_type(
    raw: Mapping[str, Any],
    *,
    theta: Mapping[str, float],
    aliases: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The rotation of each layer type that a config.json describes.

    Args:
        raw: as for `read_rope`, nested, or in the older dialect, whose `rope_theta` and
            `rope_scaling` are of the full layers, `rope_local_base_freq` of the sliding ones.
        theta: the family's `rope_theta` of each layer type.
        aliases: as for `read_rope`.

    Returns:
        For each layer type of `theta`, what `read_rope` returns.

    Raises:
        TypeError: a key that must hold an object holds something else.
        ValueError: a flat `rope_parameters`, or two dialects that contradict each other.
    """
    new, old = _object(raw, "rope_parameters") or {}, _object(raw, "rope_scaling")
    flat = sorted(str(key) for key in new if key not in theta)
    if flat:
        raise ValueError(
            f"rope_parameters must hold an object each for {', '.join(theta)}; got {flat[0]}"
        )
    older = {_FULL: raw.get("rope_theta"), _SLIDING: raw.get("rope_local_base_freq")}
    outer = {key: raw[key] for key in ("partial_rotary_factor",) if _given(raw, key)}
    context = raw.get("max_position_embeddings")
    ropes = {}
    for kind, usual in theta.items():
        part = _object(new, kind, "rope_parameters")
        name = f"rope_parameters[{kind!r}]"
        found = [_normal(part or {}, older.get(kind), name, outer, context, aliases)]
        if kind == _FULL and old:
            scaling = _normal(old, older[kind], "rope_scaling", outer, context, aliases)
            found = [found[0], scaling] if part else [scaling]
        ropes[kind] = _agreed([{"rope_theta": _theta(part, usual)} | rope for rope in found])
    return ropes


def _given(raw: Mapping[str, Any], key: str) -> bool:
    return raw.get(key) is not None


def _object(raw: Mapping[str, Any], key: str, within: str = "") -> Mapping[str, Any] | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, Mapping):
        name = f"{within}[{key!r}]" if within else key
        raise TypeError(f"{name} must be an object; got {brief(value)}")
    return value


def _theta(new: Mapping[str, Any] | None, usual: float) -> Any:
    """For a dialect that does not say `rope_theta`: the other's, or the family's."""
    return new["rope_theta"] if new and _given(new, "rope_theta") else usual


def _normal(
    part: Mapping[str, Any],
    theta: Any,
    name: str,
    outer: Mapping[str, Any],
    context: Any,
    aliases: Mapping[str, str] | None,
) -> dict[str, Any]:
    """One dialect's object: one name for the type, nulls gone, what the file says outside added."""
    # a null is an absent key; of a switch it would be neither yes nor no, and is refused
    rope = {key: value for key, value in part.items() if value is not None or key == "truncate"}
    rope["rope_type"] = _type_of(rope, name, aliases or {})
    rope.pop("type", None)
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    original = outer.get(_CONTEXT)
    if "partial_rotary_factor" in outer:
        rope.setdefault("partial_rotary_factor", outer["partial_rotary_factor"])
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    kind = ROPE_TYPES.get(rope["rope_type"])
    if kind is None or _CONTEXT not in kind.needed:
        return rope
    if rope["rope_type"] == "dynamic":
        rope[_CONTEXT] = context  # transformers' formula knows no other length
    elif original is not None:
        rope[_CONTEXT] = original
    rope.setdefault(_CONTEXT, context)
    implied = is_positive(context) and is_positive(rope[_CONTEXT])
    if rope["rope_type"] in ("yarn", "longrope") and implied:
        rope.setdefault("factor", context / rope[_CONTEXT])
    return rope


def _type_of(rope: Mapping[str, Any], name: str, aliases: Mapping[str, str]) -> str:
    said = {str(rope[key]) for key in ("rope_type", "type") if key in rope}
    kinds = sorted({aliases.get(kind, kind) for kind in said})
    if len(kinds) > 1:
        raise ValueError(
            f"{name} says rope_type {brief(rope['rope_type'])} and type {brief(rope['type'])}: "
            "leave one out"
        )
    scaled = sorted(_OWN & set(rope))
    if not kinds and scaled:
        raise ValueError(
            f"{name} has {scaled[0]} and no rope_type; known: {', '.join(sorted(ROPE_TYPES))}"
        )
    return kinds[0] if kinds else "default"


def _agreed(ropes: list[dict[str, Any]]) -> dict[str, Any]:
    """The one description, or one of two that are equal."""
    first, last = ropes[0], ropes[-1]
    for key in ("rope_type", *sorted(first.keys() | last.keys())):
        if first.get(key) != last.get(key):
            raise ValueError(
                f"rope_parameters and rope_scaling contradict each other: {key} "
                f"{brief(first.get(key))} and {brief(last.get(key))}; leave one of them out"
            )
    return first


def rope_to_dict(rope: RopeParameters, max_position_embeddings: int) -> dict[str, Any]:
    """Keys for a config.json that transformers 5, older readers and this library read alike.

    The older dialect stands beside the new one, because readers that know it alone would run the
    model without its scaling. transformers 5 reads `rope_scaling` first, so both say the same.

    Args:
        rope: as `check_rope` returns it, or one such mapping per layer type.
        max_position_embeddings: what the same config.json says.

    Returns:
        `rope_parameters` and the older keys.

    Raises:
        ValueError: a context of type "dynamic" that the file cannot express.
    """
    context = max_position_embeddings
    if not any(isinstance(value, Mapping) for value in rope.values()):
        return _flat_to_dict(rope, context, outside=True)
    parts = {kind: _flat_to_dict(part, context, outside=False) for kind, part in rope.items()}
    raw: dict[str, Any] = {
        "rope_parameters": {kind: part["rope_parameters"] for kind, part in parts.items()}
    }
    # the older dialect knows a scaling of the full layers alone, and one share for both
    whole = not any("partial_rotary_factor" in part for part in parts.values())
    if whole and "rope_scaling" not in parts[_SLIDING]:
        raw |= {key: value for key, value in parts[_FULL].items() if key != "rope_parameters"}
        raw["rope_local_base_freq"] = parts[_SLIDING]["rope_theta"]
    return raw


def _flat_to_dict(rope: RopeParameters, context: int, outside: bool) -> dict[str, Any]:
    """Keys for one rotation; `outside`: longrope's context beside it, where Phi-3 has it."""
    new = dict(rope)
    if new["rope_type"] == "dynamic" and new.pop(_CONTEXT) != context:
        raise ValueError(
            f"{_CONTEXT} {rope[_CONTEXT]} (rope_type 'dynamic') is not max_position_embeddings "
            f"{context}, from which config.json's readers take it: make them equal"
        )
    raw: dict[str, Any] = {"rope_parameters": new}
    apart = ("rope_theta", "partial_rotary_factor")
    raw |= {key: new[key] for key in apart if key in new}
    scaling = {key: value for key, value in new.items() if key not in apart}
    if new["rope_type"] == "longrope" and outside:
        # Phi-3's older classes insist on exactly these: type, short_factor, long_factor
        raw[_CONTEXT] = scaling.pop(_CONTEXT)
        scaling = {"type": scaling.pop("rope_type"), **scaling}
        if scaling["factor"] == context / raw[_CONTEXT]:
            del scaling["factor"]
    if new["rope_type"] != "default":
        raw["rope_scaling"] = scaling
    return raw
