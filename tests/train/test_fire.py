"""A run that is killed, or whose disk fills up, goes on as if nothing had been."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_core.train.state import Checkpoints

HERE = Path(__file__).parent
STEPS = 8
BASE = [
    *("--method", "qlora", "--r", "2", "--dropout", "0.1", "--steps", str(STEPS)),
    *("--save-every", "1", "--batch-size", "1", "--accumulate", "1", "--max-length", "32"),
    *("--eval-every", "4", "--progress", "false", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A full disk to preload; None where there is no compiler, or not Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    library = tmp_path_factory.mktemp("shim") / "full_disk.so"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "full_disk.c", "-ldl"]
    subprocess.run(words, check=True)
    return library


class Runs:
    """`lora-core finetune` on the shipped base in processes of its own (forks.py)."""

    def __init__(self, folder: Path, shim: Path | None) -> None:
        from lora_core import base_model_path

        self.folder = folder
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if shim is not None:
            env["LD_PRELOAD"] = str(shim)
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        rows = []
        for i in range(6):
            turns = [("user", f"What is {i}?"), ("assistant", "Yes" + "!" * i)]
            rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        data = folder / "chats.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        self.words = ["finetune", "--model", str(base_model_path()), "--data", str(data), *BASE]

    def ask(self, **asked: Any) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def out(self, name: str) -> Path:
        return self.folder / name

    def start(self, name: str, *more: str, **env: str) -> int:
        """Begin a run in a folder; the process's number."""
        words = [*self.words, "--out", str(self.out(name)), *more]
        log = self.folder / f"{name}.log"
        log.write_text("")
        number: int = self.ask(words=words, env=env, log=str(log))
        return number

    def end(self, number: int) -> int:
        """Wait for a run's exit code."""
        code: int = self.ask(wait=number)
        return code

    def go(self, name: str, *more: str, **env: str) -> int:
        """Run to the end, however that is."""
        return self.end(self.start(name, *more, **env))

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def last_line(self, name: str) -> str:
        """The message a run ended with, which has to be a single line."""
        text = self.said(name)
        assert "Traceback" not in text, text
        assert text.count("lora-core finetune: ") == 1, text
        return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shim: Path | None) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("fire"), shim)
    yield made
    made.server.communicate()  # closes its stdin, and so ends it


@pytest.fixture(scope="module")
def whole(runs: Runs) -> float:
    """The run that nothing happened to, in the folder "whole"; its seconds."""
    start = time.monotonic()
    assert runs.go("whole") == 0, runs.said("whole")
    return time.monotonic() - start


@pytest.fixture
def same_as_whole(
    runs: Runs, whole: float, without_times: Callable[..., Any]
) -> Callable[[str], None]:
    """Check that a folder holds, bit for bit, what the undisturbed run left."""

    def check(name: str) -> None:
        one, other = runs.out("whole"), runs.out(name)
        adapter = "adapter_model.safetensors"
        assert (one / adapter).read_bytes() == (other / adapter).read_bytes()
        lines = [(d / "metrics.jsonl").read_text().splitlines() for d in (one, other)]
        a, b = (without_times([json.loads(line) for line in found]) for found in lines)
        assert a == b
        for part in ("weights", "optimizer", "rng"):
            file = f"checkpoints/step-{STEPS:08d}/{part}.safetensors"
            a, b = load_file(one / file), load_file(other / file)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
        assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
        assert sorted(p.name for p in (one / "checkpoints").iterdir()) == sorted(
            p.name for p in (other / "checkpoints").iterdir()
        )

    return check


