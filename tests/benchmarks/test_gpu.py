"""The GPU script without a GPU: all of it at toy sizes, and what must not get past it."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
Load = Callable[[str], ModuleType]
OURS = ("lora-core", "bitsandbytes", "dense")


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Import a benchmark: the repository's root is not on the path of a test run."""
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    sys.path.remove(str(ROOT))


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`torch.cuda` as the timing code calls it, which writes down what was asked."""
    log: list[str] = []

    def stream(*_: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: log.append("wait"))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("event done")

        def elapsed_time(self, stop: "Event") -> float:
            return 250.0  # milliseconds

    class Within:
        def __init__(self, what: Any) -> None:
            self.name = "capture" if isinstance(what, Graph) else "side stream"

        def __enter__(self) -> None:
            log.append(f"{self.name} begins")

        def __exit__(self, *_: object) -> None:
            log.append(f"{self.name} ends")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    fakes = {"is_available": lambda: True, "synchronize": lambda: log.append("idle")}
    fakes |= {"Stream": stream, "current_stream": stream, "stream": Within, "graph": Within}
    fakes |= {"CUDAGraph": Graph, "Event": Event}
    fakes["get_device_properties"] = lambda _: SimpleNamespace(L2_cache_size=50 << 20)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


# --- the whole script ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("gpu") / "toy.json"
    ended = run_script("--out", str(out))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    return SimpleNamespace(
        rows=json.loads(out.read_text()),
        markdown=out.with_suffix(".md").read_text(),
        printed=ended.stdout,
    )


def test_every_family_is_checked_and_right(smoke: SimpleNamespace) -> None:
    checks = [row for row in smoke.rows if row["kind"] == "check"]
    assert all(row["passed"] for row in checks)
    families = {"expand", "quantize", "planes", "halves", "dense", "multiply", "dx", "lora"}
    families |= {"mixed", "dx halves", "dx dense"}
    assert {row["family"] for row in checks} == families
    for family in families:
        kinds = {(row["dtype"], row["nested"]) for row in checks if row["family"] == family}
        assert kinds == {("bfloat16", True), ("float16", False)}


def test_everybody_is_timed_at_every_task(smoke: SimpleNamespace) -> None:
    timed = [row for row in smoke.rows if row["kind"] == "time"]
    assert not [row for row in timed if "refused" in row or "failure" in row]
    seen = {(row["task"], row["who"], row["mode"]) for row in timed if not row["routes"]}
    everyone = {
        "forward": 3, "dx": 3, "step": 3, "lora": 3, "lora step": 3,
        "expand": 2, "quantize": 2, "mixed": 1,
    }  # fmt: skip
    takes = {"expand": OURS[:2], "quantize": OURS[:2], "mixed": OURS[:1]}
    assert seen == {
        (task, who, mode)
        for task in everyone
        for who in takes.get(task, OURS)
        for mode in ("graph", "eager")
    }
    for row in timed:
        low, median, high = row["seconds"][1], row["seconds"][0], row["seconds"][2]
        assert 0 < low <= median <= high
        assert 0 <= row["error"] < 0.02
        assert row["share_of_floor"] > 0


def test_every_route_is_timed_by_itself(smoke: SimpleNamespace) -> None:
    routes = [row for row in smoke.rows if row["kind"] == "time" and row["routes"]]
    forward = {row["who"] for row in routes if row["task"] == "forward"}
    names = ("", " planes", " planes arranged", " halves", " dense")
    assert forward == {f"lora-core{name}" for name in names}
    backward = {row["who"] for row in routes if row["task"] == "dx"}
    assert backward == {"lora-core", "lora-core halves", "lora-core dense"}


def test_the_report_has_the_machine_the_targets_and_says_what_it_is(smoke: SimpleNamespace) -> None:
    facts = smoke.rows[0]
    assert facts["kind"] == "facts"
    assert facts["torch"] == torch.__version__
    assert facts["peers"] == ["bitsandbytes"]
    assert facts["command"] == "--smoke --out toy.json"
    assert smoke.rows[1]["kind"] == "ceilings"
    for text in (
        "smoke run", "## Targets", "expand: share of copy bandwidth", "M = 4 … 64", "error: times",
        "forward + backward, M = 8192", "## Routes", "| 32×128 | 4 |", "cases passed",
    ):  # fmt: skip
        assert text in smoke.markdown
    assert "## Not measured" not in smoke.markdown
    assert "missed" not in smoke.markdown  # toy figures are not judged
    assert smoke.markdown[: smoke.markdown.index("## expand")] in smoke.printed


def test_tuning_writes_a_table_that_the_routes_read(tmp_path: Path) -> None:
    from lora_kernels.gpu.tuned import read_tuned

    table = tmp_path / "tuned.json"
    ended = run_script("--tune", "--out", str(tmp_path / "o.json"), "--tuned", str(table))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    rows = [row for row in json.loads((tmp_path / "o.json").read_text()) if row["kind"] == "tile"]
    assert {row["way"] for row in rows} == {"planes", "halves", "dx"}
    ((_, shapes),) = read_tuned(table).items()
    entry = shapes["32x128/bfloat16"]
    assert {"planes", "halves", "dx"} < set(entry)
    assert set(entry["tiles"]) == {"planes", "halves", "dx"}
    assert "| halves | 32×128 | 5 |" in (tmp_path / "o.md").read_text()


# --- what must not get past it -------------------------------------------------------------------


def wrong_by_a_bit(y: torch.Tensor) -> torch.Tensor:
    return y + 0.02 * y.abs().amax(-1, keepdim=True)


def unwritten(y: torch.Tensor) -> torch.Tensor:
    return y.index_fill(1, torch.tensor([y.shape[1] - 1]), torch.nan)


calls = iter(range(1000))


def other_each_time(y: torch.Tensor) -> torch.Tensor:
    return y * (1 + 2**-7 * (next(calls) % 2))


@pytest.mark.parametrize("fault", [wrong_by_a_bit, unwritten, other_each_time])
@pytest.mark.parametrize("family", ["multiply", "dense", "dx", "dx dense", "lora", "mixed"])
def test_a_wrong_operator_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, family: str, fault: Callable
) -> None:
    contenders, check = load("gpu.contenders"), load("gpu.check")
    monkeypatch.setenv("LORA_KERNELS", "reference")
    owner = contenders.Route if family.endswith("dense") else contenders.Ours
    method = {"multiply": "forward", "dense": "forward", "mixed": "lora"}
    method = method.get(family, family.removesuffix(" dense"))
    right = getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *a, **k: fault(right(*a, **k)))
    case = {
        "dtype": "float16",
        "nested": True,
        "family": family,
        "shape": [80, 192],
        "m": 3,
        "runs": 2,
    }
    (row,) = check.check(case)
    assert not row["passed"]
    assert row["problems"]


def test_bits_may_depend_on_the_layout_of_x(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendor's library may choose another kernel for rows with a gap between them."""
    contenders, check = load("gpu.contenders"), load("gpu.check")
    monkeypatch.setenv("LORA_KERNELS", "reference")
    right = contenders.Route.forward

    def other_when_strided(self: Any, held: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
        y = right(self, held, x, *more)
        return y if x.is_contiguous() else torch.nextafter(y, torch.zeros_like(y))

    monkeypatch.setattr(contenders.Route, "forward", other_when_strided)
    case = {"dtype": "bfloat16", "nested": True, "family": "dense", "shape": [80, 192], "m": 3}
    (row,) = check.check(case | {"runs": 2})
    assert row["passed"], row


@pytest.mark.parametrize("family", ["quantize", "expand"])
@pytest.mark.parametrize("nested", [False, True])
def test_one_wrong_bit_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, family: str, nested: bool
) -> None:
    contenders, check = load("gpu.contenders"), load("gpu.check")
    right = getattr(contenders.Ours, family)

    def flipped(self: Any, *args: Any, **options: Any) -> Any:
        result = right(self, *args, **options)
        bits = result.codes if family == "quantize" else result.view(torch.int16)
        bits.view(-1)[-1] ^= 1
        return result

    monkeypatch.setattr(contenders.Ours, family, flipped)
    monkeypatch.setenv("LORA_KERNELS", "reference")
    case = {"dtype": "bfloat16", "nested": nested, "family": family, "shape": [7, 75], "runs": 2}
    (row,) = check.check(case)
    assert not row["passed"]
    assert "differ from the definition" in row["problems"][0]


