"""One task at one shape and number of rows: everybody is judged, then timed in turns.

Each contender's copies of the weight together hold twice the second-level cache; x and dy do not
rotate, as in a model they were written by the operation before. Eager figures are of calls in a
row, launches included; graph figures of the same calls replayed. Floors: the bytes of codes,
scales and activations over the bandwidth of a copy, or the operations over the rate of a large
matrix product, whichever takes longer; both are measured in the same run. The floor is the 4-bit
weight's for every contender, so that shares compare.

A contender that failed its check, or whose result here is off by more than `WRONG`, is not timed.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.gpu.contenders import NESTED, Contender, contenders
from benchmarks.gpu.problem import (
    ADAPTERS,
    DTYPES,
    RANK,
    Lora,
    copied,
    decoded,
    device,
    normal,
    random_lora,
    random_weight,
    rms_error,
    search_codes,
    search_scales,
)
from lora_core.quant.double_quant import dynamic_map
from lora_kernels.blockwise4 import Weight4

WRONG = 0.02  # relative error no 16-bit product has, nor a quantizer beside another
BATCH = 0.003  # seconds of calls between two readings of the clock
FEWEST, MOST = 2, 64  # calls in a batch
REPEATS = 15
LIMIT = 0.05  # seconds a contender and mode, three turns excepted
NO_GRAPH = "no graph: "
spoilt: list[str] = []  # whose capture failed in this process, which should end
Row = dict[str, Any]
Tensors = tuple[Tensor, ...]


class Bench:
    """One weight: its answers, and its copies in every contender's form."""

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        self.n, self.k, self.dtype = n, k, dtype
        self.weight = random_weight(n, k)
        self._forms: dict[str, list[Any]] = {}

    @functools.cached_property
    def w64(self) -> Tensor:
        """W in float64, (N, K)."""
        return decoded(self.weight).double()

    def forms(self, contender: Contender) -> list[Any]:
        """Copies of the weight as a contender keeps it; none if it cannot keep this shape."""
        if contender.form not in self._forms:
            size = int(self.n * self.k * contender.bytes_per_weight)
            count = harness.past_the_cache(size, device())
            held = (contender.hold(copied(self.weight)) for _ in range(count))
            self._forms[contender.form] = [one for one in held if one is not None]
        return self._forms[contender.form]

    @functools.cached_property
    def rooms(self) -> list[Tensor]:
        """16-bit matrices of W's shape to expand into, or to quantize."""
        count = harness.past_the_cache(2 * self.n * self.k, device())
        return [normal(self.n, self.k, seed=9, dtype=self.dtype) for _ in range(count)]


@functools.lru_cache(maxsize=8)
def bench(n: int, k: int, dtype: torch.dtype) -> Bench:
    """The weight of a shape, kept for the next number of rows."""
    return Bench(n, k, dtype)


