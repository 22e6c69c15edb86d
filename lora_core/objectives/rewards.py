"""Rewards of sampled answers: Python functions, reward adapters, and sums of them.

    file.py:function[:weight]          def function(prompt, completion, **fields) -> float
    package.module:function[:weight]   the same, imported
    DIR[:weight]                       a folder that `finetune --objective reward` left

A function is called for one answer at a time, by keyword, with what it names of `prompt`,
`completion` and the row's further fields. It is code that this library did not write: it may raise,
return nonsense, end the process, or never return. Each of these costs that one answer its reward
(`Scored.value` is None and `why` says so with the row's file:line), and the rest are scored. If
every answer of a call fails, the reward is broken and not the answers: that is an error.

Ref: Ouyang et al. 2022, arXiv:2203.02155, section 3.5, for a trained reward.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lora_core.data import Tokenizer
from lora_core.files import sha256_file
from lora_core.objectives.reward_calls import call_reward, can_limit, folder_kept, read_number
from lora_core.objectives.score import has_score_head
from lora_core.targets import nearest

TIMEOUT = 10.0  # seconds a call may take
_CHECKED: dict[Path, ModuleType] = {}  # files that `check` has run, and that `open` need not


@dataclass(frozen=True)
class Sample:
    """An answer to be rewarded."""

    where: str
    """file:line of the prompt's row"""
    prompt: str | list[dict[str, Any]]
    """as it was written"""
    completion: str
    """the answer's text, special tokens left out"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """the row's further fields"""
    prompt_ids: tuple[int, ...] = ()
    """tokens of the prompt as the model saw them"""
    completion_ids: tuple[int, ...] = ()
    """tokens of the answer, the one that ended it included"""
    ended: bool = True
    """whether it ended by itself and was not cut"""


@dataclass(frozen=True)
class Scored:
    """The reward of an answer."""

    value: float | None
    """the weighted sum of the parts; None where one of them failed"""
    parts: dict[str, float] = field(default_factory=dict)
    """each reward's own number, by name"""
    why: str | None = None
    """why there is no value, beginning with the row's file:line"""


Score = Callable[[Sequence[Sample]], list[tuple[float | None, str | None]]]


@dataclass(frozen=True)
class _Part:
    """One reward of a sum."""

    name: str
    weight: float
    score: Score
    file: Path | None = None
    """what a run's facts hash"""
    note: str | None = None
    """what a user should know of it"""


class Rewards:
    """A weighted sum of rewards.

    Args:
        parts: at least one; made by `open` or of functions by `of`.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = list(parts)

    @classmethod
    def of(cls, function: Callable[..., Any], timeout: float = TIMEOUT) -> "Rewards":
        """The reward that a Python function gives."""
        name = getattr(function, "__name__", type(function).__name__)
        return cls([_Part(name, 1.0, _by_function(function, timeout))])

    @classmethod
    def open(
        cls,
        specs: Sequence[str],
        timeout: float = TIMEOUT,
        model: nn.Module | None = None,
        tok: Tokenizer | None = None,
        device: torch.device | None = None,
        base: tuple[str, str | None] | None = None,
    ) -> "Rewards":
        """Rewards by their words on the command line.

        Args:
            specs: see the module.
            timeout: seconds that a function may take for an answer.
            model: the policy, on whose base a reward adapter of the same base is put.
            tok: its tokenizer.
            device: of a reward model with a base of its own.
            base: the policy's base: its folder, and its 4-bit code or None.

        Raises:
            ValueError: no spec, one that names nothing, or names that repeat.
            FileNotFoundError: a file or folder is missing.
        """
        _some(specs)
        if not timeout > 0:
            raise ValueError(f"a reward's timeout must be above 0 seconds; got {timeout}")
        parts = [_opened(spec, timeout, model, tok, device, base) for spec in specs]
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards are told apart by name, and these repeat: {names}")
        return cls(parts)

    @staticmethod
    def check(specs: Sequence[str]) -> None:
        """Find out before a model is loaded that a word names no reward; errors as `open`'s."""
        _some(specs)
        for spec in specs:
            words, _ = _split(spec)
            place, source = Path(words), words.rpartition(":")[0]
            if not place.is_dir():
                _opened(spec, TIMEOUT, None, None, None, None)
                if source.endswith(".py"):
                    _CHECKED[Path(source).resolve()] = sys.modules[_name(source)]
            elif not has_score_head(place):
                raise ValueError(
                    f"--reward {spec!r} is no reward model: its folder has no adapter with a score "
                    "head; train one with finetune --objective reward"
                )

    def __call__(self, samples: Sequence[Sample]) -> list[Scored]:
        """Score answers.

        Raises:
            ValueError: none of them could be scored.
        """
        scored = self.score(samples)
        refuse_none(scored)
        return scored

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """Score answers, whether or not any could be."""
        by_part = [part.score(samples) for part in self.parts]
        return [
            self._sum(sample, found)
            for sample, found in zip(samples, zip(*by_part, strict=True), strict=True)
        ]

    def _sum(self, sample: Sample, found: Sequence[tuple[float | None, str | None]]) -> Scored:
        parts, total, whys = {}, 0.0, []
        for part, (number, why) in zip(self.parts, found, strict=True):
            if number is None:
                whys.append(f"{part.name}: {why}")
            else:
                parts[part.name] = number
                total += part.weight * number
        if whys:
            return Scored(None, parts, f"{sample.where}: {'; '.join(whys)}")
        return Scored(total, parts)

    def facts(self) -> dict[str, Any]:
        """What a run's record says of its rewards: weights, and hashes of their files."""
        return {
            part.name: {
                "weight": part.weight,
                "sha256": None if part.file is None else sha256_file(part.file),
            }
            for part in self.parts
        }

    def notes(self) -> list[str]:
        """What a user should know before a run."""
        found = [part.note for part in self.parts if part.note is not None]
        if not can_limit():
            found.append("a reward's time is not limited here: that takes the main thread, alarms")
        return found


