"""4-bit weights on a GPU: right, how fast, and how near to what the machine can do.

    python -m benchmarks.gpu                        # everything, in under 8 minutes
    python -m benchmarks.gpu --model config.json    # the shapes of a Hugging Face model
    python -m benchmarks.gpu --tune                 # measure crossovers and tiles, write the table
    python -m benchmarks.gpu --smoke                # all of it at toy sizes, without a GPU

It needs torch, triton and this repository, and installs nothing. bitsandbytes takes part where it
can be imported; its wheel need not be installed, only unpacked:

    python -m zipfile -e bitsandbytes-0.50.2-*.whl peers
    PYTHONPATH=peers python -m benchmarks.gpu

Order: the ceilings of the machine, then the correctness of every operator (several processes, as
they mostly compile), then what the targets ask for, then all else. A case that fails is recorded,
what depends on it is not timed, the rest goes on, and the command ends with 1. Every row is on disk
when it is finished: `benchmarks/results/<gpu>.json`, with a table in Markdown beside it.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.lanes import ROOT, Job, Lane, run_jobs
from benchmarks.gpu.report import BNB, DENSE, OURS, Report, label, slug, summary

LLAMA = ([4096, 4096], [1024, 4096], [14336, 4096], [4096, 14336])
TOY = ([32, 128],)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
# task, whether each route is timed by itself, rows: the most valuable first
PASSES: tuple[tuple[str, bool, tuple[int, ...]], ...] = (
    ("expand", False, (0,)),
    ("forward", False, (1, 4, 16, 64)),
    ("step", False, (2048, 8192)),
    ("forward", True, (1, 4, 16, 64, 128, 256)),
    ("forward", False, (2, 8, 32, 128, 256, 512, 2048, 8192)),
    ("dx", False, (1, 16, 64, 2048)),
    ("lora", False, (1, 16, 2048)),
    ("quantize", False, (0,)),
    ("lora step", False, (16, 2048, 8192)),
    ("dx", True, (1, 16, 64, 128, 256)),
    ("mixed", False, (16, 64, 2048)),
    ("dx", False, (2, 4, 8, 32, 128, 256, 512, 8192)),
    ("forward", True, (2, 8, 32, 512)),
    ("lora", False, (2, 4, 8, 32, 64, 128, 256, 512, 8192)),
    ("step", False, (1, 16, 64, 128, 256, 512)),
)
TOY_PASSES: tuple[tuple[str, bool, tuple[int, ...]], ...] = (
    ("expand", False, (0,)),
    ("forward", False, (1, 4)),
    ("step", False, (2, 2048, 8192)),
    ("forward", True, (3,)),
    ("dx", False, (3,)),
    ("dx", True, (3,)),
    ("lora", False, (3,)),
    ("lora step", False, (3,)),
    ("mixed", False, (3,)),
    ("quantize", False, (0,)),
)
JOB_SECONDS = 60.0  # one timed job
CHECK_SECONDS = 120.0  # one job beside others: a process starts and compiles in it
RESERVE = 10.0  # of the time, for what is under way when it is up, and the report
CHECK_SHARE = 0.45  # of the time, for the checks
LANES = 12  # processes that check at once; each takes a core and half a gigabyte of the GPU


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes in Triton's interpreter")
    parser.add_argument("--shape", action="append", type=shape, help="N x K, e.g. 4096x14336")
    parser.add_argument("--model", type=Path, help="a Hugging Face config.json: its shapes")
    parser.add_argument("--tune", action="store_true", help="measure crossovers and tiles instead")
    parser.add_argument("--tuned", type=Path, help="table that --tune writes [the package's]")
    parser.add_argument("--out", type=Path, help="JSON file [benchmarks/results/<gpu>.json]")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything [8]")
    parser.add_argument("--only", help="regular expression: what is timed, e.g. 'forward .*m=1$'")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--anyway", action="store_true", help="time also what failed its check")
    parser.add_argument("--lanes", type=int, help=f"processes that check at once [to {LANES}]")
    return parser.parse_args()


def shape(text: str) -> list[int]:
    """NxK as two integers."""
    found = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if found is None or not int(found[1]) * int(found[2]):
        raise argparse.ArgumentTypeError(f"a shape is NxK, e.g. 4096x14336; got {text!r}")
    return [int(found[1]), int(found[2])]


def model_shapes(path: Path) -> list[list[int]]:
    """N x K of a decoder's projections, each once: q, k and v, o, gate and up, down."""
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        wide = config["intermediate_size"]
    except KeyError as missing:
        raise SystemExit(f"{path} has no {missing}; give the shapes with --shape NxK") from None
    head = config.get("head_dim") or hidden // heads
    narrow = (config.get("num_key_value_heads") or heads) * head
    every = [[heads * head, hidden], [narrow, hidden], [hidden, heads * head]]
    every += [[wide, hidden], [hidden, wide]]
    return [one for i, one in enumerate(every) if one not in every[:i]]


