"""How one contender's turn is measured on a CPU.

Contenders take turns (`harness.time_in_turns`). A turn is some calls in a row, as in a model, each
on the next of the copies, which together are larger than the caches. Before it everybody rests: the
threads of the contender before may still spin (OpenMP's do, for milliseconds) and would hold a core
that is not theirs. Then some calls are not timed, in which clocks, caches and the contender's own
threads wake up: a decoder calls its layers hundreds of times in a row.
"""

import copy
import itertools
import operator
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.cpu.contenders import environment

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 << 20
TIMES_THE_CACHE = 4
MOST_COPIES = 64
TURN = 2e-2  # seconds that a turn takes at least, if its calls are short
WARM = 1e-2  # seconds of calls before those that are timed
MOST_CALLS = 64  # in a turn
REST = 0.02  # seconds before a turn: four times what libgomp's threads spin here
LONG = 0.05  # seconds after which a call needs none before it
LIMIT = 8.0  # seconds after which no further turn of a task begins, three excepted


def cache_bytes() -> int:
    """Size of the largest cache of the first core."""
    sizes = []
    for file in CACHE.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes, default=UNKNOWN_CACHE)


def copies(held: Any, nbytes: float) -> list[Any]:
    """Something that is held, and as many copies of it as overflow the caches: 1 to 64 in all."""
    count = -(-TIMES_THE_CACHE * cache_bytes() // max(1, int(nbytes)))
    return [held, *(copy.deepcopy(held) for _ in range(min(MOST_COPIES, count) - 1))]


def turns(
    run: Callable[[Any], Any], inputs: Sequence[Any], variables: dict[str, str]
) -> Callable[[Any], float]:
    """A function that measures one turn, in seconds a call.

    Args:
        run: the call, of one of the inputs.
        inputs: what it goes through, going on where the last turn ended.
        variables: the environment in which it runs, set outside the clock.
    """
    following = itertools.cycle(inputs)
    last = 0.0  # seconds a call in the last turn

    def one() -> Any:
        return run(next(following))

    def turn(_: Any) -> float:
        nonlocal last
        if last < LONG:  # a long call outlasts them, and would begin with cold threads of its own
            time.sleep(REST)
        with environment(variables):
            began = time.perf_counter()
            while last < LONG:
                one()
                if time.perf_counter() - began > WARM:
                    break
            first = harness.host_seconds(one)
            more = min(MOST_CALLS, int(TURN / max(first, 1e-9)))
            last = (first + sum(harness.host_seconds(one) for _ in range(more))) / (1 + more)
        return last

    return turn


def in_turns(runs: dict[str, Callable[[Any], float]], repeats: int) -> dict[str, harness.Timing]:
    """Let everybody take `repeats` turns, fewer if they are long."""
    nothing = {name: [None] for name in runs}
    return harness.time_in_turns(runs, nothing, repeats, operator.call, LIMIT)
