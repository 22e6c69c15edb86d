"""What the compiler made of every kernel, held against a committed table. Needs no GPU.

    python -m benchmarks.aot                         # every variant for every target, then compare
    python -m benchmarks.aot --targets sm_90 --only 'planes4*'
    python -m benchmarks.aot --quick --targets sm_90 # what `make test` runs
    python -m benchmarks.aot --update                # write what was found into the table
    python -m benchmarks.aot --markdown              # the table for a page of docs

Each module of `lora_kernels.gpu` lists in `variants()` what its launchers launch by default. Each
is compiled for sm_80 to sm_120 and gfx942, and the machine code is read (machine_code.py):
registers and spills, shared memory, instructions a weight in the hot loop, matrix instructions,
128-bit loads and stores. `benchmarks/results/aot.json` holds the facts for the triton that
constraints.txt pins.

What fails, whatever the version of triton:

* a variant that a target does not compile (exempt: NVIDIA assembly on gfx942, and what stands in
  for it there on the others),
* a spill inside a loop: a load or store of local memory paid at every trip,
* more shared memory than a program may have: 163 KB on sm_80, 99 on sm_86, sm_89 and sm_120, 227 on
  sm_90 and sm_100, 64 on gfx942,
* on sm_90, more instructions a weight than the variant's `max_instructions`,
* an `exact` variant whose arithmetic is not the definition's (machine_code.py says how that is
  judged).

With the pinned version also: registers, stack, spills, shared memory or instructions that grew by
any amount, other matrix instructions, 128-bit accesses lost, a variant the table lacks, an entry
whose variant is gone. What became better is said, and asks for `--update`.

An entry holds a hash of what the compiler was given and one of what it made. `--quick` compiles and
reads the first variant of each kernel; of the others it compiles those whose source, constants or
options are no longer those the entry was written for, and disassembles those whose bytes changed.

Counts are static. They say nothing of latency, bank conflicts or occupancy, only that what was
judged good on a GPU is still what would run. They hold for integers that are not 1, which Triton
would make constants; and for one trip of the hot loop the variant itself states how many weights a
thread handles, so the entry shows that number too.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compiled import TARGETS, Outcome, discover, examine

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "aot.json"
PACKAGE = "lora_kernels.gpu"
Job = tuple[str, str]  # variant, target


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What became worse and what better, each as "registers 40 -> 44"."""
    count = "per_weight" if after["weights"] and before["weights"] else "instructions"
    worse, better = [], []
    for fact in ("registers", "stack", "spills", "shared", count):
        change = f"{fact} {before[fact]} -> {after[fact]}"
        if after[fact] > before[fact]:
            worse.append(change)
        elif after[fact] < before[fact]:
            better.append(change)
    if after["matrix"] != before["matrix"]:
        worse.append(f"matrix instructions {before['matrix']} -> {after['matrix']}")
    had, has = set(before["wide"].split()), set(after["wide"].split())
    worse += [f"128-bit {kind} lost" for kind in sorted(had - has)]
    better += [f"128-bit {kind} gained" for kind in sorted(has - had)]
    return worse, better


