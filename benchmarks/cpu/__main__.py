"""4-bit weights on a CPU: right, how fast, and how near to the speed of the memory.

    python -m benchmarks.cpu                        # the weights of a Llama-3-8B layer
    python -m benchmarks.cpu --shape 4096x14336     # others
    python -m benchmarks.cpu --only 'forward m=1$'  # some tasks
    python -m benchmarks.cpu --smoke                # all of it at toy sizes, in seconds

One process, the same weights for all, x in bfloat16, double quantization. `contenders.py` says who
takes part and which path of each library a row is; `check.py` what is right. What is wrong is not
timed, and the command ends with 1. Nothing else should run meanwhile.

A rate in GB/s counts the bytes that have to move: codes and scales (or the dense weight) of a
product with few rows, both sides of quantize and expand. Its share is that of the bandwidth at
which this machine reads a large buffer, which takes a turn among the others. With many rows the
limit is arithmetic, and the rate is in Gflop/s.

`expand` makes a new result at each call, as `dequantize()` does; what the operating system takes to
hand out its pages is part of it, and above 32 MB most of it. `expand kept` writes to the same
memory each time, as the products with many rows do.
"""

import argparse
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora_kernels
from benchmarks import harness
from benchmarks.cpu import check, timing
from benchmarks.cpu.contenders import BF16, Ours, decoded_once, environment, everyone
from benchmarks.cpu.report import STREAM, Row, figures, summary, table
from benchmarks.cpu.stream import BYTES, Reader, best_reader
from benchmarks.gpu.__main__ import LLAMA, shape
from benchmarks.gpu.judge import poisoned
from benchmarks.gpu.problem import normal, random_weight

TOY = ([64, 128],)
TOY_BYTES = 1 << 20
FEW = 8  # rows up to which a product is as fast as the weight can be read
PASSES = 10  # over the buffer, each way to read it


@dataclass(frozen=True)
class Task:
    """What is timed; `kind` is the method of a contender."""

    kind: str
    m: int = 0

    @property
    def label(self) -> str:
        """As `--only` sees it and the records say."""
        return f"{self.kind} m={self.m}" if self.m else self.kind.replace("_", " ")

    @property
    def title(self) -> str:
        """As the tables say."""
        product = {"forward": "x Wᵀ", "dx": "dy W"}.get(self.kind)
        return f"{product}, M = {self.m}" if product else self.label

    def bytes(self, one: Any, n: int, k: int) -> float | None:
        """What has to move; None where arithmetic is the limit."""
        if self.m > FEW:
            return None
        return n * k * (one.bytes_per_weight + (0 if self.m else 2))


TASKS = (
    *(Task("quantize"), Task("expand"), Task("expand_kept")),
    *(Task("forward", m) for m in (1, 8, 64, 512)),
    *(Task("dx", m) for m in (64, 512)),
)


class Problem:
    """One shape: its weight, and what each contender keeps of it."""

    def __init__(self, n: int, k: int) -> None:
        self.n, self.k = n, k
        self.weight = random_weight(n, k)
        self.out = torch.empty(n, k, dtype=BF16)
        self.held: dict[str, list[Any]] = {}

    def copies(self, one: Any) -> list[Any] | None:
        """The weight in a contender's form, past the caches; None if it cannot hold it."""
        if one.form not in self.held:
            first = one.hold(self.weight)
            nbytes = one.bytes_per_weight * self.n * self.k
            self.held[one.form] = [] if first is None else timing.copies(first, nbytes)
        return self.held[one.form] or None


