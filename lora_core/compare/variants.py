r"""What can be compared: names, what each attaches, and the settings that it has.

    prompted    zero-shot, few-shot, system-prompt: the base as it is, asked in other ways
    trained     full, lora, qlora, dora, bottleneck-*, prefix, prompt, ptuning

A method declares which settings it reads (`fields`). That decides where a sweep goes: a sweep over
`r` multiplies LoRA's kin and leaves prompt tuning as it is, a sweep over `lr` multiplies whatever
is trained. Every variant is described by plain JSON (`Variant.facts`), because it crosses a process
boundary and because its hash decides whether it has been run already.

The default rates are those of a small model and a short run, larger than a 7B model would bear.
Those of prefix, prompt, ptuning and bottleneck-pfeiffer are the best of a few in factors of two to
three, by other held-out rows than those of the comparison's default split. full, lora and
bottleneck-parallel were tried at their one rate; qlora and dora take lora's, bottleneck-houlsby
pfeiffer's. Rates are part of a method's result; a fair comparison sweeps them (`--sweep lr=…`).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from lora_core.targets import nearest

AdapterSettings = (
    LoRAConfig | BottleneckConfig | PromptTuningConfig | PrefixTuningConfig | PTuningConfig
)
TRAINING = ("lr", "steps", "batch_size")
LORA = (*TRAINING, "r", "alpha", "targets")
BOTTLENECK = (*TRAINING, "reduction")
SOFT = (*TRAINING, "virtual_tokens")
TARGETS: dict[str, str | list[str]] = {
    "all-linear": "all-linear",
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "query-value": ["q_proj", "v_proj"],
    "feed-forward": ["gate_proj", "up_proj", "down_proj"],
}
"""Short words for targets; any other word is a module's name, or several joined by "+"."""


@dataclass(frozen=True)
class Method:
    """One way to make a model do a task."""

    fields: tuple[str, ...] = ()
    """settings that it reads; none: nothing is trained"""
    lr: float = 0.0
    """default learning rate"""
    build: Callable[[Mapping[str, Any]], AdapterSettings] | None = None
    """settings -> the adapter's configuration; None: the weights themselves, or nothing"""
    quantize: str | None = None
    """4-bit code of the base"""
    seeded: bool = True
    """whether a seed changes anything"""

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return bool(self.fields)


def targets_named(word: str) -> str | list[str]:
    """The targets that a word means: one of TARGETS, else module names joined by "+"."""
    return TARGETS.get(word) or word.split("+")


def _lora(dora: bool = False) -> Callable[[Mapping[str, Any]], LoRAConfig]:
    def build(settings: Mapping[str, Any]) -> LoRAConfig:
        targets = targets_named(settings["targets"])
        r, alpha = settings["r"], settings["alpha"]
        return LoRAConfig(r=r, alpha=alpha, targets=targets, use_dora=dora)

    return build


def _bottleneck(placement: str) -> Method:
    def build(settings: Mapping[str, Any]) -> BottleneckConfig:
        return BottleneckConfig(reduction=settings["reduction"], placement=placement)

    return Method(BOTTLENECK, 1e-2, build)


def _soft(kind: Callable[[int], AdapterSettings], lr: float) -> Method:
    return Method(SOFT, lr, lambda settings: kind(settings["virtual_tokens"]))


METHODS: dict[str, Method] = {
    "zero-shot": Method(seeded=False),
    "few-shot": Method(),
    "system-prompt": Method(seeded=False),
    "full": Method(TRAINING, 1e-3),
    "lora": Method(LORA, 4e-3, _lora()),
    "qlora": Method(LORA, 4e-3, _lora(), "nf4"),
    "dora": Method(LORA, 4e-3, _lora(dora=True)),
    "bottleneck-houlsby": _bottleneck("houlsby"),
    "bottleneck-pfeiffer": _bottleneck("pfeiffer"),
    "bottleneck-parallel": _bottleneck("parallel"),
    "prefix": _soft(PrefixTuningConfig, 3e-3),
    "prompt": _soft(PromptTuningConfig, 1e-1),
    "ptuning": _soft(PTuningConfig, 1e-3),
}
FIELDS = tuple(dict.fromkeys(field for method in METHODS.values() for field in method.fields))
WORDS = ("targets",)
WHOLE = ("steps", "batch_size", "r", "virtual_tokens")