@pytest.mark.parametrize(
    ("family", "owner", "method"),
    [
        ("planes", "Route", "forward"),
        ("halves", "Route", "forward"),
        ("dense", "Route", "forward"),
        ("dx", "Ours", "dx"),
        ("expand", "Ours", "expand"),
        ("quantize", "Ours", "quantize"),
    ],
)
def test_the_last_rows_of_a_large_weight_are_judged(
    load: Load, monkeypatch: pytest.MonkeyPatch, family: str, owner: str, method: str
) -> None:
    contenders, check = load("gpu.contenders"), load("gpu.check")
    monkeypatch.setenv("LORA_KERNELS", "reference")
    case = {"family": family, "m": 3}
    assert not list(check._beyond_32_bits(case, 160, 128, torch.bfloat16))
    right = getattr(getattr(contenders, owner), method)

    def lost(self: Any, *args: Any) -> Any:
        """What a 32-bit offset does: the far end is not where it was looked for."""
        result = right(self, *args)
        if family != "quantize":
            result.view(-1)[-1] = 1e4
        elif result.out_features == 160:
            result.codes[-1] ^= 1
        return result

    monkeypatch.setattr(getattr(contenders, owner), method, lost)
    assert list(check._beyond_32_bits(case, 160, 128, torch.bfloat16))


