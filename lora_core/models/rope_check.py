"""Is a rotation's description complete and possible? One line for everything that is not.

The keys of a type are declared once, beside its formulas (`ROPE_TYPES`); here is what they may
hold. Keys that the type does not know are left out, as transformers does, except those of further
rotations: with `mrope_section` a "default" is no plain rotation, and a model must not be run as
something it is not.
"""

from collections.abc import Mapping
from typing import Any

from lora_core.models.rope import ROPE_TYPES, RopeParameters, rotary_channels

_CONTEXT = "original_max_position_embeddings"
_LAYERS = {"full_attention", "sliding_attention"}
_LISTS = ("short_factor", "long_factor")
# keys of rotations that are not implemented, which change what a known type would compute
_FOREIGN = (
    "alpha",
    "llama_4_scaling_beta",
    "long_mscale",
    "mrope_interleaved",
    "mrope_section",
    "short_mscale",
    "xdrope_section",
)


def check_rope(rope: RopeParameters, head_dim: int, *, partial: bool = True) -> dict[str, Any]:
    """Check a rotation's parameters and leave out keys that its type does not know.

    Args:
        rope: `rope_type` (absent: "default"), `rope_theta` (absent: 10000) and the type's keys; or
            such a mapping for "full_attention" and for "sliding_attention".
        head_dim: D.
        partial: whether the family can leave channels unturned.

    Returns:
        `rope_type`, `rope_theta`, the type's keys, and `partial_rotary_factor` unless it is 1;
        nested as `rope` is.

    Raises:
        ValueError: an unknown type, a key that is missing, out of range or of another rotation,
            or values that do not fit together.
    """
    name = "rope_parameters"
    if not any(isinstance(value, Mapping) for value in rope.values()):
        return _check_one(rope, head_dim, partial, name)
    if set(rope) != _LAYERS or not all(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(
            f"{name} must hold an object each for {', '.join(sorted(_LAYERS))}, or one for all "
            f"layers; got the keys {brief(sorted(map(str, rope)))}"
        )
    return {
        kind: _check_one(part, head_dim, partial, f"{name}[{kind!r}]")
        for kind, part in rope.items()
    }


def _check_one(rope: RopeParameters, head_dim: int, partial: bool, name: str) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    which = rope["rope_type"]
    if not isinstance(which, str) or which not in ROPE_TYPES:
        raise ValueError(
            f"rope_type {brief(which)} is not implemented; known: {', '.join(sorted(ROPE_TYPES))}"
        )
    for key in _FOREIGN:
        if rope.get(key) not in (None, False):
            raise ValueError(
                f"{name}[{key!r}] belongs to a rotation that is not implemented; got "
                f"{brief(rope[key])} with rope_type {which!r}"
            )
    kind = ROPE_TYPES[which]
    keys = ["rope_theta", *kind.needed, *(key for key in kind.optional if _stated(rope, key))]
    channels = _check_partial(rope, head_dim, partial)
    for key in keys:
        fault = _fault(key, rope.get(key), channels)
        if fault:
            wanted, got = fault
            raise ValueError(f"{name}[{key!r}] must be {wanted} for rope_type {which!r}; got {got}")
    _check_together(rope, channels)
    checked = {key: rope[key] for key in ("rope_type", *keys)}
    checked |= {key: list(checked[key]) for key in _LISTS if key in checked}
    if rope.get("partial_rotary_factor", 1) != 1:
        checked["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return checked


def _stated(rope: RopeParameters, key: str) -> bool:
    return rope.get(key) is not None or (key == "truncate" and key in rope)


def _check_partial(rope: RopeParameters, head_dim: int, partial: bool) -> int:
    """R, after a look at what it follows from."""
    share = rope.get("partial_rotary_factor", 1.0)
    if not is_positive(share) or share > 1:
        raise ValueError(f"partial_rotary_factor must be a number in (0, 1]; got {brief(share)}")
    if share != 1 and not partial:
        raise ValueError(
            f"partial_rotary_factor {share} is not implemented for this family; only 1.0"
        )
    channels = rotary_channels(head_dim, {"partial_rotary_factor": share})
    if channels < 2 or channels % 2:
        raise ValueError(
            f"partial_rotary_factor {share} of head_dim {head_dim} turns {channels} channels; it "
            "must be an even number from 2 on"
        )
    return channels


def is_positive(value: Any) -> bool:
    """Whether it is a number, positive and within float32's range (and no boolean)."""
    limit = 2.0**127
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 1 / limit <= value <= limit


def _fault(key: str, value: Any, channels: int) -> tuple[str, str] | None:
    """What a value should be, and what it is; None: it is fine."""
    if key == "truncate":
        return None if isinstance(value, bool) else ("true or false", brief(value))
    if key in _LISTS:
        return _list_fault(value, channels // 2)
    if key in ("mscale", "mscale_all_dim") and value == 0 and not isinstance(value, bool):
        return None  # the same as absent
    return None if is_positive(value) else ("a positive number", brief(value))


def _list_fault(value: Any, count: int) -> tuple[str, str] | None:
    wanted = f"a list of {count} positive numbers, one per pair of rotary channels,"
    if not isinstance(value, list | tuple):
        return wanted, brief(value)
    if len(value) != count:
        return wanted, f"{len(value)} entries"
    wrong = [entry for entry in value if not is_positive(entry)]
    return (wanted, f"{brief(wrong[0])} among them") if wrong else None


def _check_together(rope: RopeParameters, channels: int) -> None:
    """Values that are fine alone and give no frequencies together."""
    name = rope["rope_type"]
    if name == "dynamic" and channels < 4:
        raise ValueError(f"rope_type 'dynamic' needs 4 rotary channels or more; got {channels}")
    if name == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(
            f"high_freq_factor must be greater than low_freq_factor {rope['low_freq_factor']} "
            f"(rope_type 'llama3'); got {rope['high_freq_factor']}"
        )
    if name == "longrope" and rope[_CONTEXT] <= 1:
        raise ValueError(
            f"{_CONTEXT} must be greater than 1 (rope_type 'longrope'); got {rope[_CONTEXT]}"
        )
    if name != "yarn":
        return
    if rope["rope_theta"] <= 1:
        raise ValueError(
            f"rope_theta must be greater than 1 (rope_type 'yarn'); got {rope['rope_theta']}"
        )
    fast, slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
    if fast < slow:
        raise ValueError(
            f"beta_fast must not be less than beta_slow {slow} (rope_type 'yarn'); got {fast}"
        )


def brief(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
