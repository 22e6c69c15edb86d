"""The bandwidth at which this machine reads memory: the limit that the shares refer to.

`stream.c` adds up a large buffer on the operators' own threads, and this tries ways to read and
keeps the best. Without a C compiler `torch.sum` reads instead, which reaches a little less.
"""

import ctypes
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from lora_kernels.cpu import machine, toolchain

BYTES = 256 << 20  # eight times a large cache
# bytes a piece, bytes ahead: with and without prefetches in software
WAYS = ((1 << 18, 0), (1 << 20, 0), (1 << 18, 4096), (1 << 20, 4096), (1 << 20, 8192))
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # its multiples have every bit in use


class WrongSum(RuntimeError):
    """The buffer was not read as a whole: the time of it is none."""


@dataclass(frozen=True)
class Reader:
    """The best of several ways to read a buffer."""

    way: str
    words: torch.Tensor
    """int64, the buffer"""
    read: Callable[[torch.Tensor], int]
    """gives back the sum of the words"""
    seconds: harness.Timing
    """of one pass, when the way was chosen"""

    def __call__(self, _: object = None) -> None:
        """Read it once."""
        self.read(self.words)

    def __str__(self) -> str:
        times = (self.seconds.median, self.seconds.high, self.seconds.low)
        rate, low, high = (self.words.nbytes / seconds / 1e9 for seconds in times)
        return f"{rate:.1f} GB/s [{low:.1f}, {high:.1f}], {self.way}"


def best_reader(repeats: int, nbytes: int = BYTES) -> Reader:
    """Read a buffer in every way, in turns, and keep the way with the best median.

    Args:
        repeats: passes of each way.
        nbytes: of the buffer, a multiple of 256.

    Returns:
        The best way, with the buffer.

    Raises:
        WrongSum: a pass did not read everything.
    """
    words = torch.arange(nbytes // 8).mul_(ODD)
    total = int(words.sum())
    ways, why_not = _ways_in_c()
    if why_not is not None:
        ways = {f"torch.sum ({why_not})": lambda buffer: int(buffer.sum())}
    for name, read in ways.items():
        if (read(words) - total) % (1 << 64):
            raise WrongSum(f"{name} has not read the whole buffer")
    timings = harness.time_in_turns(ways, {name: [words] for name in ways}, repeats)
    best = min(timings, key=lambda name: timings[name].median)
    return Reader(best, words, ways[best], timings[best])


def _ways_in_c() -> tuple[dict[str, Callable[[torch.Tensor], int]], str | None]:
    """Functions that read a buffer and give back its sum, or why there are none."""
    try:
        run = _library().lora_stream
    except (toolchain.BuildError, OSError) as error:
        return {}, str(error)
    run.argtypes = [ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return {
        f"pieces of {piece >> 10} KiB"
        + (f", {ahead} bytes prefetched" if ahead else ", no prefetch"): functools.partial(
            _read, run, piece, ahead
        )
        for piece, ahead in WAYS
    }, None


@functools.cache
def _library() -> ctypes.CDLL:
    """`stream.c` and the pool, built as the operators are and for the best instruction set."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for file in (
            here / "stream.c",
            *(toolchain.SOURCES / name for name in ("pool.c", "pool.h")),
        ):
            shutil.copy(file, folder)
        built = toolchain.build(machine.choose(None), Path(folder))
    return ctypes.CDLL(str(built.path))


def _read(run: Callable[..., int], piece: int, ahead: int, words: torch.Tensor) -> int:
    found = ctypes.c_uint64()
    where, count = words.data_ptr(), words.nbytes
    code = run(torch.get_num_threads(), where, count, piece, ahead, ctypes.byref(found))
    if code:
        raise WrongSum(f"reading {count} bytes in pieces of {piece} failed with error {code}")
    return found.value