@dataclass(frozen=True)
class Variant:
    """One row of the comparison for one seed."""

    method: str
    """key of METHODS"""
    settings: Mapping[str, Any]
    """value of each of the method's fields"""
    swept: Mapping[str, Any]
    """those of them that a sweep gave"""
    seed: int
    """of the adapter's start, the order of the data and the choice of examples"""

    @property
    def name(self) -> str:
        """Its row's name: the method, and what the sweep gave it."""
        return " ".join([self.method, *(f"{k}={word(v)}" for k, v in self.swept.items())])

    @property
    def label(self) -> str:
        """The name with the seed, as a file may be called."""
        plain = "".join(c if c.isalnum() or c in "-=." else "_" for c in self.name)
        return f"{plain[:80]}-seed{self.seed}"

    def facts(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self) | {"settings": dict(self.settings), "swept": dict(self.swept)}

    def adapter(self) -> AdapterSettings | None:
        """The adapter's configuration; None where none is attached."""
        build = METHODS[self.method].build
        return None if build is None else build(self.settings)


def word(value: object) -> str:
    """A setting's value as a name shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_methods(names: Sequence[str]) -> None:
    """Refuse a name that is no method's, or one that stands twice.

    Raises:
        ValueError: with the nearest names.
    """
    if not names:
        raise ValueError(f"no methods to compare: name some of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"no method {name!r}; {nearest(name, list(METHODS))}")
        if list(names).count(name) > 1:
            raise ValueError(f"the method {name!r} is named twice")


def read_value(field: str, text: str) -> Any:
    """A setting's value from a flag's text.

    Raises:
        ValueError: not a value of that field.
    """
    if field in WORDS:
        if not text:
            raise ValueError(f"{field} must be one of {', '.join(TARGETS)}, or module names")
        return text
    kind: Callable[[str], int | float] = int if field in WHOLE else float
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        what = "a whole number, 1 or more" if field in WHOLE else "a number above 0"
        raise ValueError(f"{field} must be {what}; got {text!r}")
    return value


def read_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
    """`r=4,8,16` as ("r", (4, 8, 16)).

    Raises:
        ValueError: no such field, no values, or one that is none of its values.
    """
    field, equals, values = (part.strip() for part in text.partition("="))
    if not (field and equals and values):
        raise ValueError(f"a sweep is FIELD=VALUE,VALUE, such as r=4,8,16; got {text!r}")
    if field not in FIELDS:
        raise ValueError(
            f"no method has a field {field!r} to sweep over; fields: {', '.join(FIELDS)}"
        )
    read = tuple(read_value(field, value.strip()) for value in values.split(","))
    if len(set(read)) < len(read):
        raise ValueError(f"a value stands twice in the sweep {text!r}")
    return field, read


def read_rate(text: str) -> tuple[str, float]:
    """`lora=4e-3` as ("lora", 0.004).

    Raises:
        ValueError: no trained method of that name, or no rate.
    """
    name, equals, rate = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"--lr takes METHOD=RATE, such as lora=4e-3; got {text!r}")
    trained = [key for key, method in METHODS.items() if method.trains]
    if name not in trained:
        raise ValueError(f"--lr {text}: no trained method {name!r}; {nearest(name, trained)}")
    return name, read_value("lr", rate)


def grid(
    names: Sequence[str],
    base: Mapping[str, Any],
    rates: Mapping[str, float],
    sweep: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
) -> list[Variant]:
    """All variants, method by method, value by value, seed by seed.

    Args:
        names: methods.
        base: each field's value where no sweep gives one; `lr` is not among them.
        rates: learning rates in place of the methods' own.
        sweep: values by field. A method takes those of its own fields and their products.
        seeds: a method that no seed changes runs with the first alone.

    Returns:
        The variants, in order.

    Raises:
        ValueError: a sweep over a field that none of these methods has.
    """
    for field in sweep:
        if not any(field in METHODS[name].fields for name in names):
            raise ValueError(f"none of {', '.join(names)} has a field {field!r} to sweep over")
    found = []
    for name in names:
        method = METHODS[name]
        plain = {**base, "lr": rates.get(name, method.lr)}
        plain = {field: plain[field] for field in method.fields}
        own = {field: values for field, values in sweep.items() if field in method.fields}
        for values in itertools.product(*own.values()):
            swept = dict(zip(own, values, strict=True))
            for seed in seeds if method.seeded else seeds[:1]:
                found.append(Variant(name, plain | swept, swept, seed))
    return found