def inputs_of(task: str, n: int, k: int, m: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What a task takes beside the weight."""
    x, dy = normal(m, k, seed=3, dtype=dtype), normal(m, n, seed=4, dtype=dtype)
    lora = random_lora(n, k, m, mixed=task == "mixed")
    return {
        "forward": (x,),
        "dx": (dy,),
        "step": (x, dy),
        "lora": (x, lora),
        "mixed": (x, lora),
        "lora step": (x, dy, lora),
    }.get(task, ())


def perform(task: str, one: Contender | Any, held: Any, inputs: tuple[Any, ...]) -> Any:
    """Do a task once."""
    if task == "step":
        x, dy = inputs
        return _gradients(lambda x: one.forward(held, x), (x,), dy)
    if task == "lora step":
        x, dy, lora = inputs

        def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return one.lora(held, x, Lora(a, b, lora.scaling, lora.rows))

        return _gradients(product, (x, lora.a, lora.b), dy)
    if task == "expand":
        return one.expand(*held)
    if task == "mixed":
        return one.lora_rows(held, *inputs)
    return getattr(one, task)(held, *inputs)


def _gradients(product: Callable[..., Tensor], inputs: Tensors, dy: Tensor) -> Tensors:
    """y, and its gradients in the inputs."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = product(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def answer(task: str, it: Bench, inputs: tuple[Any, ...]) -> Tensors:
    """A task's results in float64."""
    if task == "expand":
        return (it.w64,)
    if task == "quantize":
        codes, scales = search_codes(it.rooms[0], it.weight.table, 64)
        steps = dynamic_map(device())
        q, absmax, offset = search_scales(scales, steps)
        exact = Weight4(codes, q, it.weight.table, it.n, it.k, 64, absmax, offset, steps)
        return (decoded(exact).double(),)
    if task == "dx":
        return (inputs[0].double() @ it.w64,)
    x = inputs[0].double()
    if task == "forward":
        return (x @ it.w64.t(),)
    if task == "step":
        return (x @ it.w64.t(), inputs[1].double() @ it.w64)
    if task in ("lora", "mixed"):
        return (x @ it.w64.t() + inputs[1].double(x),)
    lora = inputs[2]

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ it.w64.t() + Lora(a, b, lora.scaling, lora.rows).double(x)

    return _gradients(product, (x, lora.a.double(), lora.b.double()), inputs[1].double())


def judge(result: Any, truth: Tensors) -> float:
    """Relative error of whatever a task returned."""
    if isinstance(result, Weight4):
        result = decoded(result)
    return rms_error(result if isinstance(result, tuple) else (result,), truth)


def floor(task: str, n: int, k: int, m: int) -> tuple[float, float]:
    """The fewest bytes and operations of a task."""
    weight, rows, products = NESTED * n * k, 2.0 * m * (n + k), 2.0 * m * n * k
    if task in ("expand", "quantize"):
        return weight + 2.0 * n * k, 0.0
    backward = 2 if "step" in task else 1
    adapters = {"lora": 1, "lora step": 1, "mixed": min(m, ADAPTERS)}.get(task, 0)
    low_rank = 4.0 * RANK * adapters * (n + k)
    # forward and dx each read the weight
    return backward * (weight + rows + low_rank), backward * products


def floor_seconds(work: tuple[float, float], ceilings: dict[str, float]) -> float | None:
    """Seconds that neither memory nor arithmetic can undercut; None where nothing was measured."""
    if not ceilings:
        return None
    return max(work[0] / ceilings["bytes_per_second"], work[1] / ceilings["flops_per_second"])


def measure(job: Row) -> Iterator[Row]:
    """Judge and time everybody who takes part in a job.

    Args:
        job: `task`, `shape`, `m`, `dtype`, `routes` (whether each route takes part by itself),
            `peers`, `refused` (families that failed their check), `banned` (contenders that ended
            a process), `no_graph` (those that could not be captured), `ceilings`, `smoke`.

    Yields:
        One row for each contender and mode, or one that says why there is none.
    """
    task, (n, k), m, dtype = job["task"], job["shape"], job["m"], DTYPES[job["dtype"]]
    it, inputs = bench(n, k, dtype), inputs_of(task, n, k, m, dtype)
    truth = answer(task, it, inputs)
    named = ("kind", "task", "routes", "shape", "m", "dtype")
    facts = {name: job[name] for name in named}
    runs: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {}
    errors: dict[str, float | None] = {}
    everyone = contenders(task, dtype, job["routes"], job["peers"])
    uncapturable = {one.name: why for one in everyone if (why := one.uncapturable.get(task))}
    uncapturable |= dict.fromkeys(job["no_graph"], "it failed before")
    for one in everyone:
        yield {"kind": "trying", "who": one.name}  # whom to blame if nothing comes after it
        held = held_forms(task, one, it)
        if not held:
            continue
        run = functools.partial(_perform_on, task, one, inputs)
        if one.name in job["banned"]:
            yield facts | {"who": one.name, "refused": "it ended an earlier process"}
            continue
        why, error = admitted(one.families.get(task, ""), job["refused"], run, held[0], truth)
        if why:
            yield facts | {"who": one.name, "refused": why, "error": error}
        else:
            runs[one.name], errors[one.name] = (run, held), error
    yield {"kind": "trying", "who": None}
    del truth
    ideal = floor_seconds(work := floor(task, n, k, m), job["ceilings"])
    for mode in ("graph", "eager"):
        for name, timing in timed(runs, mode, job["smoke"], uncapturable):
            if timing is None:
                yield {"kind": "trying", "who": name}
            else:
                row = facts | {"who": name, "mode": mode, "error": errors[name or ""]}
                yield row | _figures(timing, ideal, work[1])


def _figures(timing: harness.Timing | str, ideal: float | None, operations: float) -> Row:
    if isinstance(timing, str):
        return {"refused": timing}
    return {
        "seconds": [timing.median, timing.low, timing.high],
        "share_of_floor": None if ideal is None else ideal / timing.median,
        "tflops": operations / timing.median / 1e12,
    }


def held_forms(task: str, one: Contender, it: Bench) -> list[Any]:
    """What rotates: copies of the weight, with a room each to expand into, or rooms to quantize."""
    if task == "quantize":
        return it.rooms
    forms = it.forms(one)
    if task != "expand":
        return forms
    # an empty room, to be expanded into, must not be one that is quantized
    rooms = [torch.empty_like(room) for room in it.rooms]
    return [(form, rooms[i % len(rooms)]) for i, form in enumerate(forms)]


def _perform_on(task: str, one: Contender, inputs: tuple[Any, ...], held: Any) -> Any:
    with torch.set_grad_enabled("step" in task):
        return perform(task, one, held, inputs)


def admitted(
    family: str, refused: list[str], run: Callable[[Any], Any], held: Any, truth: Tensors
) -> tuple[str | None, float | None]:
    """Why a contender is not timed, or None, and its error."""
    if family in refused:
        return f"the check of {family} did not pass", None
    try:
        error = judge(run(held), truth)
    except Exception as problem:  # noqa: BLE001  a kernel can fail in any way; the rest goes on
        alive()
        return described(problem), None
    if math.isnan(error) or error > WRONG:
        return f"wrong: relative error {error:.3g}", error
    return None, error


def described(problem: BaseException) -> str:
    """An exception in one line."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:200]}"


def alive() -> None:
    """Raise if an earlier kernel has broken the device's context: nothing after it would count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _calls(call: Callable[[], Any], stopwatch: harness.Stopwatch, fewest: int = FEWEST) -> int:
    """Calls that make a batch of the length wanted; the first one may still set something up."""
    once = min(stopwatch(call) for _ in range(2))
    return int(min(MOST, max(fewest, BATCH / once)))


def timed(
    runs: dict[str, tuple[Callable[[Any], Any], list[Any]]],
    mode: str,
    smoke: bool,
    uncapturable: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[str | None, harness.Timing | str | None]]:
    """Time everybody in turns in one mode.

    Args:
        runs: name to function and what it rotates through.
        mode: "eager" or "graph".
        smoke: whether one call is enough.
        uncapturable: name to why no graph can hold it.

    Yields:
        A name and its timing, or a string that says why there is none, or None before it is tried.
    """
    stopwatch = harness.device_seconds if device().type == "cuda" else harness.host_seconds
    batches: dict[str, Callable[[Any], Any]] = {}
    calls: dict[str, int] = {}
    for name, (run, held) in runs.items():
        yield name, None
        wanted = 1 if smoke else _calls(functools.partial(run, held[-1]), stopwatch)
        if mode == "eager":
            batches[name], calls[name] = harness.in_a_row(run, held, wanted), wanted
            continue
        if name in uncapturable and device().type == "cuda":
            yield name, f"{NO_GRAPH}{uncapturable[name]}"
            continue
        if spoilt:  # says nothing about this one, which the next process will capture
            yield name, f"not captured after the failure of {spoilt[0]}"
            continue
        try:
            graph = harness.captured(run, held, wanted)
        except harness.CaptureError as problem:
            alive()
            spoilt.append(name)
            yield name, f"{NO_GRAPH}{problem}"
            continue
        # one launch of a graph takes as long as a few small kernels: many follow each other
        replays = 1 if smoke else _calls(functools.partial(graph, None), stopwatch, fewest=1)
        batches[name] = harness.in_a_row(graph, (None,), replays)
        calls[name] = replays * -(-wanted // len(held)) * len(held)
    yield None, None
    repeats, limit = (1, None) if smoke else (REPEATS, LIMIT * len(batches))
    none = dict.fromkeys(batches, (None,))
    timings = harness.time_in_turns(batches, none, repeats, stopwatch, limit)
    for name, timing in timings.items():
        per_call = (value / calls[name] for value in (timing.median, timing.low, timing.high))
        yield name, harness.Timing(*per_call)
