"""Several processes make the steps of one, replicated and sharded, and end together."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.train import TrainConfig
from lora_core.train.folder import RunFolder
from lora_core.train.interrupt import Interrupts
from lora_core.train.parts import buckets
from lora_core.train.ranks import RankError, Ranks, is_broken, local_device
from lora_core.train.shard import can_shard

SCRIPT = Path(__file__).with_name("ranks_script.py")

# 11 batches an epoch, 4 a step: the last step has 3, of which rank 1 gets one and computes an idle
# one beside it
EQUAL: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "config": {"accumulate": 2, "optimizer": "adamw-paged"}},
    "qlora": {"kind": "qlora", "config": {"accumulate": 2, "clip": 0.05}},
    "lora sharded": {"kind": "lora", "config": {"accumulate": 2, "shard": True}},
    "qlora sharded": {"kind": "qlora", "config": {"accumulate": 2, "clip": 0.05, "shard": True}},
    "full sharded": {"kind": "full", "config": {"accumulate": 1, "lr": 1e-3, "shard": True}},
    "recomputed": {
        "kind": "qlora",
        "config": {"accumulate": 1, "activation_checkpointing": True, "shard": True},
    },
}
STOPPED: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "dropout": 0.2, "config": {"accumulate": 2, "steps": 9}},
    "qlora": {"kind": "qlora", "dropout": 0.2, "config": {"accumulate": 1, "steps": 9}},
}
FAILING = {"disk": {"save_every": 2}, "nan": {}}


def cases() -> list[dict[str, Any]]:
    """All that one pair of processes does, in this order."""
    found = [{"name": name, **case} for name, case in EQUAL.items()]
    for kind, case in STOPPED.items():
        case["config"] |= {"eval_every": 3, "shard": kind == "qlora"}
        straight = {**case, "name": f"{kind} straight", "out": f"{kind} straight"}
        part = {**case, "name": f"{kind} stopped", "out": f"{kind} stopped", "stop": 7}
        rest = {**case, "name": f"{kind} resumed", "out": f"{kind} stopped"}
        rest["config"] = {**case["config"], "resume": True}
        found += [straight, part, rest]
    for how, config in FAILING.items():
        found.append({"name": how, "out": how, "fails": how, "kind": "lora", "config": config})
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(words: list[str], world: int = 2) -> list[subprocess.Popen[str]]:
    """Start the processes of a run as torchrun would, but without its agent to end them."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    try:
        errs = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, err) for process, err in zip(processes, errs, strict=True)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with what two processes made of each case, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    results = ended(start([str(SCRIPT), str(folder), json.dumps(cases())]))
    assert [code for code, _ in results] == [0, 0], results[0][1] + results[1][1]
    return folder, [err for _, err in results]


def read(pair: tuple[Path, list[str]], name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(pair[0] / f"{name}.{rank}.pt", weights_only=False)
    return found


def closest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two sets of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-9)) for k in a)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_make_the_steps_of_one(
    script: ModuleType, pair: tuple[Path, list[str]], name: str
) -> None:
    case = {**EQUAL[name], "config": {**EQUAL[name]["config"]}}
    case["config"]["accumulate"] *= 2
    case["config"].pop("shard", None)
    one, two = script.report(case, None), read(pair, name)
    assert len(two["history"]) == 20
    numbers = {"loss", "loss/a", "loss/b", "grad_norm", "eval_loss", "eval_loss/a"}
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a.keys() == b.keys()
        assert {k: a[k] for k in ("graded", "tokens", "lr", "epoch")} == {
            k: b[k] for k in ("graded", "tokens", "lr", "epoch")
        }
        for key in numbers & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5, rel=1e-5), (a["step"], key)
    assert one["best"] == two["best"]
    assert closest(one["weights"], two["weights"]) < 1e-4
    other = read(pair, name, 1)
    assert closest(two["weights"], other["weights"]) == 0
    for found in (two, other):  # the model is as it was, apart from what was trained
        assert found["same_names"]
        assert found["same_base"] or case["kind"] == "full"
        assert found["types"] == one["types"]


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_each_process_holds_its_part(pair: tuple[Path, list[str]], kind: str) -> None:
    halves = [read(pair, f"{kind} sharded", rank) for rank in range(2)]
    whole = sum(half["bytes"] for half in halves)
    assert halves[0]["kinds"] == ["DTensor"]
    # what does not divide by two goes to the first
    assert abs(halves[0]["bytes"] - halves[1]["bytes"]) <= 0.02 * whole
    if kind != "full":
        assert read(pair, kind)["kinds"] == ["Parameter"]
    if kind == "qlora":  # doubly quantized scales are parameters of their own, in both forms
        assert halves[0]["scales"] == {"torch.uint8", "torch.float32"}