def timing_jobs(
    shapes: Sequence[list[int]], dtype: str, smoke: bool, shared: dict[str, Any]
) -> list[Job]:
    """What is timed, the most valuable first."""
    base = {"kind": "time", "dtype": dtype, "smoke": smoke} | shared
    return [
        base | {"task": task, "routes": routes, "shape": one, "m": m}
        for task, routes, counts in (TOY_PASSES if smoke else PASSES)
        for m in counts
        for one in shapes
    ]


class Run:
    """One run: its clock, its worker processes and its report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.report = args, Report(args.out)
        self.began = time.monotonic()
        self.banned: set[tuple[str, str]] = set()  # task and contender that ended a worker
        self.no_graph: set[tuple[str, str]] = set()  # and those of which no graph could be made
        environment = os.environ | {"LORA_KERNELS": "triton"}
        environment["KINETO_LOG_LEVEL"] = "99"
        environment.setdefault("OMP_NUM_THREADS", "2")  # lanes share the cores
        # the repository need not be installed: the workers are modules of its root
        environment.pop("PYTHONSAFEPATH", None)
        paths = (str(ROOT / "kernels"), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if args.smoke:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.pop("TRITON_INTERPRET", None)
        self.environment = environment
        self.lane = Lane(environment)

    def left(self) -> float:
        """Seconds until the time is up."""
        return 60 * self.args.minutes - RESERVE - (time.monotonic() - self.began)

    def on_row(self, row: dict[str, Any]) -> None:
        """Keep a row, and learn from it."""
        if row["kind"] == "facts":
            # of a path the name: the results are published, the machine's folders are not
            options = " ".join(os.path.basename(option) for option in sys.argv[1:])
            row |= {"smoke": self.args.smoke, "command": options or "(no options)"}
            row["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            if self.report.path is None and row["device"] == "cuda":
                self.report.path = self.file(row["machine"])
        if "process died" in row.get("failure", "") and row.get("who"):
            self.banned.add((task_of(row), row["who"]))
        if str(row.get("refused", "")).startswith("no graph: ") and row.get("who"):
            self.no_graph.add((task_of(row), row["who"]))
        self.report.add(row)
        print(f"{time.monotonic() - self.began:6.1f} s  {line(row)}", flush=True)

    def file(self, machine: str) -> Path:
        """Where the rows go; a part of the measurements does not replace the whole."""
        args = self.args
        part = "-tune" if args.tune else "-part" if args.only or args.shape or args.model else ""
        return ROOT / "benchmarks" / "results" / f"{slug(machine)}{part}.json"

    def wanted(self, job: Job) -> bool:
        """Whether `--only` asks for a job."""
        return self.args.only is None or bool(re.search(self.args.only, label(job)))

    def do(
        self, jobs: Sequence[Job], lanes: Sequence[Lane], seconds: float, limit: float = JOB_SECONDS
    ) -> None:
        """Run jobs; what does not fit is listed."""
        for job in run_jobs(lanes, jobs, seconds, limit, self.on_row, self.prepare):
            self.report.add({"kind": "skipped", "of": job["kind"], "label": label(job)})

    def prepare(self, job: Job) -> Job:
        """What is known only when a job begins."""
        task = task_of(job)
        found = {"banned": self.banned, "no_graph": self.no_graph}
        return job | {
            name: sorted(w for t, w in every if t == task) for name, every in found.items()
        }

    def facts(self) -> dict[str, Any]:
        """Ask the machine and measure its ceilings."""
        seconds = max(self.left(), 1.0)
        job = {"kind": "facts", "smoke": self.args.smoke}
        run_jobs([self.lane], [job], seconds, CHECK_SECONDS, self.on_row)
        found = self.report.of("facts")
        if not found or "device" not in found[0]:
            raise SystemExit("the worker process cannot start; see the line above")
        if found[0]["device"] != "cuda" and not self.args.smoke:
            raise SystemExit("there is no NVIDIA GPU here; --smoke runs everything without one")
        return found[0]

    def in_parallel(self, jobs: Sequence[Job], seconds: float) -> None:
        """Run jobs in several processes, this run's own among them."""
        count = self.args.lanes or (1 if self.args.smoke else min(LANES, os.cpu_count() or 1))
        more = [Lane(self.environment) for _ in range(count - 1)]
        self.do(jobs, [self.lane, *more], seconds, CHECK_SECONDS)
        with ThreadPoolExecutor(count) as pool:  # to let go of a GPU takes a process a second
            list(pool.map(Lane.close, more))

    def check_for(self, timing: Sequence[Job]) -> list[str]:
        """Check every operator, or with `--only` those that what is timed depends on.

        Returns:
            The families, in the dtype that is timed, of which a case did not pass or none was run.
        """
        from benchmarks.gpu.cases import NEEDS, ROUTES_NEED, cases

        families = {family for job in timing for family in NEEDS[job["task"]]}
        for job in timing:
            families |= ROUTES_NEED[job["task"]] if job["routes"] else set()
        jobs = [c for c in cases(self.args.smoke) if c["family"] in families or self.wanted(c)]
        self.in_parallel(jobs, CHECK_SHARE * self.left())
        rows = [row for row in self.report.of("check") if row["dtype"] == self.args.dtype]
        passed = {row["family"] for row in rows if row.get("passed")}
        wrong = {row["family"] for row in rows if not row.get("passed")}
        return sorted(wrong | ({job["family"] for job in jobs} - passed))

    def tune_all(self, shapes: Sequence[list[int]], machine: str) -> None:
        """Compile candidates in parallel, time them one by one, and write the table."""
        sys.path.append(str(ROOT / "kernels"))
        from benchmarks.gpu.tune import best_of, jobs, write_tuned
        from lora_kernels.gpu.tuned import TUNED

        every = [job for job in jobs(shapes, self.args.dtype, self.args.smoke) if self.wanted(job)]
        self.in_parallel([job | {"compile_only": True} for job in every], CHECK_SHARE * self.left())
        self.do(every, [self.lane], self.left())
        path = self.args.tuned or (None if self.args.smoke else TUNED)
        entries = best_of(self.report.rows)
        if path is not None and entries:
            write_tuned(path, machine, entries)
            print(f"wrote {len(entries)} shapes to {path}")


