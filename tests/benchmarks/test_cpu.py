"""The CPU script at toy sizes, and what must not get past it."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
TASKS = {
    "quantize", "expand", "expand kept", "forward m=1", "forward m=8", "forward m=64",
    "forward m=512", "dx m=64", "dx m=512",
}  # fmt: skip
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def load(load_benchmark: Callable[[str], ModuleType]) -> Load:
    return lambda name: load_benchmark(f"cpu.{name}")


@pytest.fixture(autouse=True)
def _quickly(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of one call, few copies."""
    monkeypatch.setattr(load("timing"), "TURN", 0.0)
    monkeypatch.setattr(load("timing"), "MOST_COPIES", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def contenders(load: Load, oracle: Callable[[str], ModuleType]) -> dict[str, Any]:
    """Everybody that needs no compiler, by name; all are on this machine or none of bnb's."""
    oracle("bitsandbytes")
    c = load("contenders")
    everyone = [c.Ours("reference"), *c._bitsandbytes()[0]]
    everyone += [c.Dense(torch.bfloat16), c.Dense(torch.float32), c.TorchInt4()]
    return {one.name: one for one in everyone}


def measured(load: Load, everyone: list[Any], n: int = 64, k: int = 128, only: str = "") -> Any:
    """A run of some tasks on one toy shape."""
    main = load("__main__")
    run, wanted = main.Run(everyone, 2), only.split(", ") if only else TASKS
    with torch.no_grad():
        run.shape(n, k, [task for task in main.TASKS if task.label in wanted], 1 << 16)
    return run


# --- the whole script ----------------------------------------------------------------------------


def test_the_script_runs_and_records_nothing_at_toy_sizes(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH",)}
    out = tmp_path / "rows.jsonl"
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", "--smoke", "--only", "e|m=1$", "--out", str(out)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert ended.stderr == ""  # no peer's warnings
    for text in (
        "quantize, 64 x 128", "expand kept, 64 x 128", "x Wᵀ, M = 1, 64 x 128", "streaming read",
        "lora-core reference", "dense bf16", "torch int4", "Figures to reach, by lora-core ",
        "the figures mean nothing and are not recorded",
    ):  # fmt: skip
        assert text in ended.stdout
    assert not out.exists()


def test_everybody_is_timed_at_what_it_can_do(load: Load, contenders: dict[str, Any]) -> None:
    run = measured(load, list(contenders.values()))
    assert not run.absent
    who: dict[str, set[str]] = {}
    for row in run.rows:
        who.setdefault(row["task"], set()).add(row["who"])
        median, low, high = row["seconds"]
        assert 0 < low <= median <= high
        assert row["ours"] == (row["who"] == "lora-core reference")
        assert (row["share_of_streaming"] is None) == (row["m"] > 8)
        if row["error"] is not None:
            assert 0 <= row["error"] < 0.01
    ours, stream = {"lora-core reference"}, {"streaming read"}
    dense, packed = {"dense bf16", "dense f32"}, {"bitsandbytes packed"} & set(contenders)
    forward = ours | {"bitsandbytes", "torch int4"} | dense | packed
    assert who == {
        "quantize": ours | {"bitsandbytes"} | stream,
        "expand": ours | {"bitsandbytes"} | stream,
        "expand kept": ours | {"bitsandbytes in C"} | stream,
        "forward m=1": forward | stream,
        "forward m=8": forward | stream,
        "forward m=64": forward,
        "forward m=512": forward,
        "dx m=64": ours | {"bitsandbytes"} | dense,
        "dx m=512": ours | {"bitsandbytes"} | dense,
    }


def test_shares_are_of_bytes_that_have_to_move(load: Load, contenders: dict[str, Any]) -> None:
    rows = measured(load, list(contenders.values()), only="forward m=1, expand").rows
    seconds = {row["who"]: row for row in rows if row["task"] == "forward m=1"}
    nested = 0.5 + 1 / 64 + 4 / (64 * 256)
    wanted = {"lora-core reference": nested, "dense bf16": 2, "torch int4": 0.5 + 4 / 64}
    wanted |= {"dense f32": 4, "bitsandbytes": nested}
    for who, bytes_per_weight in wanted.items():
        assert seconds[who]["bytes"] == pytest.approx(64 * 128 * bytes_per_weight)
    stream = seconds["streaming read"]
    assert stream["bytes"] == 1 << 16
    for row in seconds.values():
        fair = row["bytes"] / (1 << 16) * stream["seconds"][0] / row["seconds"][0]
        assert row["share_of_streaming"] == pytest.approx(fair)
    expand = next(row for row in rows if row["task"] == "expand")
    assert expand["bytes"] == pytest.approx(64 * 128 * (nested + 2))


def test_rows_are_recorded_with_the_machine(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    main = load("__main__")
    everyone = [contenders["lora-core reference"], contenders["bitsandbytes"]]
    monkeypatch.setattr(main, "everyone", lambda: (everyone, ["nobody is not measured: why"]))
    monkeypatch.setattr(main, "BYTES", 1 << 16)
    out = tmp_path / "rows.jsonl"
    shape = ["--shape", "64x128", "--repeats", "2", "--only", "^expand$"]
    assert main.main([*shape, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["who"] for row in rows] == ["lora-core reference", "bitsandbytes", "streaming read"]
    for row in rows:
        assert row["benchmark"] == "cpu"
        assert row["shape"] == [64, 128]
        assert row["torch"] == torch.__version__
        assert row["threads"] == torch.get_num_threads()


# --- what must not get past it -------------------------------------------------------------------


def off_by_little(y: Tensor) -> Tensor:
    return y * (1 + 2**-5)


def unwritten(y: Tensor) -> Tensor:
    return y.index_fill(1, torch.tensor([y.shape[1] - 1]), torch.nan)


def one_result(y: Tensor) -> Tensor:
    y = y.clone()
    y[-1, -1] += 0.25 * y.abs().max()
    return y


@pytest.mark.parametrize("fault", [off_by_little, unwritten, one_result])
@pytest.mark.parametrize(
    ("who", "task"),
    [
        ("lora-core reference", "forward m=8"),
        ("lora-core reference", "dx m=64"),
        ("bitsandbytes", "forward m=64"),
        ("bitsandbytes packed", "forward m=8"),
        ("dense bf16", "dx m=64"),
        ("dense f32", "forward m=64"),
        ("torch int4", "forward m=64"),
    ],
)
def test_a_wrong_product_is_not_timed(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    who: str, task: str, fault: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    if who not in contenders:
        pytest.skip("bitsandbytes has no packed layout on this CPU")
    one, method = contenders[who], task.partition(" ")[0]
    right = getattr(one, method)
    monkeypatch.setattr(one, method, lambda *args: fault(right(*args)))
    other = contenders["dense f32" if who == "dense bf16" else "dense bf16"]
    run = measured(load, [one, other], only=task)
    (wrong,) = [row for row in run.rows if row["who"] == who]
    assert "rounding allows" in wrong["failure"] or "NaN" in wrong["failure"]
    assert "seconds" not in wrong
    assert any(row["who"] == other.name and "seconds" in row for row in run.rows)


@pytest.mark.parametrize("who", ["lora-core reference", "bitsandbytes", "bitsandbytes in C"])
def test_one_wrong_bit_is_not_timed(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    one = contenders[who]
    task = "expand kept" if who.endswith("in C") else "expand"
    method = task.replace(" ", "_")
    right = getattr(one, method)

    def flipped(*args: Any) -> Tensor:
        out = right(*args)
        out.view(torch.int16)[-1, -1] ^= 1
        return out

    monkeypatch.setattr(one, method, flipped)
    (row,) = measured(load, [one], only=task).rows
    assert row["failure"] == "1 values differ from the definition's bits"


def test_what_another_has_left_does_not_pass(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, idle = contenders["bitsandbytes in C"], contenders["lora-core reference"]
    monkeypatch.setattr(idle, "expand_kept", lambda weight, out: out)
    monkeypatch.setattr(idle, "forward", lambda weight, x: x.new_empty(len(x), 64))
    rows = measured(load, [right, idle], only="expand kept").rows
    assert [row["who"] for row in rows if "seconds" in row] == [right.name, "streaming read"]
    (row,) = measured(load, [idle], only="forward m=8").rows
    assert row["failure"] == "512 results are NaN or infinite"


def bad_code(found: Any) -> Any:
    found.codes.view(-1)[3] ^= 1
    return found


def far_scale(found: Any) -> Any:
    found.scales[1] = (int(found.scales[1]) + 2) % 256
    return found


def other_mean(found: Any) -> Any:
    return found._replace(scale_offset=found.scale_offset * 1.01)


def other_table(found: Any) -> Any:
    return found._replace(scale_table=found.scale_table * 1.001)


@pytest.mark.parametrize("who", ["lora-core reference", "bitsandbytes"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (bad_code, "1 of 4096 bytes of codes differ"),
        (far_scale, "1 of 128 scales are not the nearest"),
        (other_mean, "the offset is"),
        (other_table, "the table of the scales is another"),
    ],
)
def test_a_wrong_quantization_is_not_timed(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    who: str, fault: Callable[[Any], Any], said: str,
) -> None:  # fmt: skip
    one = contenders[who]
    right = one.quantize
    monkeypatch.setattr(one, "quantize", lambda w: fault(right(w)))
    (row,) = measured(load, [one], only="quantize").rows
    assert said in row["failure"]


def test_what_is_wrong_ends_the_command_with_1(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    main, one = load("__main__"), contenders["lora-core reference"]
    monkeypatch.setattr(one, "dx", lambda weight, dy: dy.new_zeros(len(dy), weight.in_features))
    monkeypatch.setattr(main, "everyone", lambda: ([one, contenders["dense bf16"]], []))
    monkeypatch.setattr(main, "BYTES", 1 << 16)
    assert main.main(["--smoke", "--only", "dx m=64"]) == 1
    said = capsys.readouterr().out
    assert "wrong, and not timed: lora-core reference, dx m=64, 64 x 128: " in said
    assert "times what rounding allows" in said
    shape = ["--shape", "64x128", "--repeats", "2", "--only", "dx m=64"]
    assert main.main([*shape, "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert (
        "rounding allows"
        in json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["failure"]
    )


def test_the_next_of_ours_does_not_stand_in_for_a_wrong_one(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    best, next_best = contenders["lora-core reference"], load("contenders").Ours("reference")
    next_best.name = "lora-core next"
    monkeypatch.setattr(best, "expand", lambda weight: torch.zeros(64, 128, dtype=torch.bfloat16))
    rows = measured(load, [best, next_best], only="expand").rows
    assert "failure" in rows[0]
    assert [row["who"] for row in rows[1:]] == ["lora-core next", "streaming read"]
    assert not any(row["ours"] for row in rows[1:])


def test_what_is_checked_and_what_is_timed_run_in_the_same_environment(load: Load) -> None:
    c, seen = load("contenders"), []

    class Spy(c.Ours):
        def expand(self, weight: Any, out: Tensor | None = None) -> Tensor:
            seen.append((os.environ.get("LORA_KERNELS"), os.environ.get("LORA_KERNELS_ISA")))
            return c.decoded_once(weight).bfloat16()

    (row, _) = measured(load, [Spy("avx2")], only="expand").rows
    assert row["who"] == "lora-core avx2"
    assert len(seen) > 2
    assert set(seen) == {("native", "avx2")}


def test_our_exception_is_a_failure_and_an_absent_peer_is_none(
    load: Load, contenders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("lora_matmul4 failed\nat length")

    for who in ("lora-core reference", "torch int4"):
        monkeypatch.setattr(contenders[who], "forward", broken)
    run = measured(load, list(contenders.values()), only="forward m=1")
    assert [row["failure"] for row in run.rows if "failure" in row] == [
        "RuntimeError: lora_matmul4 failed"
    ]
    assert run.absent == {("torch int4", "lora_matmul4 failed"): ["forward m=1"]}


def test_a_backend_that_cannot_run_is_absent_and_says_why(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("LORA_KERNELS", "auto")
    c = load("contenders")
    assert "this CPU lacks" in c._why_not(c.Ours("neon")) or "compiler" in c._why_not(
        c.Ours("neon")
    )
    assert c._why_not(c.Ours("reference")) is None
    assert os.environ["LORA_KERNELS"] == "auto"
    assert "LORA_KERNELS_ISA" not in os.environ


def test_shapes_that_a_layout_cannot_hold(load: Load, contenders: dict[str, Any]) -> None:
    run = measured(load, list(contenders.values()), 40, 64, only="forward m=1")
    absent = {who for who, why in run.absent if why == "its tiles do not divide 40 x 64"}
    assert absent == {"bitsandbytes packed", "torch int4"} & set(contenders)


# --- the bound of a product ----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["forward", "dx"])
def test_a_lost_block_is_out_of_bounds_and_roundings_are_within(load: Load, task: str) -> None:
    answer_of = load("check").Answer.of
    x, w = torch.randn(9, 512).bfloat16(), torch.randn(512, 512)
    across = w.bfloat16() if task == "dx" else w.bfloat16().t()
    answer = answer_of(task, x, w)
    y = x @ across
    assert not list(answer.problems(y, 1))
    assert answer.error(y) < 4e-3
    lost = x.clone()
    lost[:, -64:] = 0
    assert list(answer.problems(lost @ across, 1))
    assert list(answer.problems(y[:, 1:], 1)) == ["shape (9, 511) instead of (9, 512)"]
    # rounded to 7 bits instead of 8: no result is far off, but all together are
    coarse = (w * (1 + 2**-7 * (torch.rand_like(w) * 2 - 1))).bfloat16()
    coarse = coarse if task == "dx" else coarse.t()
    (said,) = answer.problems(x @ coarse, 1)
    assert said.startswith("the root mean square error is")


@pytest.mark.parametrize("sign", [-1, 1])
def test_one_result_among_many_is_out_of_bounds(load: Load, sign: int) -> None:
    x, w = torch.randn(64, 512).bfloat16(), torch.randn(2048, 512).bfloat16()
    answer = load("check").Answer.of("forward", x, w.float())
    y = answer.exact.float()
    y[5, 7] += sign * 2**-8 * (12 * answer.spread[5, 7] + y[5, 7].abs())
    (said,) = answer.problems(y, 1)
    assert said.startswith("an error is 1.")  # under 12/8
    assert not list(answer.problems(y, 2))  # of a contender that rounds weights twice


# --- the limit -----------------------------------------------------------------------------------


def test_every_way_reads_the_whole_buffer(load: Load) -> None:
    stream = load("stream")
    ways, why_not = stream._ways_in_c()
    if why_not is not None:
        pytest.skip(why_not)
    words = torch.randint(-(2**62), 2**62, (3 * 32 * 4096 + 32,))  # no whole number of pieces
    for read in ways.values():
        assert (read(words) - int(words.sum())) % 2**64 == 0
    with pytest.raises(stream.WrongSum, match="reading 8 bytes in pieces of 262144 failed"):
        next(iter(ways.values()))(words[:1])
    assert stream.best_reader(2, 1 << 20).way in ways


def test_a_way_that_skips_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = load("stream")

    def half(words: Tensor) -> int:
        return ctypes.c_uint64(int(words[::2].sum())).value

    monkeypatch.setattr(stream, "_ways_in_c", lambda: ({"half": half}, None))
    with pytest.raises(stream.WrongSum, match="half has not read the whole buffer"):
        stream.best_reader(1, 1 << 12)


def test_without_a_compiler_torch_reads(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = load("stream")

    def no_library() -> None:
        raise stream.toolchain.BuildError("no C compiler")

    monkeypatch.setattr(stream, "_library", no_library)
    reader = stream.best_reader(1, 1 << 12)
    assert reader.way == "torch.sum (no C compiler)"
    assert "GB/s" in str(reader)


# --- turns ---------------------------------------------------------------------------------------


def test_a_turn_goes_on_through_the_copies_in_its_environment(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing, seen = load("timing"), []
    monkeypatch.setattr(timing, "TURN", 1e9)
    monkeypatch.setattr(timing, "WARM", 0.0)
    monkeypatch.setattr(timing, "MOST_CALLS", 3)

    def run(value: int) -> None:
        seen.append((value, os.environ.get("LORA_KERNELS_ISA")))

    turn = timing.turns(run, [1, 2, 3], {"LORA_KERNELS_ISA": "avx2"})
    assert turn(None) > 0
    assert turn(None) > 0
    values = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]  # a turn is one untimed call and four
    assert seen == [(value, "avx2") for value in values]
    assert "LORA_KERNELS_ISA" not in os.environ


def test_a_long_call_needs_none_before_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, calls = load("timing"), []
    monkeypatch.setattr(timing, "LONG", 0.0)
    turn = timing.turns(calls.append, [0], {})
    turn(None)
    assert len(calls) == 1


def test_copies_overflow_the_cache(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = load("timing")
    monkeypatch.setattr(timing, "cache_bytes", lambda: 32 << 20)
    monkeypatch.setattr(timing, "MOST_COPIES", 64)
    assert len(timing.copies(torch.zeros(1), 30 << 20)) == 5
    assert len(timing.copies(torch.zeros(1), 235 << 20)) == 1
    many = timing.copies((torch.ones(2), "state"), 100)
    assert len(many) == 64
    assert len({t.data_ptr() for t, _ in many}) == 64
    assert all(torch.equal(t, torch.ones(2)) for t, _ in many)


def test_the_largest_cache_is_found(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timing = load("timing")
    monkeypatch.setattr(timing, "CACHE", tmp_path)
    assert timing.cache_bytes() == timing.UNKNOWN_CACHE
    for i, size in enumerate(("48K", "32M", "1024K")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert timing.cache_bytes() == 32 << 20


# --- the figures ---------------------------------------------------------------------------------


def rows_of(shape: list[int], times: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    return [
        {"shape": shape, "task": task, "who": who, "seconds": [s, s, s], "bytes": None}
        | {"ours": who == "lora-core avx512", "share_of_streaming": 0.9, "error": None, "m": 1}
        for (task, who), s in times.items()
    ]


def test_figures_are_computed_from_the_rows(load: Load) -> None:
    report = load("report")
    times = {
        ("quantize", "lora-core avx512"): 2.0, ("quantize", "bitsandbytes"): 30.0,
        ("expand", "lora-core avx512"): 4.0, ("expand", "bitsandbytes"): 20.0,
        ("expand kept", "lora-core avx512"): 2.0, ("expand kept", "bitsandbytes in C"): 4.0,
        ("forward m=1", "lora-core avx512"): 1.0, ("forward m=1", "lora-core avx2"): 1.5,
        ("forward m=1", "bitsandbytes"): 24.0, ("forward m=1", "bitsandbytes packed"): 1.5,
        ("forward m=1", "dense bf16"): 4.0,
        ("forward m=64", "lora-core avx512"): 10.0, ("forward m=64", "bitsandbytes"): 50.0,
        ("forward m=64", "bitsandbytes packed"): 13.0,
        ("forward m=512", "lora-core avx512"): 80.0, ("forward m=512", "dense bf16"): 70.0,
    }  # fmt: skip
    found = report.figures(rows_of([14336, 4096], times))
    values = [figure.values[14336, 4096] for figure in found]
    assert values == pytest.approx([10, 5, 24, 1.5, 4, 0.9, 1.3, 80 / 70, 15, 1.5])
    reached = [True, False, False, True, True, True, False, True, True, True]
    assert [figure.reached() for figure in found] == reached
    text = report.summary(found, "lora-core avx512")
    assert text.count("not reached") == 3
    assert text.count("reached") == len(found) == 10
    assert "by lora-core avx512" in text


def test_figures_are_asked_of_one_shape_and_of_what_was_measured(load: Load) -> None:
    report = load("report")
    times = {("quantize", "lora-core avx512"): 1.0, ("quantize", "bitsandbytes"): 30.0}
    found = report.figures(rows_of([4096, 4096], times))
    assert found[-2].values == {(4096, 4096): 30.0}
    assert all(figure.reached() is None for figure in found)
    # the row of ours failed its check: the next of ours does not stand in for it
    rows = rows_of([14336, 4096], {("quantize", "lora-core avx2"): 1.0} | {
        ("quantize", "bitsandbytes"): 30.0
    })  # fmt: skip
    rows.append({"shape": [14336, 4096], "task": "quantize", "who": "lora-core avx512"})
    rows[-1]["failure"] = "wrong"
    assert all(figure.reached() is None for figure in report.figures(rows))
    assert "not measured" in report.summary(report.figures(rows), "lora-core avx512")


def test_a_table_has_ours_first_and_ratios_to_it(load: Load) -> None:
    times = {("forward m=1", "lora-core avx512"): 1e-3, ("forward m=1", "bitsandbytes"): 2.5e-3}
    rows = rows_of([64, 128], times | {("forward m=1", "streaming read"): 1e-3})
    rows[2]["bytes"] = 40_000_000
    rows[0]["m"] = rows[1]["m"] = 64
    lines = load("report").table("x Wᵀ", rows).splitlines()
    assert lines[1] == "x Wᵀ"
    assert lines[3].split()[:4] == ["lora-core", "avx512", "1.000", "ms"]
    assert "2.50" in lines[4]
    assert "40.0 GB/s" in lines[5]
    assert f"{2 * 64 * 64 * 128 / 1e-3 / 1e9:.0f} Gflop/s" in lines[3]
