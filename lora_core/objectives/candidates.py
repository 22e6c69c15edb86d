"""The file that sampled answers are kept in while they come, and what became of each prompt.

Two files. `rows.jsonl` holds nothing but rows to train on, so that `finetune --data` takes it as it
is. `rows.progress.jsonl` has a line for each prompt that is done, with all its answers and their
rewards, what was dropped and why, and how long the rows' file was then; its first line says what
they were sampled with. Rows are written before their prompt's line. A call that goes on cuts off
the rows of a prompt that was being written when the last one was killed, and samples that prompt
anew: its answers have seeds of their own, so they are the same again.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.evaluate.estimate import Estimate, mean
from lora_core.evaluate.row_log import RowLog

FORMAT = "lora-core samples 1"


@dataclass
class Tally:
    """What became of the answers so far."""

    prompts: int = 0
    sampled: int = 0
    kept: int = 0
    without: int = 0
    """prompts none of whose answers was kept"""
    dropped: Counter[str] = field(default_factory=Counter)
    """reason -> answers"""
    rewards: list[float] = field(default_factory=list)
    """each prompt's mean reward, of prompts with a rewarded answer"""
    first_failure: str | None = None
    """why the first answer without a reward has none"""

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a prompt's line."""
        self.prompts += 1
        self.sampled += line["sampled"]
        self.kept += line["kept"]
        self.without += line["kept"] == 0
        self.dropped.update(line["dropped"])
        numbers = [reward for reward in line["rewards"] if reward is not None]
        if numbers:
            self.rewards.append(sum(numbers) / len(numbers))
        self.first_failure = self.first_failure or line.get("why")

    @property
    def reward(self) -> Estimate | None:
        """Mean reward of all answers, over prompts; None: nothing was rewarded."""
        return mean(self.rewards, unit="prompts") if self.rewards else None

    def lines(self) -> list[str]:
        """The same in words."""
        said = [f"{self.prompts} prompts, {self.sampled} answers sampled, {self.kept} kept"]
        said += [f"  dropped: {count} {reason}" for reason, count in sorted(self.dropped.items())]
        if self.without:
            said.append(f"  {self.without} of {self.prompts} prompts have no kept answer")
        if self.reward is not None:
            said.append(f"  mean reward of all answers: {self.reward}")
        if self.first_failure is not None:
            said.append(f"  the first without a reward: {self.first_failure}")
        return said

    def facts(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {
            "prompts": self.prompts,
            "sampled": self.sampled,
            "kept": self.kept,
            "prompts_without": self.without,
            "dropped": dict(sorted(self.dropped.items())),
            "reward": None if self.reward is None else self.reward.facts(),
            "first_failure": self.first_failure,
        }


class CandidateFile:
    """Kept answers on disk, and the prompts that are done.

    Args:
        path: the rows' JSON Lines file; its folder must exist.
        settings: what the answers depend on, JSON values by name.

    Attributes:
        tally: what became of the answers so far.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: rows of other settings, or of another origin.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.beside = path.with_suffix(".progress.jsonl")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: no folder {path.parent}")
        held = path.stat().st_size if path.exists() else 0
        if held and not self.beside.exists():
            raise ValueError(
                f"{path} holds rows, and no {self.beside.name} says what made them: write to "
                "another file"
            )
        self.progress = RowLog(self.beside, {"format": FORMAT, **settings})
        done = [line for _, line in self.progress.kept]
        size = done[-1]["bytes"] if done else 0
        if held < size:
            raise ValueError(
                f"{path} has {held} bytes, and had {size} when its last prompt was done: it was "
                f"changed since; write to another file, or remove it and {self.beside.name}"
            )
        if held > size:
            os.truncate(path, size)  # rows of a prompt that was not done
        path.touch()
        self.rows = RowLog(path)
        self.kept = [row for _, row in self.rows.kept]
        self.done = {line["prompt"] for line in done}
        self.tally = Tally()
        for line in done:
            self.tally.add(line)

    def add(self, number: int, rows: Sequence[Mapping[str, Any]], line: Mapping[str, Any]) -> None:
        """Write a prompt's rows, and then that it is done."""
        for row in rows:
            self.rows.append(row)
        whole = {"prompt": number, "kept": len(rows), **line, "bytes": self.path.stat().st_size}
        self.progress.append(whole)
        self.done.add(number)
        self.tally.add(whole)