@pytest.mark.parametrize("kind", STOPPED)
def test_stopped_and_resumed_is_bit_equal(
    pair: tuple[Path, list[str]], without_times: Callable[..., Any], kind: str
) -> None:
    straight, part, rest = (read(pair, f"{kind} {w}") for w in ("straight", "stopped", "resumed"))
    # only rank 1 pressed Ctrl-C, and both stopped
    stops = [read(pair, f"{kind} stopped", rank) for rank in range(2)]
    assert [(s["interrupted"], len(s["history"])) for s in stops] == [(True, 7)] * 2
    assert without_times(rest["history"]) == without_times(straight["history"])
    assert without_times(part["history"]) == without_times(straight["history"][:7])
    assert closest(straight["weights"], rest["weights"]) == 0
    # without dropout the runs of EQUAL would show whether processes drew the same numbers; here
    # their generators have to differ
    from safetensors.torch import load_file

    rng = load_file(pair[0] / f"{kind} straight" / "checkpoints" / "step-00000009/rng.safetensors")
    assert not torch.equal(rng["cpu"], rng["rank1/cpu"])


def test_one_writes_and_speaks(pair: tuple[Path, list[str]]) -> None:
    first, second = pair[1]
    assert "on 2 processes" in first
    assert second.strip() == ""
    files = sorted(p.name for p in (pair[0] / "lora straight").iterdir())
    assert files == [".lock", "checkpoints", "metrics.jsonl", "run.json"]


def test_what_stops_one_stops_all(pair: tuple[Path, list[str]]) -> None:
    full = "cannot write weights.safetensors: no space left"
    first, second = (read(pair, "disk", rank)["error"] for rank in range(2))
    assert first == f"OSError: {full}; there is no checkpoint to resume"
    assert second == f"RankError: rank 0: {full}"
    first, second = (read(pair, "nan", rank)["error"] for rank in range(2))
    assert first == "RankError: rank 1: the loss is nan"
    assert re.match(
        r"NonFiniteError: the loss is nan at step 1, rows .* in .*-rank1; lower", second
    )


BASE = [
    *("--method", "qlora", "--batch-size", "1", "--accumulate", "1", "--max-length", "32"),
    *("--progress", "false", "--device", "cpu"),
]


def finetune_words(folder: Path, *more: str) -> list[str]:
    """The words of a small run of the shipped base."""
    from lora_core import base_model_path

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "Yes"},
            ]
        }
        for i in range(6)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--data", str(folder / "chats.jsonl"), "--out", str(folder / "run")]
    return ["finetune", "--model", str(base_model_path()), *files, *BASE, *more]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(
    tmp_path: Path, dies: int, full_run: bool
) -> None:
    if dies == 0 and not full_run:
        pytest.skip("LORA_TEST_FULL=1: that the first one dies")
    words = finetune_words(tmp_path, "--steps", "100000", "--save-every", "1")
    processes = start(["-m", "lora_core", *words])
    latest = tmp_path / "run" / "checkpoints" / "latest"
    try:
        deadline = time.monotonic() + 200
        while not latest.exists() and all(p.poll() is None for p in processes):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        processes[dies].send_signal(signal.SIGKILL)
    finally:
        results = ended(processes)
    code, err = results[1 - dies]
    assert code == 1, err
    last = err.strip().splitlines()[-1]
    said = rf"lora-core finetune: rank {dies} is gone \(.+\); the last good checkpoint is .*/"
    assert re.fullmatch(said + r"step-\d{8}; resume with --resume", last), err
    assert "Traceback" not in err