@pytest.mark.parametrize("family", ["multiply", "dx", "lora", "mixed", "expand", "quantize"])
def test_the_definition_passes_the_check_at_the_sizes_of_a_gpu(
    load: Load, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "reference")
    check, every = load("gpu.check"), load("gpu.cases").cases(False)
    mine = [c for c in every if c["family"] == family and not c.get("large")]
    small = [c for c in mine if c["shape"][0] * c["shape"][1] * c.get("m", 1) < 1 << 23]
    assert len(small) > 3
    for case in small[:: len(small) // 3]:
        (row,) = check.check(case)
        assert row["passed"], row


@pytest.mark.parametrize(("replayed", "problems"), [(True, 0), (False, 1)])
def test_a_graph_that_gives_other_bits_is_refused(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    fake_cuda: list[str],
    replayed: bool,
    problems: int,
) -> None:
    judge, y = load("gpu.judge"), torch.ones(3)
    monkeypatch.setattr(judge, "device", lambda: SimpleNamespace(type="cuda"))
    if replayed:
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: y.fill_(1))
    exact = iter([(torch.ones(3),), (y,)])
    assert len(list(judge.captured(lambda: next(exact), "it"))) == problems


def test_a_scale_beside_the_nearest_is_refused(load: Load) -> None:
    problem, check = load("gpu.problem"), load("gpu.check")
    scales = torch.rand(700)
    steps = problem.dynamic_map()
    q, absmax, offset = problem.search_scales(scales, steps)
    assert not list(check._nearest_scales(scales.double(), q, absmax, offset))
    q[600] += 1
    assert "1 of 700" in next(check._nearest_scales(scales.double(), q, absmax, offset))


def job(**changes: Any) -> dict[str, Any]:
    base = {"kind": "time", "task": "forward", "routes": False, "shape": [80, 192], "m": 3}
    base |= {"dtype": "bfloat16", "smoke": True, "peers": [], "refused": [], "banned": []}
    return base | {"no_graph": [], "ceilings": {}} | changes


def test_a_wrong_answer_is_not_timed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, contenders = load("gpu.timing"), load("gpu.contenders")
    monkeypatch.setenv("LORA_KERNELS", "reference")
    right = contenders.Ours.forward
    monkeypatch.setattr(contenders.Ours, "forward", lambda *a: wrong_by_a_bit(right(*a)))
    rows = [row for row in timing.measure(job()) if row["kind"] == "time"]
    ours = [row for row in rows if row["who"] == "lora-core"]
    assert len(ours) == 1
    assert "wrong: relative error" in ours[0]["refused"]
    assert "seconds" not in ours[0]
    assert {row["who"] for row in rows if "seconds" in row} == {"dense"}


