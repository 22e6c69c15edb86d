"""Checkpoints that a run can be continued from bit for bit.

`out/checkpoints/step-00000120/` holds

    weights.safetensors     the trained parameters by name
    optimizer.safetensors   the optimizer's tensors as `<parameter number>.<name>`
    rng.safetensors         torch's generators, CPU and CUDA; `rank1/…`: those of further processes
    state.json              position, best evaluation, optimizer's groups, Python's and NumPy's
                            generators, loss scale, configuration
    source.safetensors      what the source of batches remembers, where it does (in state.json too)
    history.jsonl           one record a step so far
    manifest.json           SHA-256 and size of each file above

The folder is written aside and renamed, then named in `checkpoints/latest`. Reading checks every
file against the manifest; a folder that fails is passed over with a warning that says why, and the
one before it is used. The frozen base is not saved: it is the model the caller gave.

Of several processes the first one writes; what they hold in parts is gathered, so the files are
those of one process but for the generators. All read.
"""

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.files import LATEST, atomic_folder, latest, publish, sha256_file
from lora_core.train.parts import wholes
from lora_core.train.ranks import Ranks
from lora_core.train.snapshot import (
    generators,
    optimizer_tensors,
    restore_generators,
    restore_optimizer,
    restore_weights,
    write_tensors,
)
from lora_core.train.sources import BatchSource, StatefulSource

FORMAT = 2  # 2: generators of every process
_FILES = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


class OtherFormatError(ValueError):
    """A checkpoint that another version of this library wrote: not damaged, but not readable."""


@dataclass
class Progress:
    """Where a run stands; all that is needed beside weights, optimizer and generators."""

    total: int
    """steps of the whole run"""
    step: int = 0
    """steps done"""
    epoch: int = 0
    """epoch of the next step"""
    group: int = 0
    """number of the next step within its epoch"""
    tokens: int = 0
    """tokens fed to the model so far"""
    best_step: int | None = None
    """step of the best evaluation"""
    best_loss: float | None = None
    """its loss"""
    since_best: int = 0
    """evaluations since then"""
    stopped_early: bool = False
    """whether patience ran out"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """one record a step"""

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.total or self.stopped_early


def _of_rank(rank: int, name: str) -> str:
    """The name under which a process's generator is saved; the first one's has its own."""
    return f"rank{rank}/{name}" if rank else name


def _name(step: int) -> str:
    """A name that sorts as the steps do."""
    return f"step-{step:08d}"


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    """out/checkpoints"""
    keep: int = 2
    """newest ones kept; the best is kept beside them"""

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after a step."""
        return self.folder / _name(step)

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: Mapping[str, Any],
        ranks: Ranks | None = None,
        source: BatchSource | None = None,
    ) -> Path:
        """Write and publish a checkpoint, then drop those no longer kept.

        Args:
            progress: where the run stands.
            parameters: the trained ones, by name.
            optimizer: with its state.
            scaler: of the loss.
            identity: configuration and facts that a continuing run has to share.
            ranks: the run's processes, which all call this; by default there is this one.
            source: of the batches; one with a state has it saved.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: it could not be written; the one before it still counts.
        """
        ranks = ranks or Ranks()
        path = self.path(progress.step)
        states, rest = optimizer_tensors(optimizer)
        rng = ranks.gather(generators())
        tensors = {
            "weights.safetensors": wholes(parameters, keep=ranks.first),
            "optimizer.safetensors": wholes(states, keep=ranks.first),
            "rng.safetensors": {
                _of_rank(rank, name): state
                for rank, (found, _) in enumerate(rng)
                for name, state in found.items()
            },
        }
        state = {
            "format": FORMAT,
            "progress": {k: v for k, v in vars(progress).items() if k != "history"},
            "optimizer": rest,
            "rng": [plain for _, plain in rng],
            "scaler": scaler.state_dict(),
            "identity": identity,
        }
        if isinstance(source, StatefulSource):
            tensors["source.safetensors"], state["source"] = source.state()
        ranks.on_first(lambda: self._write(path, tensors, state, progress))
        return path

    def _write(
        self,
        path: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        """Write and publish the files of a checkpoint, and drop old ones."""
        with atomic_folder(path) as aside:
            for name, content in tensors.items():
                write_tensors(aside / name, content)
            (aside / "state.json").write_text(json.dumps(state))
            lines = "".join(json.dumps(record) + "\n" for record in progress.history)
            (aside / "history.jsonl").write_text(lines)
            sizes = {
                f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)}
                for f in sorted(aside.iterdir())
            }
            (aside / "manifest.json").write_text(json.dumps(sizes, indent=1))
        publish(self.folder, path.name)
        self._prune(progress)

    def _steps(self) -> list[Path]:
        """The checkpoints' folders, newest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted((p for p in found if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)

    def _prune(self, progress: Progress) -> None:
        for path in self._steps()[self.keep :]:
            if progress.best_step is None or path != self.path(progress.best_step):
                shutil.rmtree(path)

    def refuse_unfinished(self, step: int) -> None:
        """Keep a run that begins afresh (`step` 0) from wiping out one that can be continued.

        Raises:
            ValueError: there is a good checkpoint of a run that was not finished.
        """
        found = self.newest_good() if step == 0 else None
        if found is not None and not found.progress.finished:
            done = f"step {found.progress.step} of {found.progress.total}"
            raise ValueError(
                f"{self.folder.parent} holds an unfinished run ({done}): resume it, remove "
                f"{self.folder}, or choose another folder"
            )

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints after a step, which the run now makes anew; 0: all of them."""
        for path in self._steps():
            if step == 0 or path.name > _name(step):
                shutil.rmtree(path)
        if step == 0:
            (self.folder / LATEST).unlink(missing_ok=True)
        elif self.published() != self.path(step):
            publish(self.folder, _name(step))  # it named a damaged one

    def published(self) -> Path | None:
        """The checkpoint that was published last, unread; None where there is none."""
        with contextlib.suppress(ValueError, OSError):
            return latest(self.folder)
        return None

    def newest_good(self) -> "Loaded | None":
        """The newest checkpoint that is whole, None without any; damaged ones are named.

        Raises:
            ValueError: the newest one is of another format.
            OSError: there are some, and none can be read at present.
        """
        paths, published = self._steps(), None
        unread: OSError | None = None
        try:
            published = latest(self.folder)
        except ValueError as error:
            warnings.warn(f"{error}; trying the newest checkpoint", stacklevel=2)
        if published is not None:
            # one renamed but not yet published is whole, yet the run did not count on it
            paths = [p for p in paths if p.name <= published.name]
        for path in paths:
            try:
                return Loaded.read(path)
            except OtherFormatError:
                raise
            except (ValueError, OSError) as error:
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    unread = error
                warnings.warn(
                    f"checkpoint {path.name} is damaged ({error}); trying the one before it",
                    stacklevel=2,
                )
        if unread is not None:
            raise unread  # a run that began afresh would remove what may be readable tomorrow
        return None


