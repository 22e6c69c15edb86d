"""Jobs in processes that may die.

A kernel that reads where it may not breaks the device's context for its whole process, and one that
never ends blocks it. Neither may cost the rest of a run, so every job runs in a worker process
(`worker`) that takes jobs as lines of JSON and answers in lines of JSON. One that dies or takes
too long is replaced, the job is recorded as failed, and the next one goes on. Checks, which mostly
compile, run in several lanes at once; what is timed runs in one lane alone.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
GRACE = 5.0  # seconds that a worker has to end by itself
Job = dict[str, Any]
OnRow = Callable[[dict[str, Any]], None]


class Lane:
    """One worker process at a time."""

    def __init__(self, environment: Mapping[str, str], command: Sequence[str] = WORKER) -> None:
        self.environment, self.command = dict(environment), command
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] | None = None  # what the process says on stderr
        self.spent = False  # whether the process asks to be replaced
        self.trying: str | None = None  # whom a job was about to run, to be blamed if it dies

    def run(self, job: Job, limit: float, on_row: OnRow, cut: bool = False) -> bool:
        """Run a job and pass on its rows; a failure becomes a row of its own.

        Args:
            job: what the worker is to do.
            limit: seconds after which the worker is ended.
            on_row: called with each row.
            cut: whether the limit is there because the whole run ends: no failure of the job's.

        Returns:
            False if the job was cut so.
        """
        process, self.trying = self._ready(), None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            finished = any(row is None for row in self._rows(process, job, on_row))
        finally:
            timer.cancel()
        if not finished:
            code = process.wait()
            why = f"took more than {limit:.0f} s" if late.is_set() else f"exit code {code}"
            why = f"the process died: {why}; {self._last_words()}"
            self.close()
            if cut and late.is_set():
                return False
            on_row(job | {"failure": why} | ({"who": self.trying} if self.trying else {}))
        elif self.spent:
            self.close()
        return True

    def close(self) -> None:
        """Let the worker end, or end it."""
        if self.process is not None and self.process.stdin and self.process.stdout:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
        if self.errors is not None:
            self.errors.close()
        self.process = self.errors = None

    def _ready(self) -> "subprocess.Popen[str]":
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
            )
        return self.process

    def _rows(self, process: "subprocess.Popen[str]", job: Job, on_row: OnRow) -> Iterator[None]:
        """Pass on rows; yields None once the job is done, nothing if the process ends first."""
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return
        for line in process.stdout:
            row = json.loads(line)
            if row["kind"] == "done":
                self.spent = row.get("ends", False)
                yield None
                return
            if row["kind"] == "trying":
                self.trying = row["who"]
            else:
                on_row(row)

    def _last_words(self) -> str:
        if self.errors is None:
            return "it said nothing"
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


def run_jobs(
    lanes: Sequence[Lane],
    jobs: Sequence[Job],
    seconds: float,
    limit: float,
    on_row: OnRow,
    prepare: Callable[[Job], Job] = dict,
) -> list[Job]:
    """Run jobs in order, as many at once as there are lanes.

    Args:
        lanes: workers.
        jobs: what to do, the most valuable first.
        seconds: after which no further job begins.
        limit: seconds that one job may take.
        on_row: called with each row, by one thread at a time.
        prepare: adds to a job what is known only when it begins.

    Returns:
        The jobs that did not fit.
    """
    end, waiting, lock = time.monotonic() + seconds, list(reversed(jobs)), threading.Lock()
    cut: list[Job] = []

    def one_at_a_time(row: dict[str, Any]) -> None:
        with lock:
            on_row(row)

    def work(lane: Lane) -> None:
        while True:
            with lock:
                left = end - time.monotonic()
                if not waiting or left <= 0:
                    return
                job = prepare(waiting.pop())
            # one begun in time may take a little more, so that a late one still counts
            left += GRACE
            if not lane.run(job, min(limit, left), one_at_a_time, cut=left < limit):
                cut.append(job)

    threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return cut + list(reversed(waiting))