def test_batches_are_as_long_as_the_clock_needs(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = load("gpu.timing")
    assert timing._calls(lambda: None, lambda call: 1e-6) == timing.MOST
    assert timing._calls(lambda: None, lambda call: 1.0) == timing.FEWEST
    assert timing._calls(lambda: None, lambda call: timing.BATCH / 10) == 10
    monkeypatch.setenv("LORA_KERNELS", "reference")
    rows = [row for row in timing.measure(job(smoke=False, shape=[48, 128])) if "seconds" in row]
    assert {(row["who"], row["mode"]) for row in rows} == {
        (who, mode) for who in ("lora-core", "dense") for mode in ("graph", "eager")
    }
    for row in rows:  # a call's, not a batch's
        assert 1e-7 < row["seconds"][0] < 0.1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"refused": ["multiply"]}, "the check of multiply did not pass"),
        ({"banned": ["lora-core"]}, "it ended an earlier process"),
    ],
)
def test_what_failed_before_is_not_timed(load: Load, changes: dict[str, Any], why: str) -> None:
    rows = [row for row in load("gpu.timing").measure(job(**changes)) if row["kind"] == "time"]
    assert [row["refused"] for row in rows if row["who"] == "lora-core"] == [why]
    assert any("seconds" in row for row in rows)


def test_a_failure_ends_the_command_with_1(load: Load) -> None:
    gpu, report = load("gpu.__main__"), load("gpu.report").Report(None)
    report.add({"kind": "check", "passed": True})
    report.add({"kind": "time", "who": "bitsandbytes", "refused": "no kernel"})
    report.add({"kind": "time", "who": "bitsandbytes", "failure": "exit code 1"})
    assert not gpu.failed(report)
    for row in (
        {"kind": "check", "passed": False},
        {"kind": "check", "failure": "exit code -11"},
        {"kind": "time", "who": "lora-core planes", "refused": "wrong"},
        {"kind": "time", "failure": "exit code -11"},
        {"kind": "time", "failure": "exit code -11", "who": "lora-core"},
    ):
        bad = load("gpu.report").Report(None)
        bad.add(row)
        assert gpu.failed(bad)


def test_what_is_refused_failed_or_was_not_reached(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = load("gpu.__main__")
    args = SimpleNamespace(out=None, smoke=True, minutes=8, only=None, lanes=1, dtype="bfloat16")
    run = gpu.Run(args)

    def some(jobs: Any, *_: Any) -> None:
        for one in jobs:
            right = {"expand": True, "multiply": one["m"] != 17 if "m" in one else True}
            right |= {"halves": one["dtype"] == "bfloat16", "lora": one["dtype"] == "float16"}
            if one["family"] in right:
                run.report.add(one | {"passed": right[one["family"]]})

    monkeypatch.setattr(run, "do", some)
    refused = set(run.check_for(gpu.timing_jobs(gpu.TOY, "bfloat16", True, {})))
    assert not refused & {"expand", "halves"}  # float16 is wrong, bfloat16 is timed
    assert {"multiply", "lora", "planes", "quantize"} < refused


@pytest.mark.parametrize(
    ("only", "families"),
    [
        ("time forward bfloat16 32x128", {"multiply"}),
        ("routes", {"multiply", "planes", "halves", "dense", "dx", "dx halves", "dx dense"}),
        ("lora step", {"lora"}),
        ("check expand", {"expand"}),
    ],
)
def test_only_checks_what_it_needs(
    load: Load, monkeypatch: pytest.MonkeyPatch, only: str, families: set[str]
) -> None:
    gpu, seen = load("gpu.__main__"), set()
    args = SimpleNamespace(out=None, smoke=True, minutes=8, only=only, lanes=1, dtype="bfloat16")
    run = gpu.Run(args)
    monkeypatch.setattr(run, "do", lambda jobs, *_: seen.update(job["family"] for job in jobs))
    every = gpu.timing_jobs(gpu.TOY, "bfloat16", True, {})
    run.check_for([job for job in every if run.wanted(job)])
    assert seen == families


def test_every_contender_needs_a_check_that_exists(load: Load) -> None:
    contenders, cases = load("gpu.contenders"), load("gpu.cases")
    families = {case["family"] for case in cases.cases(False)}
    for task in contenders.TASKS:
        assert cases.NEEDS[task] == {contenders.Ours.families[task]} <= families
        for route in contenders.ROUTES:
            if route.can(task):
                assert route.families[task] in cases.ROUTES_NEED[task] & families


# --- processes that die --------------------------------------------------------------------------

STUB = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({"kind": "row", "n": job["n"]}), flush=True)
    print(json.dumps({"kind": "trying", "who": "a" if job["n"] == 1 else None}), flush=True)
    if job["n"] == 1: sys.exit("out of luck")
    if job["n"] == 2: time.sleep(60)
    print(json.dumps({"kind": "done", "ends": job["n"] == 5}), flush=True)
