"""The C operators' parallel loop: every index once, whoever calls, forks or fails meanwhile.

`native_pool_driver.c` holds the loops; it is compiled with pool.c, without PyTorch. What forks or
counts threads runs in a fresh interpreter.
"""

import ctypes
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.cpu import toolchain

POOL = toolchain.SOURCES / "pool.c"
DRIVER = Path(__file__).with_name("native_pool_driver.c")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
OPTIONS = ("-std=gnu11", "-g", "-O1", "-pthread", f"-I{toolchain.SOURCES}", *WARNINGS)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
EINVAL = 22
LONG = 20_000  # milliseconds that a task waits for the others before it gives up


def ended(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """A finished process; a hang is among what these tests look for."""
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def compile_driver(target: Path, *options: str, source: Path = POOL) -> Path:
    try:
        compiler = toolchain.find_compiler()
    except toolchain.BuildError as error:
        if os.environ.get("LORA_REQUIRE_ORACLES") == "1":  # CI has one
            raise
        pytest.skip(str(error))
    done = ended(*compiler, *OPTIONS, *options, source, DRIVER, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_driver(tmp_path_factory.mktemp("pool") / "pool.so", "-fPIC", "-shared")


@pytest.fixture(scope="module")
def pool(path: Path) -> ctypes.CDLL:
    return load(path)


def load(path: Path) -> ctypes.CDLL:
    pool = ctypes.CDLL(str(path))
    i32, i64, at = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    pool.visit.argtypes = pool.pieces.argtypes = (i32, i64, i64, at)
    pool.sum.argtypes, pool.sum.restype = (i32, i64, i64), i64
    pool.nested.argtypes = (i32, i64, at)
    pool.meet.argtypes = (i32, i32, i32)
    return pool


@pytest.fixture
def fresh(path: Path) -> Iterator[Callable[..., str]]:
    """Run statements in a new interpreter that has the driver as `pool`; gives what it printed."""
    start = f"""
        import ctypes, os, sys, threading, time
        LONG = {LONG}
        pool = ctypes.CDLL({str(path)!r})
        i32, i64 = ctypes.c_int, ctypes.c_int64
        pool.sum.argtypes, pool.sum.restype = (i32, i64, i64), i64
        def threads():
            return len(os.listdir("/proc/self/task"))
    """

    def run(statements: str) -> str:
        code = textwrap.dedent(start) + textwrap.dedent(statements)
        done = ended(sys.executable, "-W", "ignore", "-c", code)  # Python warns of such forks
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def the_sum(count: int) -> int:
    return sum(i * i % 1000 for i in range(count))


@given(
    threads=st.integers(-1, 9),
    count=st.one_of(st.integers(0, 3), st.integers(0, 3000)),
    grain=st.one_of(st.integers(1, 3), st.integers(1, 4000), st.just(2**63 - 1)),
)
def test_every_index_is_run_once(pool: ctypes.CDLL, threads: int, count: int, grain: int) -> None:
    visits = np.zeros(count + 1, np.int32)  # and one that must stay 0
    assert pool.visit(threads, count, grain, visits.ctypes.data) == 0
    assert visits[:-1].tolist() == [1] * count
    assert visits[-1] == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("count", "grain"), [(0, 1), (1, 1), (7, 7), (7, 8), (10, 3), (1000, 64)])
def test_the_pieces_do_not_depend_on_the_threads(
    pool: ctypes.CDLL, threads: int, count: int, grain: int
) -> None:
    ends = np.zeros(count, np.int64)
    assert pool.pieces(threads, count, grain, ends.ctypes.data) == 0
    began = np.flatnonzero(ends)
    assert began.tolist() == list(range(0, count, grain))
    assert ends[began].tolist() == [min(b + grain, count) for b in range(0, count, grain)]


@pytest.mark.parametrize(("count", "grain"), [(-1, 1), (5, 0), (5, -1)])
def test_bad_sizes_are_refused_before_anything_runs(
    pool: ctypes.CDLL, count: int, grain: int
) -> None:
    visits = np.zeros(8, np.int32)
    assert pool.visit(2, count, grain, visits.ctypes.data) == EINVAL
    assert not visits.any()


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_that_many_threads_work_at_once(pool: ctypes.CDLL, threads: int) -> None:
    # every task waits for all others to begin: one thread fewer, and they wait in vain
    assert pool.meet(threads, threads, LONG) == threads


def test_many_short_loops_one_after_another(pool: ctypes.CDLL) -> None:
    """Workers come late to nearly all of them, and find the next one."""
    visits = np.zeros(64, np.int32)
    for _ in range(5000):
        pool.visit(4, 64, 1, visits.ctypes.data)
    assert visits.tolist() == [5000] * 64


def test_python_threads_call_at_the_same_time(pool: ctypes.CDLL) -> None:
    wrong: list[tuple[int, ...]] = []
    truth = {count: the_sum(count) for count in (1, 100, 20_000)}

    def call(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(200):
            case = choose.randint(1, 5), choose.choice([1, 100, 20_000]), choose.randint(1, 700)
            if pool.sum(*case) != truth[case[1]]:
                wrong.append(case)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_loop_in_a_loop_runs_alone(pool: ctypes.CDLL) -> None:
    visits = np.zeros((40, 40), np.int32)
    assert pool.nested(4, 40, visits.ctypes.data) == 0
    assert (visits == 1).all()


@LINUX
def test_no_thread_more_than_asked_for(fresh: Callable[..., str]) -> None:
    """Before any call there are none, and what has only one piece needs none."""
    said = fresh("""
        print(threads(), end=" ")
        for wanted, pieces in ((1, 100), (8, 1), (2, 100), (2, 100), (8, 3), (3, 100), (6, 100)):
            pool.sum(wanted, pieces, 1)
            print(threads(), end=" ")
    """)
    assert said == "1 1 1 2 2 3 3 6"


def test_a_pool_that_has_grown_still_uses_no_more_threads_than_asked_for(
    fresh: Callable[..., str],
) -> None:
    """Of 7 pieces that wait for each other, 2 threads can only run 2 at once."""
    said = fresh("""
        print(pool.meet(7, 7, LONG), pool.meet(2, 7, 20), pool.meet(5, 7, 20))
    """)
    assert said == "7 2 5"


@LINUX
def test_signals_are_left_to_the_program_and_faults_are_reported(fresh: Callable[..., str]) -> None:
    said = fresh("""
        import signal
        pool.meet(4, 4, LONG)  # until all have started: a new thread has another mask
        tasks = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
        for task in tasks:
            status = open("/proc/self/task/" + task + "/status").read()
            mask = int(status.partition("SigBlk:")[2].split()[0], 16)
            open_to = [s.name for s in signal.Signals if not mask >> s - 1 & 1]
            print(*sorted(open_to))
    """)
    # KILL and STOP cannot be blocked
    assert said.splitlines() == ["SIGBUS SIGFPE SIGILL SIGKILL SIGSEGV SIGSTOP"] * 3


def test_no_processor_time_is_used_between_calls(fresh: Callable[..., str]) -> None:
    """One spinning thread would use 0.3 s of the 0.3 s; sleeping ones use none.

    The bound, a thirtieth of that, leaves room for the clock's ticks (1/100 s at the coarsest).
    """
    used = fresh("""
        for _ in range(100):
            pool.sum(8, 1000, 1)
        time.sleep(0.05)  # workers that were woken late go back to sleep
        before = time.process_time()
        time.sleep(0.3)
        print(time.process_time() - before)
    """)
    assert float(used) <= 0.01


@LINUX
def test_after_fork_the_child_has_workers_of_its_own(fresh: Callable[..., str]) -> None:
    said = fresh("""
        assert pool.meet(3, 3, LONG) == 3
        child = os.fork()
        if child == 0:
            good = threads() == 1 and pool.meet(3, 3, LONG) == 3 and threads() == 3
            os._exit(0 if good else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pool.meet(3, 3, LONG))
    """)
    assert said == "0 3"


def test_fork_while_another_thread_is_in_a_loop(fresh: Callable[..., str]) -> None:
    """The child inherits a pool that is taken, with workers inside, by a thread that it has not."""
    said = fresh("""
        busy = threading.Thread(target=pool.meet, args=(2, 3, 1000))  # in vain, for seconds
        busy.start()
        time.sleep(0.2)
        child = os.fork()
        if child == 0:
            os._exit(0 if pool.meet(2, 2, LONG) == 2 else 1)
        print(busy.is_alive(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        busy.join()
    """)
    assert said == "True 0"


def test_forked_multiprocessing_workers(fresh: Callable[..., str]) -> None:
    """What a data loader does: libgomp would hang here."""
    said = fresh("""
        import multiprocessing
        expected = pool.sum(4, 10_000, 9)
        def work(i):
            return pool.sum(1 + i % 4, 10_000, 9)
        with multiprocessing.get_context("fork").Pool(3) as processes:
            print(processes.map(work, range(30)) == [expected] * 30)
    """)
    assert said == "True"


@pytest.mark.parametrize("made", [0, 1])
def test_threads_that_cannot_be_had(tmp_path: Path, made: int) -> None:
    """A pool that gets no thread, or fewer than it asked for, does the work with those it has."""
    options = ("-fPIC", "-shared", "-DFAILING_THREADS", "-Dpthread_create=try_to_create")
    pool = load(compile_driver(tmp_path / "failing.so", *options))
    pool.fail_after(made)
    for _ in range(3):
        assert pool.sum(5, 1000, 7) == the_sum(1000)
    assert pool.meet(1 + made, 1 + made, LONG) == 1 + made
    assert pool.meet(5, 5, 20) == 1 + made
    pool.fail_after(100)  # and takes what it can get later
    assert pool.meet(5, 5, LONG) == 5


@LINUX
def test_workers_keep_off_the_callers_processor(tmp_path: Path) -> None:
    """Where they are told to run follows the caller, and those it may use; without need, nobody
    is told anything."""
    calls = ("sched_getcpu", "sched_getaffinity", "pthread_setaffinity_np")
    renamed = (f"-D{call}=driver_{call}" for call in calls)
    pool = load(compile_driver(tmp_path / "placed.so", "-fPIC", "-shared", "-DPLACES", *renamed))
    pool.place.argtypes = (ctypes.c_int, ctypes.c_uint64)
    pool.told_to_run_on.restype = ctypes.c_uint64

    def told(threads: int, here: int, allowed: int) -> tuple[int, int]:
        pool.place(here, allowed)
        assert pool.meet(threads, threads, LONG) == threads
        return pool.workers_told(), pool.told_to_run_on()

    assert told(3, 0, 0b0001) == (0, 0)  # there is nowhere else
    assert told(3, 0, 0b1111) == (2, 0b1110)
    assert told(3, 0, 0b1111) == (0, 0b1110)  # all as before
    assert told(2, 2, 0b1111) == (2, 0b1011)  # the caller moved: those that have no work now, too
    assert told(4, 2, 0b1111) == (3, 0b1011)  # a new worker
    assert told(4, 2, 0b0111) == (3, 0b0011)  # the caller may use fewer processors, or more
    assert told(4, 2, 1 << 63 | 0b0111) == (3, 1 << 63 | 0b0011)
    assert told(4, 1, 0b0010) == (0, 1 << 63 | 0b0011)  # nowhere else
    assert told(4, 1, 0) == (0, 1 << 63 | 0b0011)  # nobody knows
    assert told(4, -1, 0b1111) == (0, 1 << 63 | 0b0011)


@LINUX
def test_workers_really_run_elsewhere(fresh: Callable[..., str]) -> None:
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("there is nowhere else")
    said = fresh("""
        mine = os.sched_getaffinity(0)
        pool.meet(3, 3, LONG)
        workers = set(map(int, os.listdir("/proc/self/task"))) - {os.getpid()}
        theirs = [os.sched_getaffinity(worker) for worker in workers]
        left = [len(mine - processors) for processors in theirs if processors <= mine]
        print(left, theirs[0] == theirs[1])
    """)
    assert said == "[1, 1] True"


@pytest.mark.parametrize(
    ("sanitizer", "forks"),
    # ThreadSanitizer does not follow a fork of several threads
    [("thread", 0), ("address,undefined", 1)],
)
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: str, forks: int) -> None:
    options = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-DPROGRAM")
    program = compile_driver(tmp_path / "program", *options, f"-DFORKS={forks}")
    done = ended(program)
    assert done.returncode == 0, done.stderr


def test_a_missing_wait_is_a_data_race(tmp_path: Path) -> None:
    """The sanitizer's test can fail: here the caller does not wait for its workers."""
    source = POOL.read_text()
    line = "    wait_until_all_have_left();\n"
    assert source.count(line) == 1
    (tmp_path / "pool.c").write_text(source.replace(line, ""))
    options = ("-fsanitize=thread", "-DPROGRAM", "-DFORKS=0", "-Wno-unused")
    done = ended(compile_driver(tmp_path / "program", *options, source=tmp_path / "pool.c"))
    assert done.returncode != 0
    assert "data race" in done.stderr
