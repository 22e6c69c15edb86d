"""The processes of a run: one by default, several under `torchrun`.

The loop asks this file whatever concerns more than its own process: which batches are its own, what
a number sums to over all of them, whether it is the one that writes. With one process every answer
is the trivial one, so the loop has no branch for it.

An optimizer step takes `accumulate x world` batches in the order one process would read them, and
rank r computes every world-th from the r-th on: the global batch is batch_size x accumulate x world
rows, and one process with accumulate x world makes the same steps. Every process reads all batches
of a step (ids, not activations), so each knows the graded tokens of the whole step and nothing has
to be counted over the network. Losses are divided by that count, so gradients are *summed* over the
ranks; a mean of ranks' means would weigh tokens of a short batch more.

Gradients of replicated weights are summed after the last backward pass, in buckets of fixed layout.
torch's DistributedDataParallel sums them during it, which hides the time that takes: little for an
adapter (80 MB of gradients at 20 M parameters), more for a full fine-tune. For that it lays its
buckets out anew after the first step, by the order in which gradients came, and where a bucket ends
decides in which order three or more ranks are added: a resumed run need not be bit-equal. It also
has to search the graph for parameters that a step does not reach, and puts a wrapper between the
loss and the model. Weights that one process cannot hold are split instead (shard.py).

A process that fails says why in torchrun's key-value store; the others find its words when their
next exchange breaks, or find who does not answer, and end with one line.
"""

import atexit
import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous

from lora_core.train.parts import buckets, is_part
from lora_core.train.report import say, saying

T = TypeVar("T")

BUCKET = 1 << 23  # elements summed in one exchange: 32 MB of float32
_ANSWER = timedelta(seconds=3)  # how long a living process may take to say so
_WORD = "lora_core/failed"
# how gloo's errors, which are plain RuntimeErrors, can be told
_BROKEN = re.compile(
    r"gloo[/\\]|connection (closed|reset|refused)|broken pipe|timed out waiting", re.I
)