@dataclass(frozen=True)
class Case:
    """One task on one shape: the input that all share, and the answers."""

    problem: Problem
    task: Task
    x: torch.Tensor
    answer: check.Answer | None

    @staticmethod
    def of(problem: Problem, task: Task) -> "Case":
        """Make the input, and what it should lead to."""
        n, k = problem.n, problem.k
        if task.kind == "quantize":
            return Case(problem, task, (0.02 * normal(n, k, seed=5)).to(BF16), None)
        x = normal(task.m, k if task.kind == "forward" else n, seed=3, dtype=BF16)
        if not task.m:
            return Case(problem, task, x, None)
        w = decoded_once(problem.weight)
        return Case(problem, task, x, check.Answer.of(task.kind, x, w))

    @functools.cached_property
    def weights(self) -> list[torch.Tensor]:
        """What is quantized, past the caches."""
        return timing.copies(self.x, self.x.nbytes)

    def row(self, who: str) -> Row:
        """What a record says of what was done."""
        task, shape = self.task, [self.problem.n, self.problem.k]
        return {"task": task.label, "shape": shape, "m": task.m, "who": who}

    def run(self, one: Any) -> tuple[Callable[[Any], Any], list[Any]] | None:
        """A contender's call and the inputs that it goes through; None if it cannot hold W."""
        method = getattr(one, self.task.kind)
        if self.task.kind == "quantize":
            return method, self.weights
        held = self.problem.copies(one)
        if held is None:
            return None
        if self.task.kind == "expand":
            return method, held
        if self.task.kind == "expand_kept":
            return lambda value: method(value, self.problem.out), held
        x = one.prepare(self.x) if hasattr(one, "prepare") else self.x
        return lambda value: method(value, x), held

    def problems(self, one: Any, found: Any) -> Iterator[str]:
        """What is wrong with a result, a line each."""
        if self.task.kind == "quantize":
            yield from check.quantize_problems(found, *self.quantized, isinstance(one, Ours))
        elif self.answer is None:
            yield from check.expand_problems(found, self.problem.weight)
        else:
            yield from self.answer_for(one).problems(found, one.roundings)

    @functools.cached_property
    def quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and float32 scales by the definition."""
        return check.definition(self.x)

    @functools.cached_property
    def answers(self) -> dict[str, check.Answer]:
        """Of those that have a weight of their own."""
        return {}

    def answer_for(self, one: Any) -> check.Answer:
        """The answer that a contender is judged by: its own weight's if it cannot hold NF4."""
        assert self.answer is not None
        if not hasattr(one, "own_weight"):
            return self.answer
        if one.name not in self.answers:
            own = one.own_weight(self.problem.weight)
            self.answers[one.name] = check.Answer.of(self.task.kind, self.x, own)
        return self.answers[one.name]