def task_of(job: dict[str, Any]) -> str:
    """The task that is timed or the way that is tuned."""
    return str(job.get("task") or job.get("way") or "")


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while the run goes on."""
    if row["kind"] in ("facts", "ceilings"):
        return ", ".join(f"{key} {value}" for key, value in row.items() if key != "kind")
    if row.get("failure") or row.get("refused"):
        return f"{label(row)}: {row.get('failure') or row['refused']}"
    if row["kind"] == "check":
        return f"{label(row)}: {'; '.join(row['problems']) or 'passed'}"
    text = f"{label(row)}{' ' + json.dumps(row['fields']) if 'fields' in row else ''}: "
    median, low, high = (1e6 * seconds for seconds in row["seconds"])
    text += f"{median:.2f} µs [{low:.2f}, {high:.2f}]"
    if row.get("share_of_floor") is not None:
        text += f", {row['share_of_floor']:.0%} of the floor"
    return text + (f", error {row['error']:.2g}" if row.get("error") is not None else "")


def failed(report: Report) -> bool:
    """Whether something of this project's was wrong, or could not run."""
    checks = any(not row.get("passed") for row in report.of("check"))
    lost = ("time", "tune", "facts", "ceilings")
    ours = any(
        ("failure" in row and row.get("who") not in (BNB, DENSE))
        or ("refused" in row and row["who"].startswith(OURS))
        for kind in lost
        for row in report.of(kind)
    )
    return checks or ours


def main() -> None:
    """Measure, and exit with 1 if something was wrong."""
    args = arguments()
    run = Run(args)
    shapes = args.shape or (TOY if args.smoke else LLAMA)
    if args.model:
        shapes = [*(args.shape or []), *model_shapes(args.model)]
    try:
        facts = run.facts()
        if args.tune:
            run.tune_all(shapes, facts["machine"])
        else:
            ceilings = (run.report.of("ceilings") or [{}])[0]
            shared = {"peers": facts["peers"], "ceilings": ceilings}
            every = timing_jobs(shapes, args.dtype, args.smoke, shared)
            jobs = [job for job in every if run.wanted(job)]
            refused = run.check_for(jobs)
            refused = [] if args.anyway else refused
            run.do([job | {"refused": refused} for job in jobs], [run.lane], run.left())
    finally:
        run.lane.close()
        run.report.finish()
    print()
    print(summary(run.report))
    if run.report.path is not None:
        file = run.report.path
        print(f"{len(run.report.rows)} rows in {file}, tables in {file.with_suffix('.md')}")
    if args.smoke:
        print("a smoke run: the figures mean nothing")
    sys.exit(1 if failed(run.report) else 0)


if __name__ == "__main__":
    main()