def refuse_none(scored: Sequence[Scored]) -> None:
    """Refuse a reward that is broken; ValueError where no answer has one."""
    if scored and all(one.value is None for one in scored):
        raise ValueError(
            f"none of {len(scored)} answers could be rewarded; the first: {scored[0].why}"
        )


def _by_function(function: Callable[..., Any], timeout: float) -> Score:
    def score(samples: Sequence[Sample]) -> list[tuple[float | None, str | None]]:
        found = []
        for sample in samples:
            given = {**sample.fields, "prompt": sample.prompt, "completion": sample.completion}
            found.append(call_reward(function, given, timeout))
        return found

    return score


def _opened(
    spec: str,
    timeout: float,
    model: nn.Module | None,
    tok: Tokenizer | None,
    device: torch.device | None,
    base: tuple[str, str | None] | None,
) -> _Part:
    """The reward that a word of the command line names."""
    words, weight = _split(spec)
    place = Path(words)
    if place.is_dir():
        from lora_core.objectives.reward_model import RewardModel

        judge = RewardModel.open(place, model, tok, device, base)

        def score(samples: Sequence[Sample]) -> list[tuple[float | None, str | None]]:
            return [read_number(number) for number in judge.score(samples)]

        weights = sorted(place.glob("*.safetensors"))
        return _Part(place.name, weight, score, weights[0] if weights else None, judge.said)
    source, colon, name = words.rpartition(":")
    if not colon:
        raise ValueError(
            f"--reward {spec!r} is no folder and names no function: write FILE.py:FUNCTION, "
            "PACKAGE.MODULE:FUNCTION or a reward adapter's folder"
        )
    module = _module(source, spec)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"--reward {spec!r}: no function {name!r} there; {nearest(name, known)}")
    file = getattr(module, "__file__", None)
    return _Part(
        name, weight, _by_function(function, timeout), None if file is None else Path(file)
    )


def _split(spec: str) -> tuple[str, float]:
    """A spec's words, and the weight behind them, 1 where there is none."""
    words, colon, last = spec.rpartition(":")
    try:
        weight = float(last) if colon else None
    except ValueError:
        weight = None
    if weight is None or not math.isfinite(weight):  # a function may be called nan
        return spec, 1.0
    if weight == 0:
        raise ValueError(f"--reward {spec!r}: a weight is a number other than 0; got {last}")
    return words, weight


def _some(specs: Sequence[str]) -> None:
    """Refuse a run without a reward."""
    if not specs:
        raise ValueError(
            "no reward: give --reward FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION or the folder "
            "of a reward adapter"
        )


def _name(source: str) -> str:
    """The name under which a file's module is known."""
    return f"lora_core_reward_{Path(source).stem}"


def _module(source: str, spec: str) -> ModuleType:
    """A module by its file or by its name."""
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ImportError as error:
            raise ValueError(f"--reward {spec!r}: {error}") from None
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"--reward {spec!r}: no file {file}")
    if (checked := _CHECKED.pop(file.resolve(), None)) is not None:
        return checked
    name = _name(source)
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickles inside look it up
    try:
        with folder_kept():
            found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the file's own
        raise ValueError(
            f"--reward {spec!r}: the file does not run: {type(error).__name__}: {error}"
        ) from None
    return module
