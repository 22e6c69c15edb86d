"""What an objective is told of the run it belongs to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from lora_core.data import Tokenizer, parse_columns
from lora_core.train import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Model and data of a run, whatever it trains for."""

    model: str
    """Hugging Face folder of the base model."""
    data: tuple[str, ...]
    """JSONL files, each optionally with :weight."""
    eval_data: str | None = None
    """JSONL file to evaluate on; none: eval_fraction of the data."""
    eval_fraction: float = 0.05
    """Share of the rows that is set aside for evaluation; 0: no evaluation."""
    template: str | None = None
    """Chat template: a built-in name, a file, or Jinja text; none: the tokenizer's own."""
    columns: str | None = None
    """Names of the data's fields: prompt=question,completion=answer."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns are graded: the assistant's, its last one, or everything."""
    max_length: int = 2048
    """Longest row, in tokens."""
    control_text: Literal["drop", "keep"] = "drop"
    """A message that spells a control token: drop its row, counted, or keep it as that token."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("no data: give --data FILE.jsonl (more than one is mixed by weight)")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1); got {self.eval_fraction}")

    @property
    def column_names(self) -> dict[str, str] | None:
        """`columns` as this library's name -> the file's."""
        return None if self.columns is None else parse_columns(self.columns)


@dataclass(kw_only=True)
class Setup:
    """What is known when an objective is asked; `model` and what is done to it come later."""

    settings: DataSettings
    """model and data"""
    training: TrainConfig
    """the loop's settings; `seed` is also the data's"""
    method: str
    """how weights are trained: lora, qlora, full, bottleneck, prompt or prefix"""
    tok: Tokenizer
    """the base's tokenizer, with the run's template"""
    device: torch.device
    """where to compute"""
    out: Path
    """the run's folder"""
    quantize: str | None = None
    """4-bit code of the base; None: it is dense"""
    continued: Path | None = None
    """the adapter's folder that training goes on from; None: a fresh adapter"""
    say: Callable[[str], None] = print
    """prints a line, on one process of several"""
    show: bool = True
    """whether to show progress bars"""

    def bar(self, items: Iterable[T], unit: str, doing: str) -> Iterable[T]:
        """The items, with a progress bar where going through them takes time."""
        if not self.show:
            return items
        from tqdm import tqdm

        return tqdm(items, unit=f" {unit}", desc=doing, delay=1, leave=False)