def test_torchrun_end_to_end(tmp_path: Path) -> None:
    words = finetune_words(tmp_path, "--steps", "2", "--shard", "true", "--json")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "lora_core", *words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)  # one object, from one process
    assert (facts["steps"], facts["method"]) == (2, "qlora")
    assert done.stderr.count("saved and read back: 70 tensors") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_ranks_share_of_a_step() -> None:
    shares = [list(Ranks(rank, 3).own("abcdefg")) for rank in range(3)]
    assert shares == [
        [("a", True), ("d", True), ("g", True)],
        [("b", True), ("e", True), ("a", False)],
        [("c", True), ("f", True), ("a", False)],
    ]
    assert list(Ranks().own("ab")) == [("a", True), ("b", True)]


def test_buckets_keep_order_and_dtype() -> None:
    sizes = [(3, torch.float32), (2, torch.float32), (1, torch.float64), (9, torch.float64)]
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in sizes]
    found = list(buckets(tensors, 4))
    assert [[len(t) for t in bucket] for bucket in found] == [[3], [2], [1], [9]]
    assert [len(bucket) for bucket in buckets(tensors, 100)] == [2, 2]


def test_shard_needs_processes(script: ModuleType) -> None:
    case = {"kind": "lora", "config": {"shard": True}}
    with pytest.raises(
        ValueError, match=r"there is one: start with torchrun --nproc-per-node N -m"
    ):
        script.run(case, None)


def test_what_cannot_be_split() -> None:
    for optimizer in ("adamw8bit", "adamw-paged"):
        with pytest.raises(ValueError, match=f"state of adamw .* not of {optimizer}: leave one"):
            TrainConfig(shard=True, optimizer=optimizer)
    with pytest.raises(ValueError, match="shard does not scale the loss, as float16 needs it"):
        TrainConfig(shard=True, dtype="float16")


def test_a_checkpoint_that_another_process_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(1, 2)
    monkeypatch.setattr(Ranks, "on_first", lambda self, action: tmp_path / "step-00000003")
    monkeypatch.setattr(Ranks, "sum", lambda self, *numbers: numbers)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda said, own: None)
    folder = RunFolder(TrainConfig(out=tmp_path), ranks)
    with pytest.raises(RankError, match=r"rank 1 cannot read .*-00000003 .*file system they sh"):
        folder.newest()


def test_a_signal_that_torchrun_repeats_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 13.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Interrupts(speaks=False, echoes=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_old_torch_replicates_and_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [can_shard(v) for v in ("2.11.1", "2.12.0+cpu", "3.0")] == [False, True, True]
    from lora_core.train import shard

    monkeypatch.setattr(shard, "can_shard", lambda: False)
    model = script.make_model("qlora")
    with shard.sharded_model(model, Ranks(0, 2), torch.device("cpu")):
        assert all(type(p) is nn.Parameter for p in model.parameters())
    assert "cannot split 4-bit weights, 2.12 can: each process holds" in capsys.readouterr().err


def test_the_device_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert local_device(cuda) == cuda
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device(cuda) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match=r"process 2 of this machine has no GPU: there are 2; start"
    ):
        local_device(cuda)


def test_what_counts_as_a_broken_exchange() -> None:
    assert is_broken(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not is_broken(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_broken(torch.OutOfMemoryError("connection refused"))