@dataclass
class Loaded:
    """A checkpoint read from disk and checked."""

    path: Path
    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]
    source: dict[str, Tensor]
    """{} where the source of batches had no state"""

    @staticmethod
    def read(path: Path) -> "Loaded":
        """Read and check one checkpoint.

        Args:
            path: its folder.

        Returns:
            Its content, on the CPU.

        Raises:
            ValueError: a file differs from the manifest.
            OtherFormatError: it was written in another format.
            FileNotFoundError: a file is missing.
        """
        from safetensors.torch import load_file

        manifest = json.loads((path / "manifest.json").read_text())
        for name in _FILES:
            if name not in manifest:
                raise ValueError(f"manifest.json does not list {name}")
        for name, entry in manifest.items():
            size = (path / name).stat().st_size
            if size != entry.get("bytes"):
                raise ValueError(f"{name} has {size} bytes instead of {entry.get('bytes')}")
            if sha256_file(path / name) != entry.get("sha256"):
                raise ValueError(f"{name} differs from its SHA-256 in manifest.json")
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise OtherFormatError(
                f"{path} has format {state['format']}, and this version reads {FORMAT}: continue "
                f"it with the version that wrote it, or remove {path.parent}"
            )
        lines = (path / "history.jsonl").read_text().splitlines()
        remembered = path / "source.safetensors"
        return Loaded(
            path=path,
            progress=Progress(**state["progress"], history=[json.loads(line) for line in lines]),
            weights=load_file(path / "weights.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            rng=load_file(path / "rng.safetensors"),
            state=state,
            source=load_file(remembered) if remembered.name in manifest else {},
        )

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse to continue another run.

        Args:
            identity: of the run that wants to continue, as given to `Checkpoints.save`.

        Raises:
            ValueError: names each value that differs.
        """
        saved = self.state["identity"]
        pairs = [
            (f"{part} {key}", saved.get(part, {}).get(key), value)
            for part, values in identity.items()
            for key, value in values.items()
        ]
        changed = [f"{name} was {old!r}, is {new!r}" for name, old, new in pairs if old != new]
        if changed:
            raise ValueError(
                f"cannot resume {self.path}: {'; '.join(changed)}; use the same values, or another "
                "folder"
            )

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ranks: Ranks | None = None,
        source: BatchSource | None = None,
    ) -> None:
        """Put weights, optimizer, loss scale, generators and source back, on every process.

        Raises:
            ValueError: the model's trained parameters are not those of the checkpoint.
        """
        rank = (ranks or Ranks()).rank
        restore_weights(parameters, self.weights, self.path)
        restore_optimizer(optimizer, self.optimizer, self.state["optimizer"])
        scaler.load_state_dict(self.state["scaler"])
        prefix = _of_rank(rank, "")
        own = {k.removeprefix(prefix): v for k, v in self.rng.items() if k.startswith(prefix)}
        restore_generators(own, self.state["rng"][rank])
        if isinstance(source, StatefulSource) and "source" in self.state:
            source.restore(self.source, self.state["source"])