def test_killed_at_random_moments(
    runs: Runs, whole: float, same_as_whole: Callable[[str], None], full_run: bool
) -> None:
    """kill -9 somewhere in a run's time, which is mostly steps, evaluations and checkpoints."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    killed, wanted = 0, 20 if full_run else 3
    while killed < wanted:
        number = runs.start("killed", "--resume", "true")
        metrics = runs.out("killed") / "metrics.jsonl"
        began = metrics.stat().st_mtime_ns if metrics.exists() else 0
        # of every third the start is killed too; else the clock runs from the first step on
        while draw.random() < 2 / 3 and runs.ask(poll=number) is None:
            if metrics.exists() and metrics.stat().st_mtime_ns != began:
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, whole / 4))
        if runs.ask(poll=number) is not None:
            shutil.rmtree(runs.out("killed"))  # it came to its end first: begin anew
            continue
        os.kill(number, signal.SIGKILL)
        assert runs.end(number) == -signal.SIGKILL
        killed += 1
        published = Checkpoints(runs.out("killed") / "checkpoints").newest_good()  # none damaged
        if published is not None:
            assert published.progress.step <= STEPS
    assert runs.go("killed", "--resume", "true") == 0, (seed, runs.said("killed"))
    assert "damaged" not in runs.said("killed")
    same_as_whole("killed")


def test_a_full_disk(
    runs: Runs, shim: Path | None, same_as_whole: Callable[[str], None], full_run: bool
) -> None:
    """Writing fails after some bytes: one line, the last good checkpoint stays, and goes on."""
    if shim is None:
        pytest.skip("no C compiler: the disk cannot be filled up")
    written = total_written(runs)
    draw = random.Random(1)
    shares = [draw.uniform(0.02, 0.98) for _ in range(20 if full_run else 2)]
    for number, share in enumerate([0.0001, *shares]):
        name = f"full{number}"
        room = {"FULL_DISK_DIR": str(runs.out(name)), "FULL_DISK_BYTES": str(int(share * written))}
        assert runs.go(name, **room) == 1, runs.said(name)
        line = runs.last_line(name)
        assert "No space left on device" in line
        good = Checkpoints(runs.out(name) / "checkpoints").newest_good()
        if good is None:
            assert line.endswith("; there is no checkpoint to resume")
        elif good.progress.finished and "training is done" in line:
            assert line.endswith("--resume saves the result")
        else:
            assert line.endswith(f"the last good checkpoint is {good.path}; resume with --resume")
        assert list(runs.out(name).rglob("*.tmp")) == []
        assert runs.go(name, "--resume", "true") == 0, runs.said(name)
        same_as_whole(name)


def total_written(runs: Runs) -> int:
    """Bytes of all checkpoints and files of a run together."""
    out = runs.out("whole")
    checkpoint = out / "checkpoints" / f"step-{STEPS:08d}"
    each = sum(p.stat().st_size for p in checkpoint.iterdir())
    return STEPS * each + sum(p.stat().st_size for p in out.iterdir() if p.is_file())


@pytest.mark.parametrize("made", [0, 1, 4])
def test_a_read_only_folder(
    runs: Runs, shim: Path | None, same_as_whole: Callable[[str], None], made: int
) -> None:
    """From the start, or after some folders (out, checkpoints, one a checkpoint) were made."""
    if shim is None:
        pytest.skip("no C compiler: root, whom modes do not stop, has no read-only folder")
    name = f"readonly{made}"
    env = {"FULL_DISK_DIR": str(runs.out(name)), "READ_ONLY_AFTER": str(made)}
    assert runs.go(name, **env) == 1
    line = runs.last_line(name)
    assert "Read-only file system" in line
    ends = {
        0: "; choose another folder",
        1: "; there is no checkpoint to resume",
        4: r"; the last good checkpoint is .*/step-0000000\d; resume with --resume",
    }
    assert re.search(ends[made] + "$", line), line
    if made == 4:
        assert runs.go(name, "--resume", "true") == 0, runs.said(name)
        same_as_whole(name)


def test_a_file_in_the_folders_place(runs: Runs) -> None:
    runs.out("file").write_text("mine")
    assert runs.go("file") == 1
    assert runs.last_line("file").endswith(
        f"{runs.out('file')}: File exists; choose another folder"
    )
    assert runs.out("file").read_text() == "mine"


def test_a_truncated_checkpoint_and_a_second_run(
    runs: Runs, same_as_whole: Callable[[str], None]
) -> None:
    """The damaged one is named, the one before it used; a run beside a running one is refused."""
    first = runs.start("cut")
    latest = runs.out("cut") / "checkpoints" / "latest"
    while not latest.exists() or latest.read_text() < "step-00000003":
        assert runs.ask(poll=first) is None, runs.said("cut")
        time.sleep(0.005)
    os.kill(first, signal.SIGSTOP)
    words = ["--resume", "true"]
    # the same folder under another name, so that its words go to a log of their own
    runs.out("beside").symlink_to(runs.out("cut"))
    assert runs.go("beside", *words) == 1
    assert re.search(
        rf"another run \(process {first}\) works in .*; wait", runs.last_line("beside")
    )
    os.kill(first, signal.SIGKILL)
    assert runs.end(first) == -signal.SIGKILL
    newest = latest.read_text().strip()
    file = latest.with_name(newest) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert runs.go("cut", *words) == 0, runs.said("cut")
    step = int(newest.removeprefix("step-"))
    said = runs.said("cut")
    assert f"warning: checkpoint {newest} is damaged (optimizer.safetensors has" in said
    assert f"resumed after step {step - 1} of {STEPS}" in said
    same_as_whole("cut")


def test_a_result_that_was_not_saved_is_saved_on_resume(
    runs: Runs,
) -> None:
    """Killed after the last checkpoint, where an earlier, shorter run has left its adapter."""
    assert runs.go("late", "--steps", "4", "--schedule", "constant") == 0
    stale = (runs.out("late") / "adapter_model.safetensors").read_bytes()
    longer = ["--steps", "6", "--schedule", "constant", "--resume", "true"]
    assert runs.go("late", *longer) == 0
    done = (runs.out("late") / "adapter_model.safetensors").read_bytes()
    (runs.out("late") / "adapter_model.safetensors").write_bytes(stale)
    (runs.out("late") / ".saved").write_text("step 4, best 4\n")
    assert runs.go("late", *longer) == 0
    assert (runs.out("late") / "adapter_model.safetensors").read_bytes() == done
