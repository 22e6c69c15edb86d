"""A run that was stopped and resumed is, bit for bit, the run that was not."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_core.train import TrainConfig, train
from lora_core.train.state import Checkpoints, Loaded

Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("no_plot")


def config(out: Path | str | None, **kwargs: Any) -> TrainConfig:
    settings = {"batch_size": 2, "accumulate": 3, "epochs": 4, "lr": 1e-2, "progress": False}
    return TrainConfig(**{"out": out, "weight_decay": 0.1, **settings, **kwargs})


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    """A hook that presses Ctrl-C after a step, and uses up random numbers of every kind."""

    def hook(record: dict[str, Any]) -> None:
        torch.rand(3), random.random(), numpy.random.rand()
        if record["step"] == step:
            raise KeyboardInterrupt

    return hook


def disturb() -> None:
    """Leave the generators in a state that no run expects."""
    torch.manual_seed(999), random.seed(999), numpy.random.seed(999)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@given(
    st.integers(1, 11),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 2, 5]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(["cosine", "linear"]),
)
def test_stop_at_any_step_and_resume(
    tiny: Make,
    make_rows: Make,
    without_times: Make,
    step: int,
    accumulate: int,
    eval_every: int | None,
    dtype: str,
    schedule: str,
) -> None:
    rows, held_out = make_rows(sources=True), make_rows(5, seed=3)
    straight, stopped, resumed = tiny(), tiny(), tiny()
    with tempfile.TemporaryDirectory() as folder:

        def setup(name: str, **kwargs: Any) -> TrainConfig:
            shared = {"accumulate": accumulate, "eval_every": eval_every, "dtype": dtype}
            return config(Path(folder) / name, schedule=schedule, **shared, **kwargs)

        whole = train(straight, rows, setup("a"), held_out, stop_after(-1))
        part = train(stopped, rows, setup("b"), held_out, stop_after(step))
        assert part.interrupted
        assert part.steps == step
        disturb()
        rest = train(resumed, rows, setup("b", resume=True), held_out, stop_after(-1))
        last = [
            Loaded.read(Path(folder) / name / "checkpoints" / f"step-{whole.steps:08d}")
            for name in "ab"
        ]
    assert rest.resumed_from == step
    assert without_times(rest.history) == without_times(whole.history)
    assert (rest.tokens, rest.best_step) == (whole.tokens, whole.best_step)
    assert equal(straight, resumed)
    for part_of in ("weights", "optimizer", "rng"):
        first, second = (getattr(loaded, part_of) for loaded in last)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)
    assert last[0].state["rng"] == last[1].state["rng"]
    assert last[0].state["scaler"] == last[1].state["scaler"]


def test_stopping_twice_and_for_iterables_of_batches(
    tiny: Make, make_rows: Make, without_times: Make, tmp_path: Path
) -> None:
    from lora_core.data import collate

    rows = make_rows(14)
    batches = [collate(rows[i : i + 2]) for i in range(0, 14, 2)]

    class Stream:
        def __iter__(self) -> Any:
            return iter(batches)

    straight, resumed = tiny(), tiny()
    whole = train(straight, Stream(), config(None, steps=9))
    for step in (3, 7):  # 3 is an epoch's last step
        train(tiny(), Stream(), config(tmp_path, steps=9, resume=True), on_step=stop_after(step))
    # the hook used random numbers, so dropout differs; without it nothing does
    plain, again = tiny(dropout=0.0), tiny(dropout=0.0)
    first = train(plain, batches, config(None, steps=9))
    train(tiny(dropout=0.0), Stream(), config(tmp_path / "b", steps=9), on_step=stop_after(3))
    second = train(again, Stream(), config(tmp_path / "b", steps=9, resume=True))
    assert without_times(first.history) == without_times(second.history)
    assert equal(plain, again)
    rest = train(resumed, Stream(), config(tmp_path, steps=9, resume=True))
    assert (rest.resumed_from, rest.steps, whole.steps) == (7, 9, 9)
    assert [r["tokens"] for r in rest.history] == [r["tokens"] for r in whole.history]


def test_a_longer_constant_run_is_the_short_one_continued(
    tiny: Make, make_rows: Make, without_times: Make, tmp_path: Path
) -> None:
    straight, resumed, rows = tiny(), tiny(), make_rows()
    fixed = {"schedule": "constant", "warmup": 2}
    whole = train(straight, rows, config(None, steps=8, **fixed))
    train(tiny(), rows, config(tmp_path, steps=5, **fixed))
    rest = train(resumed, rows, config(tmp_path, steps=8, resume=True, **fixed))
    assert without_times(rest.history) == without_times(whole.history)
    assert equal(straight, resumed)


def test_more_patience_continues_a_run_that_stopped_early(
    tiny: Make, make_rows: Make, without_times: Make, tmp_path: Path
) -> None:
    rows, held_out = make_rows(), make_rows(7, seed=3)
    fixed = {"lr": 0.1, "steps": 60, "eval_every": 1}
    first = train(tiny(), rows, config(tmp_path, patience=2, **fixed), held_out)
    assert first.stopped_early
    rest = train(tiny(), rows, config(tmp_path, patience=4, resume=True, **fixed), held_out)
    assert (rest.resumed_from, rest.steps > first.steps) == (first.steps, True)
    whole = train(tiny(), rows, config(None, patience=4, **fixed), held_out)
    assert without_times(rest.history) == without_times(whole.history)


def test_resuming_a_finished_run_changes_nothing(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    def files() -> dict[Path, tuple[bytes, int]]:
        found = (p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock")
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in found}

    trained, again = tiny(), tiny()
    first = train(trained, make_rows(), config(tmp_path), make_rows(5, seed=3))
    before = files()
    assert len(before) > 5
    second = train(again, make_rows(), config(tmp_path, resume=True), make_rows(5, seed=3))
    assert files() == before
    assert second.history == first.history
    assert (second.steps, second.resumed_from) == (first.steps, first.steps)
    assert equal(trained, again)


def test_nothing_to_resume_starts_afresh(
    tiny: Make, make_rows: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, resumed = tiny(), tiny()
    train(plain, make_rows(), config(None))
    result = train(resumed, make_rows(), config(tmp_path, resume=True))
    assert result.resumed_from is None
    assert equal(plain, resumed)
    assert "nothing to resume in" in capsys.readouterr().err


FILES = [
    "weights.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "history.jsonl",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    tiny: Make, make_rows: Make, without_times: Make, tmp_path: Path, name: str, damage: str
) -> None:
    rows, straight, resumed = make_rows(), tiny(), tiny()
    whole = train(straight, rows, config(None))
    train(tiny(), rows, config(tmp_path, save_every=3), on_step=stop_quietly(8))
    file = tmp_path / "checkpoints" / "step-00000008" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(content[:-1] if damage == "truncated" else flipped)
    with pytest.warns(UserWarning, match=r"checkpoint step-00000008 is damaged \(.*before it"):
        rest = train(resumed, rows, config(tmp_path, save_every=3, resume=True))
    assert rest.resumed_from == 6
    assert without_times(rest.history) == without_times(whole.history)
    assert equal(straight, resumed)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def stop_quietly(step: int) -> Callable[[dict[str, Any]], None]:
    """Ctrl-C after a step, no random number used."""

    def hook(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise KeyboardInterrupt

    return hook


def test_all_damaged_starts_afresh(tiny: Make, make_rows: Make, tmp_path: Path) -> None:
    train(tiny(), make_rows(), config(tmp_path), on_step=stop_quietly(2))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    (tmp_path / "checkpoints" / "latest").write_text("")
    with pytest.warns(UserWarning, match="should hold the name of an entry beside it"):
        result = train(tiny(), make_rows(), config(tmp_path, resume=True))
    assert result.resumed_from is None


def test_one_written_but_not_published_does_not_count(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    train(tiny(), make_rows(), config(tmp_path, save_every=3), on_step=stop_quietly(6))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000003\n")
    loaded = checkpoints.newest_good()
    assert loaded is not None
    assert loaded.progress.step == 3


def test_a_crash_while_saving_leaves_the_one_before(
    tiny: Make, make_rows: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    save_file, calls = safetensors.torch.save_file, []

    def fails(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 5:  # the second file of the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError("disk full")
        save_file(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        train(tiny(), make_rows(), config(tmp_path, save_every=3))
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000003"]
    resumed, straight = tiny(), tiny()
    assert train(resumed, make_rows(), config(tmp_path, resume=True)).resumed_from == 3
    train(straight, make_rows(), config(None))
    assert equal(resumed, straight)


def test_a_damaged_best_checkpoint_is_said(tiny: Make, make_rows: Make, tmp_path: Path) -> None:
    setup = config(tmp_path, lr=0.1, eval_every=1)
    first = train(tiny(), make_rows(), setup, make_rows(7, seed=3))
    assert first.best_step != first.steps
    (tmp_path / "checkpoints" / f"step-{first.best_step:08d}" / "state.json").unlink()
    again = config(tmp_path, lr=0.1, eval_every=1, resume=True)
    with pytest.warns(UserWarning, match="the best checkpoint, step-.*, is damaged .*last step"):
        train(tiny(), make_rows(), again, make_rows(7, seed=3))


def test_an_unfinished_run_is_not_wiped_out(tiny: Make, make_rows: Make, tmp_path: Path) -> None:
    train(tiny(), make_rows(), config(tmp_path), on_step=stop_quietly(2))
    with pytest.raises(ValueError, match=r"holds an unfinished run \(step 2 of 12\): resume it"):
        train(tiny(), make_rows(), config(tmp_path))
    train(tiny(), make_rows(), config(tmp_path, resume=True))
    result = train(tiny(), make_rows(), config(tmp_path, steps=4))  # a finished one is replaced
    assert result.steps == 4
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000004"]


def test_another_run_is_not_continued(tiny: Make, make_rows: Make, tmp_path: Path) -> None:
    rows = make_rows()
    facts = {"data": "abc"}
    train(tiny(), rows, config(tmp_path), on_step=stop_quietly(2), facts=facts)

    def resume(rows: Any = rows, model: Any = None, **kwargs: Any) -> None:
        found = kwargs.pop("facts", facts)
        train(model or tiny(), rows, config(tmp_path, resume=True, **kwargs), facts=found)

    with pytest.raises(ValueError, match=r"cannot resume .*config lr was 0.01, is 0.02; use the"):
        resume(lr=0.02)
    with pytest.raises(ValueError, match="facts data was 'abc', is 'abd'"):
        resume(facts={"data": "abd"})
    with pytest.raises(ValueError, match="data batches was 7, is 6"):
        resume(rows[:12])
    other = tiny()
    other.head = nn.Linear(8, 17, bias=False)
    with pytest.raises(ValueError, match=r"step-00000002 holds other trained parameters: head\.b"):
        resume(model=other)
    other = tiny()
    other.layers[0][0] = nn.Linear(8, 8, bias=True)
    other.norm = nn.LayerNorm((1, 8))
    with pytest.raises(ValueError, match=r"other trained parameters: norm\.weight, norm\.bias"):
        resume(model=other)