class Run:
    """One run of the command: who takes part, and the rows."""

    def __init__(self, contenders: Sequence[Any], repeats: int) -> None:
        self.contenders, self.repeats = contenders, repeats
        self.rows: list[Row] = []
        self.absent: dict[tuple[str, str], list[str]] = {}  # who and why, to the tasks

    def shape(self, n: int, k: int, tasks: Sequence[Task], nbytes: int) -> None:
        """Check and time everybody at all tasks on one shape."""
        reader = best_reader(PASSES, nbytes)
        print(f"\n{n} x {k}: the memory streams {reader}")
        problem = Problem(n, k)
        for task in tasks:
            rows = list(self.task(Case.of(problem, task), reader))
            self.rows += rows
            timed = [row for row in rows if "seconds" in row]
            if timed:
                print(table(f"{task.title}, {n} x {k}", timed), flush=True)

    def task(self, case: Case, reader: Reader) -> Iterator[Row]:
        """Check everybody, then let those that are right take turns, and the reader with them."""
        runs: dict[str, Callable[[Any], float]] = {}
        rows: dict[str, Row] = {}
        for one in self.contenders:
            row = self.checked(one, case) if hasattr(one, case.task.kind) else None
            if row is not None and "failure" in row:
                print(f"{row['who']} is wrong at {row['task']}: {row['failure']}")
                yield row
            elif row is not None:
                run, inputs = row.pop("run")
                rows[one.name], runs[one.name] = row, timing.turns(run, inputs, one.variables)
        if runs and case.task.m <= FEW:
            runs[STREAM] = timing.turns(reader, [None], {})
            rows[STREAM] = case.row(STREAM) | {"bytes": reader.words.nbytes, "error": None}
        timings = timing.in_turns(runs, self.repeats)
        limit = reader.words.nbytes / timings[STREAM].median if STREAM in timings else None
        for name, found in timings.items():
            row = rows[name] | {"seconds": [found.median, found.low, found.high]}
            row["share_of_streaming"] = limit and row["bytes"] / found.median / limit
            yield row | {"ours": name == self.contenders[0].name}

    def checked(self, one: Any, case: Case) -> Row | None:
        """A row with `failure`, or with `run` if the result is right; None for who is absent."""
        task, n, k = case.task, case.problem.n, case.problem.k
        row = case.row(one.name)
        try:
            with environment(one.variables), poisoned():
                run = case.run(one)
                if run is None:
                    self.note_absent(one, f"its tiles do not divide {n} x {k}", task)
                    return None
                case.problem.out.fill_(torch.nan)
                found = run[0](run[1][0])
        except Exception as error:  # noqa: BLE001  a peer may lack anything
            said = str(error).strip().splitlines() or [""]
            if isinstance(one, Ours) and "cannot run" not in said[0]:
                return row | {"failure": f"{type(error).__name__}: {said[0]}"}
            self.note_absent(one, said[0][:200], task)
            return None
        problems = list(case.problems(one, found))
        if problems:
            return row | {"failure": "; ".join(problems)}
        error = case.answer_for(one).error(found) if case.answer is not None else None
        return row | {"run": run, "bytes": task.bytes(one, n, k), "error": error}

    def note_absent(self, one: Any, why: str, task: Task) -> None:
        """Remember a line for the end."""
        tasks = self.absent.setdefault((one.name, why), [])
        if task.label not in tasks:
            tasks.append(task.label)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes; nothing is recorded")
    parser.add_argument("--shape", action="append", type=shape, help="N x K, e.g. 4096x14336")
    parser.add_argument("--only", help="regular expression: tasks, e.g. 'expand' or 'm=1$'")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each [15]")
    parser.add_argument("--out", type=Path, help="file of JSON lines [results/<machine>.jsonl]")
    return parser.parse_args(argv)


def facts() -> dict[str, Any]:
    """What the results have to be read with."""
    native = lora_kernels.describe()["native"]
    built = re.search(r"built by ([^(]+?) \(", native)  # of the path nothing is published
    return harness.machine() | {
        "bitsandbytes": harness.version("bitsandbytes"),
        "compiler": built[1] if built else None,
        "cache_bytes": timing.cache_bytes(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record.

    Returns:
        1 if something was wrong, else 0.
    """
    args = arguments(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this machine's CPU is the question
    known = facts()
    print(", ".join(f"{key} {value}" for key, value in known.items()))
    contenders, absent = everyone()
    print("\n".join(absent))
    tasks = [t for t in TASKS if args.only is None or re.search(args.only, t.label)]
    run = Run(contenders, 2 if args.smoke else args.repeats)
    nbytes = TOY_BYTES if args.smoke else BYTES
    with torch.no_grad():
        for n, k in args.shape or (TOY if args.smoke else LLAMA):
            run.shape(n, k, tasks, nbytes)
    print(summary(figures(run.rows), contenders[0].name))
    for (name, why), where in run.absent.items():
        print(f"{name} is not measured at {', '.join(where)}: {why}")
    failures = [row for row in run.rows if "failure" in row]
    for row in failures:
        where = f"{row['task']}, {row['shape'][0]} x {row['shape'][1]}"
        print(f"wrong, and not timed: {row['who']}, {where}: {row['failure']}")
    if args.smoke:
        print("a smoke run: the figures mean nothing and are not recorded")
        return bool(failures)
    path = args.out or harness.results_file()
    stamp = {"benchmark": "cpu", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    harness.record(path, [stamp | known | row for row in run.rows])
    print(f"appended {len(run.rows)} lines to {path}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