"""


def test_a_worker_that_dies_or_hangs_costs_one_job(load: Load) -> None:
    lanes = load("gpu.lanes")
    lane = lanes.Lane(os.environ, (sys.executable, "-c", STUB))
    rows: list[dict[str, Any]] = []
    left = lanes.run_jobs([lane], [{"n": n} for n in range(4)], 60.0, 1.5, rows.append)
    lane.close()
    assert left == []
    assert [row["n"] for row in rows if "failure" not in row] == [0, 1, 2, 3]
    died, hung = [row for row in rows if "failure" in row]
    assert "exit code 1; out of luck" in died["failure"]
    assert died["who"] == "a"  # whom it was about to run
    assert "took more than" in hung["failure"]
    assert "who" not in hung
    assert lane.process is None


def test_a_worker_that_asks_for_it_is_replaced(load: Load) -> None:
    lane = load("gpu.lanes").Lane(os.environ, (sys.executable, "-c", STUB))
    rows: list[dict[str, Any]] = []
    assert lane.run({"n": 0}, 9.0, rows.append)
    assert lane.process is not None
    assert lane.run({"n": 5}, 9.0, rows.append)
    assert lane.process is None
    assert lane.run({"n": 0}, 9.0, rows.append)
    lane.close()
    assert not [row for row in rows if "failure" in row]


def test_a_failed_capture_is_told_and_the_stream_put_back(
    load: Load, monkeypatch: pytest.MonkeyPatch, fake_cuda: list[str]
) -> None:
    gpu, harness, timing = load("gpu.__main__"), load("harness"), load("gpu.timing")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: fake_cuda.append("put back"))
    monkeypatch.setattr(timing, "spoilt", [])
    monkeypatch.setattr(timing, "device", lambda: SimpleNamespace(type="cuda"))

    class Broken:
        def __init__(self, graph: Any) -> None: ...

        def __enter__(self) -> None:
            monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("the capture is invalid")

    def waits(_: Any) -> None:
        raise ValueError("it waits for the device")

    monkeypatch.setattr(torch.cuda, "graph", Broken)
    with pytest.raises(harness.CaptureError, match="ValueError: it waits for the device"):
        harness.capture(lambda: waits(None))
    assert fake_cuda[-1] == "put back"
    found = dict(timing.timed(dict.fromkeys("ab", (lambda _: None, [0])), "graph", True))
    assert found["a"] == "no graph: RuntimeError: the capture is invalid"
    assert timing.spoilt == ["a"]
    run = gpu.Run(SimpleNamespace(out=None, smoke=True, minutes=8, only=None))
    for name in "ab":
        run.on_row(job(who=name, refused=found[name]))
    assert run.prepare(job())["no_graph"] == ["a"]
    assert run.prepare(job(task="dx"))["no_graph"] == []


def test_a_job_that_the_end_of_the_run_cuts_is_no_failure(load: Load) -> None:
    lanes = load("gpu.lanes")
    lane, rows = lanes.Lane(os.environ, (sys.executable, "-c", STUB)), []
    assert not lane.run({"n": 2}, 1.0, rows.append, cut=True)
    assert lane.run({"n": 1}, 9.0, rows.append, cut=True)
    assert ["failure" in row for row in rows] == [False, False, True]
    assert lane.process is None


def test_jobs_for_which_no_time_is_left_are_returned_in_order(load: Load) -> None:
    lanes = load("gpu.lanes")
    lane = lanes.Lane(os.environ, (sys.executable, "-c", STUB))
    jobs = [{"n": 0}, {"n": 3}]
    began = time.monotonic()
    assert lanes.run_jobs([lane], jobs, 0.0, 1.0, lambda row: None) == jobs
    assert time.monotonic() - began < 1
    assert lane.process is None


def test_whoever_was_tried_when_a_worker_died_is_not_tried_again(load: Load) -> None:
    gpu = load("gpu.__main__")
    run = gpu.Run(SimpleNamespace(out=None, smoke=True, minutes=8, only=None))
    died = {"failure": "the process died: exit code -6; it said nothing", "who": "lora-core planes"}
    run.on_row(job() | died)
    assert run.prepare(job())["banned"] == ["lora-core planes"]
    assert run.prepare(job(task="dx"))["banned"] == []  # at that task


def test_who_ends_the_process_while_it_is_timed_is_known(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "reference")
    rows = list(load("gpu.timing").measure(job(shape=[48, 128])))
    tried = [row["who"] for row in rows if row["kind"] == "trying"]
    each = ["lora-core", "dense", None]
    assert tried == each * 3  # judged, in a graph, eager


def test_what_no_graph_can_hold_is_not_captured(
    load: Load, monkeypatch: pytest.MonkeyPatch, fake_cuda: list[str]
) -> None:
    timing = load("gpu.timing")
    monkeypatch.setattr(timing, "device", lambda: SimpleNamespace(type="cuda"))
    runs = {name: (lambda _, n=name: fake_cuda.append(f"run {n}"), [0]) for name in "ab"}
    found = dict(timing.timed(runs, "graph", True, {"a": "it cannot"}))
    assert found["a"] == "no graph: it cannot"
    assert found["b"].median > 0
    assert "run b" in fake_cuda
    assert "run a" not in fake_cuda


@pytest.mark.parametrize("nested", [False, True])
def test_quantizing_waits_for_nothing_and_copies_no_table(
    load: Load, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    """A CUDA graph can hold neither."""
    contenders = load("gpu.contenders")
    w = torch.randn(8, 64)
    first = contenders.Ours().quantize(w, nested)
    flags: list[Any] = []
    quant = importlib.import_module("lora_core.quant.nf4")
    right = quant.quantize4
    monkeypatch.setattr(
        quant, "quantize4", lambda *a, **k: flags.append(k["flag"]) or right(*a, **k)
    )
    again = contenders.Ours().quantize(w, nested)
    assert flags[0] is not None
    assert again.table is first.table
    assert again.scale_table is first.scale_table
    assert torch.equal(again.codes, first.codes)


# --- the report ----------------------------------------------------------------------------------


def test_a_run_that_is_cut_leaves_every_row(load: Load, tmp_path: Path) -> None:
    report = load("gpu.report").Report(tmp_path / "new" / "gpu.json")
    for n in range(3):
        report.add({"kind": "row", "n": n})
        assert [row["n"] for row in json.loads(report.path.read_text())] == list(range(n + 1))
    assert list(report.path.parent.iterdir()) == [report.path]
    for _ in range(60):  # and now and then the tables
        report.add({"kind": "facts", "machine": "a GPU"})
    assert report.path.with_suffix(".md").read_text().startswith("# a GPU")


def timed(task: str, m: int, who: str, seconds: float, **more: Any) -> dict[str, Any]:
    row = {"kind": "time", "task": task, "shape": [4096, 14336], "m": m, "dtype": "bfloat16"}
    row |= {"who": who, "mode": "graph", "routes": False, "seconds": [seconds] * 3}
    return row | {"share_of_floor": 0.75, "error": 1e-3} | more


def test_targets_take_the_worst_and_say_what_was_not_measured(load: Load) -> None:
    report = load("gpu.report")
    rows = [
        timed("forward", 1, "lora-core", 1.0),
        timed("forward", 1, "bitsandbytes", 1.6),
        timed("forward", 4, "lora-core", 1.0),
        timed("forward", 4, "bitsandbytes", 2.0),
        timed("forward", 4, "bitsandbytes", 9.0, mode="eager"),
        timed("forward", 4, "dense", 1.0, error=9e-4),
        timed("step", 2048, "lora-core", 1.1),
        timed("step", 2048, "dense", 1.0),
        timed("forward", 1, "lora-core", 0.1, routes=True),
    ]
    found = {target.text: (target.met(), target.worst()) for target in report.targets(rows)}
    where = "4096×14336, M = "
    assert found["M = 1: times as fast as bitsandbytes"] == (True, (where + "1", 1.6))
    assert found["M = 4 … 64: times as fast as bitsandbytes"] == (False, (where + "4", 2.0))
    met, worst = found["forward + backward, M = 2048: times dense"]
    assert met
    assert worst[1] == pytest.approx(1.1)
    met, worst = found["error: times dense's"]
    assert not met
    assert worst[1] == pytest.approx(10 / 9)
    assert found["M = 1, 58.7 M weights: share of the memory floor"][0]
    assert found["expand: share of copy bandwidth"] == (None, None)


def test_crossovers_stop_where_another_route_is_faster(load: Load) -> None:
    tune = load("gpu.tune")
    rows = [
        {"kind": "tile", "way": way, "shape": [64, 64], "m": m, "dtype": "bfloat16",
         "fields": fields, "seconds": [seconds] * 3}
        for way, m, fields, seconds in [
            ("planes", 1, {}, 1.0), ("planes", 1, {"warps": 8}, 0.5), ("planes", 1, None, 9.0),
            ("planes", 4, {}, 3.0), ("planes", 4, None, 9.0),
            ("halves", 1, {}, 2.0), ("halves", 1, None, 9.0),
            ("halves", 4, {}, 2.0), ("halves", 4, {"warps": 8}, 1.99), ("halves", 4, None, 9.0),
            ("halves", 64, {}, 12.0), ("halves", 64, None, 9.0),
            ("dx", 4, {}, 10.0), ("dx", 4, None, 9.0),
        ]
    ]  # fmt: skip
    entry = tune.best_of(rows)["64x64/bfloat16"]
    assert (entry["planes"], entry["halves"], entry["dx"]) == (1, 4, 0)
    assert entry["tiles"]["planes"] == {"1": {"warps": 8}, "4": {}}
    assert entry["tiles"]["halves"]["4"] == {}  # half a percent is noise


@pytest.mark.parametrize("way", ["planes", "halves", "dx"])
def test_every_candidate_is_a_tile_that_its_kernel_has(load: Load, way: str) -> None:
    from lora_kernels.gpu import matmul4, matmul4_dx, planes4

    gpu, tune = load("gpu.__main__"), load("gpu.tune")
    default = {
        "planes": planes4.default_tile,
        "halves": matmul4.default_tile,
        "dx": matmul4_dx.default_dx_tile,
    }[way]
    for n, k in gpu.LLAMA:
        for m in tune.ROWS[way]:
            found = tune.candidates(way, n, k, m, torch.bfloat16)
            assert found[0] == {}
            tiles = [dataclasses.replace(default(m, n, k, torch.bfloat16), **f) for f in found]
            assert len(set(tiles)) == len(tiles) > 4
            for tile in tiles:  # the others refuse what they do not have when they are made
                assert tile.rows in ((2, 4, 8) if way == "planes" else (16, 32, 64))
                assert way != "planes" or planes4._check(tile) is None


def test_the_routes_read_what_tuning_writes(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels.gpu import tuned

    path, bf16 = tmp_path / "tuned.json", torch.bfloat16
    tiles = {"planes": {"1": {"splits": 2}, "4": {}}, "dx": {"64": {"features": 64, "warps": 4}}}
    entry = {"planes": 2, "halves": 96, "dx": 0, "tiles": tiles}
    load("gpu.tune").write_tuned(path, "NVIDIA H200", {"64x128/bfloat16": entry})
    table = tuned.read_tuned(path)
    monkeypatch.setattr(tuned, "read_tuned", lambda: table)
    crossover, fields = tuned.crossover.__wrapped__, tuned.tile_fields.__wrapped__
    assert crossover("NVIDIA H200", 64, 128, bf16) == (2, 96, 0)
    assert fields("NVIDIA H200", 64, 128, bf16, "planes", 1) == {"splits": 2}
    assert fields("NVIDIA H200", 64, 128, bf16, "planes", 3) == {}
    assert fields("NVIDIA H200", 64, 128, bf16, "dx", 33) == {"features": 64, "warps": 4}


def test_a_measured_table_keeps_what_it_held(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"A": {"1x1/float16": {"planes": 1, "halves": 2, "dx": 3}}}))
    load("gpu.tune").write_tuned(path, "B", {"64x64/bfloat16": {"halves": 7, "tiles": {}}})
    table = json.loads(path.read_text())
    assert table["A"]["1x1/float16"]["dx"] == 3
    assert table["B"]["64x64/bfloat16"] == {"planes": 4, "halves": 7, "dx": 64, "tiles": {}}


def test_the_workers_find_the_kernels_uninstalled(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "peers")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for smoke in (True, False):
        environment = load("gpu.__main__").Run(SimpleNamespace(out=None, smoke=smoke)).environment
        assert environment["PYTHONPATH"] == f"{ROOT / 'kernels'}{os.pathsep}peers"
        assert "PYTHONSAFEPATH" not in environment
        assert environment["LORA_KERNELS"] == "triton"
        assert environment.get("TRITON_INTERPRET") == ("1" if smoke else None)


# --- the command line ----------------------------------------------------------------------------


def test_shapes_of_a_model(load: Load, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config.write_text(json.dumps(llama | {"intermediate_size": 14336}))
    assert load("gpu.__main__").model_shapes(config) == [
        [4096, 4096], [1024, 4096], [14336, 4096], [4096, 14336],
    ]  # fmt: skip
    config.write_text(json.dumps(llama))
    with pytest.raises(SystemExit, match="has no 'intermediate_size'; give the shapes"):
        load("gpu.__main__").model_shapes(config)


@pytest.mark.parametrize("text", ["4096", "x4", "0x4096", "4096x-1"])
def test_a_bad_shape_is_refused(load: Load, text: str) -> None:
    with pytest.raises(Exception, match="a shape is NxK"):
        load("gpu.__main__").shape(text)


def test_every_shape_and_count_is_planned_the_targets_first(load: Load) -> None:
    gpu = load("gpu.__main__")
    jobs = gpu.timing_jobs(gpu.LLAMA, "bfloat16", False, {})
    for task in ("forward", "dx"):
        planned = {(tuple(j["shape"]), j["m"]) for j in jobs if j["task"] == task}
        assert planned == {(tuple(s), m) for s in gpu.LLAMA for m in gpu.ROWS}
    early = [(j["task"], j["m"]) for j in jobs[:28]]
    assert ("expand", 0) in early
    assert ("forward", 1) in early
    assert ("step", 8192) in early


# --- timing --------------------------------------------------------------------------------------


def test_a_graph_is_captured_after_calls_outside_it_and_then_replayed(
    load: Load, fake_cuda: list[str]
) -> None:
    replay = load("harness").captured(lambda n: fake_cuda.append(f"call {n}"), [1, 2, 3], 4)
    six = [f"call {n}" for n in (1, 2, 3, 1, 2, 3)]
    warm = ["wait", "side stream begins", "call 1", "call 2", "side stream ends", "wait"]
    assert fake_cuda == [*warm, "capture begins", *six, "capture ends"]
    replay(None)
    assert fake_cuda[-1] == "replay"


def test_the_device_clock_reads_seconds_between_events(load: Load, fake_cuda: list[str]) -> None:
    assert load("harness").device_seconds(lambda: fake_cuda.append("call")) == 0.25
    assert fake_cuda == ["idle", "record", "call", "record", "event done"]


@pytest.mark.parametrize(("nbytes", "copies"), [(30 << 20, 5), (1 << 40, 2), (1 << 10, 64)])
def test_copies_overflow_the_cache_twice(
    load: Load, fake_cuda: list[str], nbytes: int, copies: int
) -> None:
    assert load("harness").past_the_cache(nbytes, torch.device("cuda")) == copies


def test_a_batch_goes_on_where_the_last_one_ended(load: Load) -> None:
    seen: list[int] = []
    batch = load("harness").in_a_row(seen.append, [1, 2, 3], 2)
    batch(None)
    batch(None)
    assert seen == [1, 2, 3, 1]


def test_a_graph_goes_through_all_inputs(load: Load) -> None:
    seen: list[int] = []
    load("harness").captured(seen.append, [1, 2, 3], 4)(None)
    assert seen == [1, 2, 3, 1, 2, 3]


def test_a_limit_on_time_leaves_three_turns(load: Load) -> None:
    harness, calls = load("harness"), []
    harness.time_in_turns({"a": calls.append}, {"a": [0]}, 50, limit=0.0)
    assert len(calls) == 4  # one is not timed
