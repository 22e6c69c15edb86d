"""The options of `--objective heads`, and the words of the command line behind them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from lora_core.targets import nearest


@dataclass(frozen=True, kw_only=True)
class HeadsOptions:
    """How heads read the backbone, and how tasks meet."""

    pooling: Literal["pooled", "first", "last", "mean"] | None = None
    """What a sequence head reads: the pooler's output, the first or last token, or the mean; none:
    an encoder's pooler or first token, a decoder's last."""
    head_dropout: float | None = None
    """Dropout of what a head reads; none: the encoder's own, 0 for a decoder."""
    window_overlap: int = 64
    """Tokens that neighbouring windows of a long context share."""
    eval_tasks: str | None = None
    """Files to evaluate on, by task: topic=a.jsonl,tags=b.jsonl; none: eval_fraction of each."""
    mixing: Literal["proportional", "balanced"] = "proportional"
    """Shares of the tasks' batches: by their sizes and --data's weights, or all alike."""
    mix_temperature: float = 1.0
    """Sizes count to the power of one over this, 1 or more; higher moves towards equal shares."""
    task_weights: str | None = None
    """Weights of the tasks' losses: topic=2,tags=0.5; 1 where none is given."""
    task_rates: str | None = None
    """Factors on the learning rate, by task, or adapters: topic=10,adapters=1."""
    pcgrad: bool = False
    """Take from each task's adapter gradient what conflicts with another task's (PCGrad)."""

    def __post_init__(self) -> None:
        if self.head_dropout is not None and not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout must be in [0, 1); got {self.head_dropout}")
        if self.window_overlap < 0:
            raise ValueError(f"window_overlap must not be negative; got {self.window_overlap}")
        if not 1 <= self.mix_temperature < math.inf:
            raise ValueError(f"mix_temperature must be 1 or more; got {self.mix_temperature}")
        if self.mixing == "balanced" and self.mix_temperature != 1:
            raise ValueError("mix_temperature belongs to mixing proportional: leave one out")
        self.weights()
        self.rates()

    def weights(self) -> dict[str, float]:
        """Task -> weight of its loss."""
        return numbers("task_weights", self.task_weights)

    def rates(self) -> dict[str, float]:
        """Task or "adapters" -> factor on the learning rate."""
        return numbers("task_rates", self.task_rates)

    def eval_files(self, tasks: Collection[str]) -> dict[str, str]:
        """Task -> file to evaluate on.

        Raises:
            ValueError: of an unknown task.
        """
        files = pairs("eval_tasks", self.eval_tasks)
        check_tasks("eval_tasks", files, tasks)
        return files


def pairs(name: str, text: str | None) -> dict[str, str]:
    """`a=x,b=y` as {"a": "x", "b": "y"}; ValueError for anything else, or a name twice."""
    found: dict[str, str] = {}
    for entry in (text or "").split(",") if text else ():
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{name}: {entry!r} is not TASK=VALUE, as in topic=2,tags=1")
        if key in found:
            raise ValueError(f"{name} names {key!r} twice")
        found[key] = value
    return found


def numbers(name: str, text: str | None) -> dict[str, float]:
    """`a=1,b=2` as numbers above 0; ValueError for anything else."""
    found = {}
    for key, value in pairs(name, text).items():
        try:
            found[key] = float(value)
        except ValueError:
            found[key] = math.nan
        if not 0 < found[key] < math.inf:
            raise ValueError(f"{name}: {key} must have a number above 0; got {value!r}")
    return found


def check_tasks(name: str, given: Mapping[str, object], tasks: Collection[str]) -> None:
    """Refuse a task that there is not; ValueError names the nearest."""
    for task in given:
        if task not in tasks:
            raise ValueError(f"{name}: no task {task!r}; {nearest(task, list(tasks))}")
