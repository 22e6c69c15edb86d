"""A run's folder: what is written into `out` beside the checkpoints, and by whom.

Of several processes the first one alone writes, and holds the folder's lock; the others wait for
what comes of it, so that a full disk or a folder in use stops all of them with one line.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.files import folder_lock, sweep
from lora_core.report import plot_loss
from lora_core.train.config import TrainConfig
from lora_core.train.ranks import RankError, Ranks, is_broken
from lora_core.train.report import write_batches, write_run
from lora_core.train.sources import BatchSource
from lora_core.train.state import Checkpoints, Loaded, Progress
from lora_core.train.step import NonFiniteError

# fields in which a continuing run may differ from the one that wrote the checkpoint
_FREE = {"out", "resume", "progress", "epochs", "steps", "save_every", "keep"}
_FREE |= {"patience", "keep_best"}
# these change memory and no bit, and are what a run that ran out of it is told to change
_FREE |= {"probe", "activation_checkpointing", "offload_activations"}


def fixed(config: TrainConfig) -> dict[str, object]:
    """The settings that a continuing run has to share."""
    return {k: v for k, v in config.to_dict().items() if k not in _FREE}


class RunFolder:
    """The folder of a run, or none: then nothing is written.

    Args:
        config: of the run; out and keep are used.
        ranks: its processes.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.path = None if config.out is None else Path(config.out)
        self.checkpoints = (
            None if self.path is None else Checkpoints(self.path / "checkpoints", config.keep)
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder for the block, and say what is left if a process dies.

        Raises:
            RankError: another process of the run failed or is gone.
            ValueError: another run works in the folder.
            OSError: it cannot be made or written; says what is left.
        """
        path = self.path
        with contextlib.ExitStack() as stack:
            if path is not None:
                self.ranks.on_first(lambda: self._enter(path, stack))
            try:
                yield
            except OSError as error:
                raise OSError(f"{error}{self.left()}") from error
            except RuntimeError as error:
                if self.ranks.world == 1 or not is_broken(error):
                    raise
                gone = self.ranks.missing(error)
                raise RankError(f"{gone}{self.left()}", gone.speaks) from None

    @staticmethod
    def _enter(path: Path, stack: contextlib.ExitStack) -> None:
        try:
            stack.enter_context(folder_lock(path))
            for folder in (path, path / "checkpoints"):
                sweep(folder)
        except OSError as error:
            raise OSError(
                f"cannot write into {path}: {error.strerror}; choose another folder"
            ) from None

    def file(self, name: str) -> Path | None:
        """A file of the folder, where this process is to write one."""
        return self.path / name if self.path is not None and self.ranks.first else None

    def begin(self, done: int, facts: Mapping[str, Any]) -> None:
        """Clear away what comes after step `done`, and write run.json.

        Raises:
            ValueError: a run that begins would wipe out one that can be continued.
        """
        path, checkpoints = self.path, self.checkpoints
        if path is None or checkpoints is None:
            return

        def write() -> None:
            checkpoints.refuse_unfinished(done)
            checkpoints.drop_after(done)
            write_run(path, self.config.to_dict(), facts)

        self.ranks.on_first(write)

    def newest(self) -> Loaded | None:
        """The newest good checkpoint, which the first process chooses and all read.

        Raises:
            RankError: this process does not find what the first one does.
        """
        checkpoints = self.checkpoints
        assert checkpoints is not None  # the configuration checks it
        loaded: list[Loaded | None] = [None]

        def choose() -> Path | None:
            loaded[0] = checkpoints.newest_good()
            return None if loaded[0] is None else loaded[0].path

        path = self.ranks.on_first(choose)
        failure: Exception | None = None
        if path is not None and not self.ranks.first:
            try:
                loaded[0] = Loaded.read(path)
            except (ValueError, OSError) as error:
                failure = RankError(
                    f"rank {self.ranks.rank} cannot read {path} ({error}): all processes need the "
                    "folder of the run, on a file system they share"
                )
        self.ranks.agree(failure)
        return loaded[0]

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: Mapping[str, Any],
        source: BatchSource | None = None,
    ) -> None:
        """Write a checkpoint, if there is a folder; arguments as `Checkpoints.save`'s."""
        if self.checkpoints is not None:
            held = (parameters, optimizer, scaler)
            self.checkpoints.save(progress, *held, identity, self.ranks, source)

    def resume(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: Mapping[str, Any],
        source: BatchSource | None = None,
    ) -> Progress | None:
        """Put the newest good checkpoint back.

        Returns:
            Where it stands; None where there is none.

        Raises:
            ValueError: it is another run's.
        """
        loaded = self.newest()
        if loaded is None:
            self.ranks.say(f"nothing to resume in {self.path}: starting afresh")
            return None
        loaded.check_identity(identity)
        loaded.restore(parameters, optimizer, scaler, self.ranks, source)
        return loaded.progress

    def plot(self, progress: Progress) -> None:
        """Draw the history beside the metrics, or say why not."""
        path = self.file("loss.png")
        why = None if path is None else plot_loss(progress.history, path)
        if why is not None:
            self.ranks.say(why)

    def explain(self, error: NonFiniteError, progress: Progress) -> NonFiniteError:
        """The error with the step in it, its batches written to the run's folder."""
        step = len(progress.history) + 1
        rows = [r for b in error.batches if isinstance(b, Mapping) for r in b.get("row", [])]
        text = f"{error} at step {step}"
        if rows:
            text += f", rows {rows[:8]}{' …' if len(rows) > 8 else ''} of the data"
        if self.path is not None:
            whose = f"-rank{self.ranks.rank}" if self.ranks.rank else ""
            folder = self.path / f"bad-step-{step:08d}{whose}"
            write_batches(folder, error.batches, text)
            text += f"; the batch is in {folder}"
        return NonFiniteError(f"{text}; lower lr, or look at the data", error.batches)

    def left(self) -> str:
        """What is left of a run that breaks off, in words to end a message with."""
        good = None if self.checkpoints is None else self.checkpoints.published()
        if good is None:
            return "; there is no checkpoint to resume"
        return f"; the last good checkpoint is {good}; resume with --resume"
