r"""A comparison from beginning to end: what is missing is run, one process after the other.

    prepare the task ─▶ measure the base ─▶ each variant that has no record ─▶ tables, report

Variants run one after the other, never side by side: seconds and tokens a second of two processes
that share the cores are figures of neither. A variant that fails is recorded with its reason and
the rest goes on; Ctrl-C ends the running one and keeps all that ended before.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_core.compare.config import CompareConfig
from lora_core.compare.results import BASE_FILE, WORK, Record, Results, fingerprint
from lora_core.compare.task import Task, asked_questions, choose_examples, prepare
from lora_core.compare.variants import Variant
from lora_core.evaluate.questions import Prompt
from lora_core.files import atomic_write, folder_lock
from lora_core.train.report import say, versions

_GRACE = 5.0  # seconds that a process has to end

Job = tuple[Variant, str, dict[str, Any]]  # variant, fingerprint, what it is shown
Worker = Callable[[Path, Path, Path], int]
Progress = Callable[[Sequence[Job]], Iterable[Job]]


@dataclass(frozen=True)
class Compared:
    """What a comparison leaves in memory."""

    config: CompareConfig
    """what was asked for"""
    task: Task
    """on what"""
    variants: list[Variant]
    """what was run, in order"""
    records: list[Record]
    """one a variant, good or failed"""
    shots: int | None
    """examples of few-shot"""

    @property
    def failed(self) -> list[Record]:
        """Records without figures."""
        return [record for record in self.records if record["status"] != "done"]


def in_a_process(spec: Path, result: Path, log: Path) -> int:
    """Run the worker in a process of its own; its output goes to `log`.

    Args:
        spec: file with what to run.
        result: file that gets the figures.
        log: file that gets what it prints.

    Returns:
        Its exit code, minus the signal's number if one ended it.
    """
    words = [sys.executable, "-m", "lora_core.compare.worker", str(spec), str(result)]
    with log.open("wb") as stream:
        child = subprocess.Popen(words, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                _end(child)


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def compare(
    config: CompareConfig, *, worker: Worker | None = None, progress: Progress | None = None
) -> Compared:
    """Run what is missing of a comparison.

    Args:
        config: the comparison.
        worker: how a variant is run; None: in a process of its own.
        progress: wraps the variants that are left to run (a progress bar).

    Returns:
        The records of all variants of the configuration.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: input that cannot be compared, a folder of another comparison or in use, or a
            base that cannot be measured.
    """
    planned, worker = config.variants(), worker or in_a_process
    out = Path(config.out)
    with ExitStack() as stack:
        stack.enter_context(folder_lock(out))
        task = prepare(config, out)
        asked = asked_questions(task)
        examples = choose_examples(config, task, asked)
        identity = task.identity()
        results = Results(out, identity)
        jobs = list(_jobs(config, planned, examples, identity))
        left = [job for job in jobs if not results.done(job[1])]
        if examples is None and "few-shot" in config.methods:
            say("few-shot is left out: no example fits beside the longest question; see --shots")
        if left:
            base = _base(task, out, worker)
            for job in progress(left) if progress is not None else left:
                results.add(_run(job, task, base, out, worker))
    # an earlier call may have swept what this one sets, or the other way round
    records = [
        results.records[mark] | {"name": variant.name, "swept": dict(variant.swept)}
        for variant, mark, _ in jobs
    ]
    count = None if examples is None else len(next(iter(examples.values())))
    return Compared(config, task, [variant for variant, _, _ in jobs], records, count)


def _jobs(
    config: CompareConfig,
    planned: Sequence[Variant],
    examples: dict[int, list[Prompt]] | None,
    identity: dict[str, Any],
) -> Iterable[Job]:
    for variant in planned:
        shown: dict[str, Any] = {"system": None, "shots": []}
        if variant.method == "system-prompt":
            shown["system"] = config.system_text
        if variant.method == "few-shot":
            if examples is None:
                continue
            shown["shots"] = examples[variant.seed]
        yield variant, fingerprint(variant, identity, shown), shown


def _base(task: Task, out: Path, worker: Worker) -> dict[str, Any]:
    """The base's loss on general text, measured by the first call and kept."""
    file = out / BASE_FILE
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    result = _ask({"task": asdict(task), "variant": None}, out / WORK / "base", worker)
    if "failed" in result:
        raise ValueError(f"the base cannot be measured: {result['failed']}")
    atomic_write(file, json.dumps(result) + "\n")
    return result


def _run(job: Job, task: Task, base: dict[str, Any], out: Path, worker: Worker) -> Record:
    variant, mark, shown = job
    folder = out / WORK / f"{variant.label}-{mark[:6]}"
    began = time.perf_counter()
    spec = {"task": asdict(task), "variant": variant.facts(), "base": base, "mark": mark, **shown}
    result = _ask(spec, folder, worker)
    record: Record = {
        "fingerprint": mark,
        "status": "failed" if "failed" in result else "done",
        "name": variant.name,
        **variant.facts(),
        "folder": str(folder.relative_to(out)),
        "process_seconds": time.perf_counter() - began,
        "versions": versions(),
        **result,
    }
    if record["status"] == "failed":
        say(f"{variant.name} (seed {variant.seed}) failed: {result['failed']}")
    return record


def _ask(spec: dict[str, Any], folder: Path, worker: Worker) -> dict[str, Any]:
    """Run a worker and read what it left; a worker that left nothing has failed too."""
    shutil.rmtree(folder, ignore_errors=True)  # of a try that failed or was interrupted
    folder.mkdir(parents=True)
    asked, result, log = (folder / name for name in ("spec.json", "result.json", "log.txt"))
    result.unlink(missing_ok=True)
    atomic_write(asked, json.dumps(spec | {"folder": str(folder.resolve())}, ensure_ascii=False))
    code = worker(asked, result, log)
    if result.is_file():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return {"failed": _how_it_ended(code, log)}


def _how_it_ended(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        why = ": memory may have run out" if -code == signal.SIGKILL else ""
        return f"the process was ended by {name}{why}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"the process ended with code {code}: {last}"


def cores() -> int:
    """Cores that this process may use, which every figure of time depends on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
