"""What a run leaves to look at: metrics.jsonl, run.json, and a line while it works."""

import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_core.files import atomic_folder, atomic_write
from lora_core.train.batches import Batch
from lora_core.train.snapshot import write_tensors

_PACKAGES = ("lora-core", "torch", "triton", "safetensors", "tokenizers", "numpy", "transformers")


Record = dict[str, Any]
"""What is known of one step."""


@dataclass
class TrainResult:
    """What a run did, the resumed part included."""

    history: list[Record] = field(default_factory=list)
    """one record a step: step, epoch, loss, lr, grad_norm, graded, tokens, times; eval_loss"""
    steps: int = 0
    """optimizer steps done"""
    tokens: int = 0
    """tokens fed to the model, padding not counted"""
    tokens_per_second: float = 0.0
    """of this process, evaluations and checkpoints not counted"""
    peak_memory: int = 0
    """bytes: the GPU allocator's peak, or the process's resident peak"""
    best_step: int | None = None
    """step of the best evaluation"""
    best_loss: float | None = None
    """its loss, per graded token"""
    interrupted: bool = False
    """whether Ctrl-C ended it"""
    stopped_early: bool = False
    """whether patience ran out"""
    resumed_from: int | None = None
    """steps already done when this process began, if it continued a checkpoint"""


_unsaid: list[str] = []  # why nothing is said


def say(text: str) -> None:
    """One line to the user, beside the progress bar and outside of the program's output."""
    if not _unsaid:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def saying(on: bool) -> Iterator[None]:
    """Within the block `say` says nothing unless `on`: of several processes one speaks for all."""
    before = list(_unsaid)
    if not on:
        _unsaid.append("another process says it")
    try:
        yield
    finally:
        _unsaid[:] = before


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages a result may depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working directory, with "+" where it has changes; None outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_run(out: Path, config: Mapping[str, object], facts: Mapping[str, Any]) -> None:
    """Write run.json: what it takes to repeat the run.

    Args:
        out: the run's folder.
        config: the training configuration's fields.
        facts: whatever else the caller knows: command, hashes of data, model and template.
    """
    run = {
        "versions": versions(),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
        "commit": git_commit(),
        "train": dict(config),
        **facts,
    }
    atomic_write(out / "run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")


class Metrics:
    """metrics.jsonl, one record a line, flushed at each."""

    def __init__(self, path: Path | None, history: Sequence[Mapping[str, Any]]) -> None:
        self.stream = None
        if path is not None:
            # lines written after the checkpoint that is continued would be written twice
            atomic_write(path, "".join(json.dumps(record) + "\n" for record in history))
            self.stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed in close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        if self.stream is not None:
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self.stream is not None:
            self.stream.close()


class Bar:
    """The progress bar: loss, tokens/s, peak memory; tqdm adds the time left."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        self.bar: Any = None
        if show:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def update(self, record: Mapping[str, Any]) -> None:
        """Move on by a step."""
        if self.bar is not None:
            shown = {
                "loss": f"{record['loss']:.4f}",
                "tok/s": f"{record['tokens_per_second']:.0f}",
                "peak": f"{record['peak_memory'] / 1e9:.2f}GB",
            }
            if "eval_loss" in record:
                shown["eval"] = f"{record['eval_loss']:.4f}"
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def write_batches(folder: Path, batches: Sequence[Batch], why: str) -> None:
    """Write batches as safetensors, with what is not a tensor in JSON beside them."""
    with atomic_folder(folder) as aside:
        for number, batch in enumerate(batches):
            known = batch if isinstance(batch, list | tuple) else [batch]  # any object may be one
            items = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(known))
            tensors = {str(k): v for k, v in items.items() if isinstance(v, Tensor)}
            rest = {str(k): v for k, v in items.items() if not isinstance(v, Tensor)}
            write_tensors(aside / f"batch-{number}.safetensors", tensors)
            text = json.dumps({"why": why, **rest}, default=str, ensure_ascii=False)
            (aside / f"batch-{number}.json").write_text(text)