def pinned(constraints: Path = ROOT / "constraints.txt") -> str:
    """The triton that the table is kept for."""
    match = re.search(r"^triton==(\S+)", constraints.read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{constraints} pins no triton")
    return match[1]


def read_table(path: Path) -> dict[str, Any]:
    """The committed table: triton's version, and facts by "variant on target"."""
    return json.loads(path.read_text()) if path.exists() else {"triton": None, "facts": {}}


def write_table(path: Path, triton: str, facts: Mapping[str, Any]) -> None:
    """One line an entry, sorted, so that a diff shows which variant changed on which target."""
    lines = [f"{json.dumps(name)}: {json.dumps(facts[name])}" for name in sorted(facts)]
    text = f'{{\n"triton": {json.dumps(triton)},\n"facts": {{\n' + ",\n".join(lines) + "\n}\n}\n"
    path.write_text(text)


def _label(job: Job) -> str:
    return f"{job[0]} on {job[1]}"


def run(
    package: str, jobs: Sequence[Job], known: Mapping[str, Any], processes: int
) -> Iterator[tuple[Job, Outcome]]:
    """Examine every job, in order, in this process or several."""
    if processes == 1:
        yield from ((job, examine(package, *job, known.get(_label(job)))) for job in jobs)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(examine, package, *job, known.get(_label(job))) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield job, future.result()
            except BrokenProcessPool:
                message = f"the compiler crashed at {_label(job)} or a job beside it; try --jobs 1"
                raise SystemExit(message) from None
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise


def clean_environment(cache: str) -> None:
    """Let nothing from outside change what is compiled: a cache of its own, no overrides."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set, under which nothing can be compiled; unset it")
    for name in [n for n in os.environ if n.startswith(("TRITON_", "PTXAS_", "DISABLE_PTXAS"))]:
        del os.environ[name]
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


class Gate:
    """Judges outcomes one by one and remembers what to report."""

    def __init__(self, table: Mapping[str, Any], compared: bool) -> None:
        self.before = table["facts"]
        self.compared = compared
        self.facts: dict[str, Any] = {}
        self.failed: list[str] = []
        self.better: list[str] = []

    def judge(self, job: Job, outcome: Outcome) -> None:
        """Take one outcome in."""
        label = _label(job)
        self.failed += [f"{label}: {fault}" for fault in outcome.faults]
        if outcome.facts is None:
            return
        if not outcome.faults:
            self.facts[label] = asdict(outcome.facts)  # what fails never enters the table
        if not self.compared:
            return
        if label not in self.before:
            self.failed.append(f"{label}: not in the table; run --update")
            return
        worse, better = compare(self.before[label], asdict(outcome.facts))
        self.failed += [f"{label}: worse: {change}" for change in worse]
        self.better += [f"{label}: better: {change}" for change in better]

    def look_for_gone(self, labels: set[str]) -> None:
        """Entries of the table whose variant (on that target) is no longer compiled fail."""
        for label in sorted(set(self.before) - labels) if self.compared else ():
            self.failed.append(f"{label}: in the table, but gone from the code; run --update")


def markdown(table: Mapping[str, Any], target: str, only: str) -> str:
    """The table's entries for one target, for a page of docs."""
    head = ["variant", "registers", "shared KB", "instructions", "a weight", "matrix", "128-bit"]
    rows = [head, ["---", *["---:"] * 4, "---", "---"]]
    for label, facts in table["facts"].items():
        variant, _, where = label.rpartition(" on ")
        if where != target or not fnmatch.fnmatch(variant, only):
            continue
        each = "" if facts["per_weight"] is None else f"{facts['per_weight']:.2f}"
        shared = f"{facts['shared'] / 1024:.1f}"
        counts = [str(facts["registers"]), shared, str(facts["instructions"]), each]
        rows.append([f"`{variant}`", *counts, facts["matrix"] or "", facts["wide"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _select(variants: Mapping[str, Any]) -> tuple[list[Job], int]:
    """Every variant on every target that launches it, and how many are exempt."""
    every = [(name, target) for name in sorted(variants) for target in TARGETS]

    def launched(variant: Any, nvidia: bool) -> bool:
        return not variant.plain if nvidia else not variant.asm

    jobs = [j for j in every if launched(variants[j[0]], TARGETS[j[1]].backend == "cuda")]
    return jobs, len(every) - len(jobs)


def _sample(jobs: Sequence[Job], variants: Mapping[str, Any]) -> set[str]:
    """The first job of each kernel on each target, which --quick does whatever the table says."""
    first: dict[tuple[int, str], str] = {}
    for job in jobs:
        first.setdefault((id(variants[job[0]].kernel), job[1]), _label(job))
    return set(first.values())


def _say(outcome: Outcome, label: str, opcodes: bool) -> None:
    facts = outcome.facts
    if facts is None:
        print(f"{label}: does not compile")
        return
    each = "" if facts.per_weight is None else f" = {facts.per_weight:.2f} a weight"
    where = "in the loop" if facts.loop else "in all"
    spills = f", {facts.spills} spills" if facts.spills else ""
    print(
        f"{label}: {facts.registers} registers{spills}, {facts.shared} bytes shared, "
        f"{facts.instructions} instructions {where}{each}, {facts.matrix or 'no matrix unit'}"
        + (f", 128-bit {facts.wide}" if facts.wide else "")
        + (f"\n    {outcome.opcodes}" if opcodes else ""),
        flush=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=about)
    parser.add_argument("--targets", default="", help="comma-separated; all unless told")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of variant names")
    quick = "compare, compiling only what changed since the table was written and a sample"
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the table (default)")
    mode.add_argument("--quick", action="store_true", help=quick)
    mode.add_argument("--update", action="store_true", help="write what was found into the table")
    mode.add_argument("--markdown", action="store_true", help="print the table, compile nothing")
    parser.add_argument("--opcodes", action="store_true", help="say the most frequent opcodes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--cache", help="folder for compiled kernels; a fresh one unless told")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--package", default=PACKAGE, help="where modules with variants() are")
    options = parser.parse_args(arguments)
    options.targets = options.targets.split(",") if options.targets else list(TARGETS)
    if unknown := sorted(set(options.targets) - set(TARGETS)):
        parser.error(f"no such target: {', '.join(unknown)}; known are {', '.join(TARGETS)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more; got {options.jobs}")
    return options


def _compared(options: argparse.Namespace, table: Mapping[str, Any]) -> bool:
    """Whether the table speaks of this triton; refuses to mix versions."""
    import triton

    pin, here = pinned(), triton.__version__
    if options.update:
        if here != pin:
            raise SystemExit(f"the table is kept for triton {pin}; this is {here}")
        return False
    if here != pin:
        print(f"triton {here}, not {pin}: the table is not compared, only limits are")
    elif table["triton"] != pin:
        raise SystemExit(f"the table is of triton {table['triton']}, not {pin}: run --update")
    return bool(here == pin)


def gate(options: argparse.Namespace) -> int:
    """Compile, judge, report; 1 if anything failed."""
    table = read_table(options.table)
    judged = Gate(table, _compared(options, table))
    variants = discover(options.package)
    every, exempt = _select(variants)
    jobs = [j for j in every if j[1] in options.targets and fnmatch.fnmatch(j[0], options.only)]
    if not jobs:
        raise SystemExit(f"no variant of {options.package} matches {options.only!r}")
    known = {}
    if options.quick and judged.compared:
        sample = _sample(jobs, variants)
        known = {label: facts for label, facts in table["facts"].items() if label not in sample}
    labels = {_label(job) for job in every}
    try:
        for job, outcome in run(options.package, jobs, known, options.jobs):
            _say(outcome, _label(job), options.opcodes)
            judged.judge(job, outcome)
    finally:  # what an interrupted --update has found is kept
        if options.update:
            kept = {label: facts for label, facts in table["facts"].items() if label in labels}
            write_table(options.table, pinned(), kept | judged.facts)
    judged.look_for_gone(labels)
    for line in judged.better:
        print(line)
    if judged.better:
        print("better than the table: run --update")
    for line in judged.failed:
        print(f"FAILED {line}")
    print(f"{len(jobs)} judged, {len(judged.failed)} failures, {exempt} of all exempt")
    return int(bool(judged.failed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse(arguments)
    if options.markdown:
        target = options.targets[0] if len(options.targets) == 1 else "sm_90"
        print(markdown(read_table(options.table), target, options.only))
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        clean_environment(options.cache or fresh)
        try:
            return gate(options)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            raise SystemExit("interrupted") from None


if __name__ == "__main__":
    sys.exit(main())