class RankError(ValueError):
    """The run cannot go on because of another of its processes.

    `speaks` says whether this process is the one to tell the user: of several that notice, one is
    enough, and none where the process that failed has said it itself.
    """

    def __init__(self, message: str, speaks: bool = False) -> None:
        super().__init__(message)
        self.speaks = speaks


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    """number of this process"""
    world: int = 1
    """number of processes"""
    store: Any = None
    """torch.distributed.Store that all reach, for last words; None with one process"""

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """One line to the user, from the first process alone."""
        if self.first:
            say(text)

    def own(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """The part of a step's batches that this process computes.

        Args:
            batches: of the whole step, the same on every process; at least one.

        Yields:
            (batch, whether it counts). All processes get as many: where none is left for this one,
            it computes the first batch for nothing, as an exchange that not all join never ends.
        """
        for start in range(0, len(batches), self.world):
            mine = start + self.rank
            yield (batches[mine], True) if mine < len(batches) else (batches[0], False)

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Each number summed over all processes, in float64."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(total)
        return tuple(total.tolist())

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.sum(float(flag))[0] > 0

    def agree(self, error: Exception | None) -> None:
        """Stop all processes if one has to.

        Raises:
            Exception: the error, where there is one.
            RankError: another process has one; the text is that of the lowest rank's.
        """
        if self.any(error is not None):
            said: list[str | None] = [None] * self.world
            if self.world > 1:
                distributed.all_gather_object(said, None if error is None else str(error))
            if error is not None:
                raise error
            rank, text = next((rank, text) for rank, text in enumerate(said) if text is not None)
            raise RankError(f"rank {rank}: {text}")

    def gather(self, item: T) -> list[T]:
        """Every process's item in the order of ranks, on the first; [] on the others."""
        if self.world == 1:
            return [item]
        found: list[Any] | None = [None] * self.world if self.first else None
        distributed.gather_object(item, found)
        return found or []

    def on_first(self, action: Callable[[], T]) -> T:
        """Let the first process do something, and all know what came of it.

        Args:
            action: what only one may do, such as writing; returns something small.

        Returns:
            What it returned, on every process.

        Raises:
            Exception: what it raised, on the first process.
            RankError: the same in words, on the others.
        """
        if self.world == 1:
            return action()
        error: Exception | None = None
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = action()
            except Exception as raised:  # noqa: BLE001  # raised again below
                error, box[1] = raised, str(raised)
        distributed.broadcast_object_list(box)
        if error is not None:
            raise error
        if box[1] is not None:
            raise RankError(f"rank 0: {box[1]}")
        result: T = box[0]
        return result

    @torch.no_grad()
    def same_start(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the first one's values, so that all train the same model."""
        if self.world > 1:
            for parameter in parameters:
                distributed.broadcast(parameter.detach(), 0)

    @torch.no_grad()
    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over all processes, each of which has those of its own batches.

        Args:
            parameters: all that are trained, in the same order. One that no process's batches
                reached keeps None, as with one process; those held in parts are summed already.
        """
        if self.world == 1:
            return
        all_of_them = [p for p in parameters if not is_part(p)]
        if not all_of_them:
            return
        reached = torch.tensor([float(p.grad is not None) for p in all_of_them])
        distributed.all_reduce(reached)
        moved = [p for p, n in zip(all_of_them, reached.tolist(), strict=True) if n]
        for bucket in buckets(moved, BUCKET):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([part.reshape(-1) for part in parts])
            distributed.all_reduce(flat)
            pieces = torch.split(flat, [p.numel() for p in bucket])
            for parameter, part, piece in zip(bucket, parts, pieces, strict=True):
                part.copy_(piece.view_as(part))
                parameter.grad = part

    def leave_word(self, error: BaseException) -> None:
        """Say why this process ends, for those that will miss it."""
        text = " ".join(str(error).split()) or type(error).__name__
        # a store that went with the first process takes no words, and the others find out by that
        with contextlib.suppress(RuntimeError):
            self.store.set(_WORD, f"rank {self.rank}: {text}")
            self.store.set(f"{_WORD}/{self.rank}", text)

    def told_by_first(self, error: BaseException) -> bool:
        """Whether the first process ends for the same reason, and says so."""
        if self.first:
            return False
        text = " ".join(str(error).split()) or type(error).__name__
        try:
            self.store.wait([f"{_WORD}/0"], _ANSWER)
            return bool(self.store.get(f"{_WORD}/0").decode() == text)
        except RuntimeError:
            return False

    def missing(self, error: BaseException) -> RankError:
        """What a broken exchange means: whose last words there are, or who does not answer.

        Args:
            error: what the exchange raised.

        Returns:
            The error to raise in its place.
        """
        try:
            if self.store.check([_WORD]):
                return RankError(self.store.get(_WORD).decode())
            self.store.set(f"lora_core/alive/{self.rank}", "")
            gone = [rank for rank in range(self.world) if not self._answers(rank)]
        except RuntimeError:
            gone = [0]  # the store was its
        alive = [rank for rank in range(self.world) if rank not in gone]
        who = f"rank {', '.join(map(str, gone))} is gone" if gone else "a process is gone"
        reason = str(error).strip().splitlines()[0][:200]
        return RankError(f"{who} ({reason})", speaks=self.rank == min(alive, default=self.rank))

    def _answers(self, rank: int) -> bool:
        try:
            self.store.wait([f"lora_core/alive/{rank}"], _ANSWER)
        except distributed.DistStoreError:  # in time it did not
            return False
        return True


def launched() -> bool:
    """Whether torchrun, or what sets its variables, started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs the one with its number on this machine.

    Args:
        device: what the user asked for. An index is kept.

    Raises:
        ValueError: more processes than GPUs.
    """
    if not launched() or device.type != "cuda" or device.index is not None:
        return device
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"process {number} of this machine has no GPU: there are {count}; start "
            f"--nproc-per-node {count}, or use --device cpu"
        )
    return torch.device("cuda", number)


_made: list[Ranks] = []  # once joined, a process stays so until it ends
_within: list[Ranks] = []  # while in a run


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the run's other processes, if torchrun started any; within a joined run, its ranks.

    Exchanges go over gloo for tensors on the CPU and over NCCL for those on a GPU. A process group
    that exists already is used and left.

    Yields:
        The ranks. Processes other than the first keep warnings and notes to themselves.

    Raises:
        RankError: another process failed or is gone.
    """
    ranks = _within[-1] if _within else _found()
    if _within or ranks.world == 1:
        yield ranks
        return
    _within.append(ranks)
    try:
        with warnings.catch_warnings(), saying(ranks.first):
            if not ranks.first:
                warnings.simplefilter("ignore")
            yield ranks
        distributed.barrier()  # the first process holds the store until all are through
    except RankError:
        atexit.unregister(_leave)  # there is nobody to leave in order with
        raise
    except Exception as error:
        atexit.unregister(_leave)
        if is_broken(error):
            raise ranks.missing(error) from None
        ranks.leave_word(error)
        if ranks.told_by_first(error):
            raise RankError(str(error)) from None
        raise
    finally:
        _within.pop()


def _found() -> Ranks:
    """The process group there is, or the one torchrun's variables describe, or this process."""
    if distributed.is_available() and distributed.is_initialized():
        store = distributed.distributed_c10d._get_default_store()
        present = Ranks(distributed.get_rank(), distributed.get_world_size(), store)
        return _made[0] if _made else present
    if not launched():
        return Ranks()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_device(torch.device("cuda")))
    # what init_process_group would do, so as to have the store
    store, rank, world = next(rendezvous("env://"))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    atexit.register(_leave)
    _made.append(Ranks(rank, world, store))
    return _made[0]


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def is_broken(error: BaseException) -> bool:
    """Whether an error says that an exchange with another process broke."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    plain = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (plain and _BROKEN.search(str(error)) is not None)
