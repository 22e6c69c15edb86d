"""The training benchmark: both stacks and every rung of the ladder train alike at toy sizes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

STEPS = 4


@pytest.fixture(scope="module")
def bench(load_benchmark: Callable[[str], ModuleType]) -> SimpleNamespace:
    names = ("problem", "stacks", "plain", "ladder", "worker")
    return SimpleNamespace(**{name: load_benchmark(f"training.{name}") for name in names})


@pytest.fixture(scope="module")
def folder(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smoke")
    bench.problem.write_model("smoke", path)
    return path


def losses(bench: SimpleNamespace, folder: Path, stack: str, **changes: object) -> list[float]:
    settings = replace(
        bench.problem.Settings(shape="smoke", batch=2, sequence=32, steps=STEPS, repeat=True),
        **changes,
    )
    step, around = bench.stacks.STACKS[stack](
        settings, folder, bench.problem.adapter_folder(settings, folder)
    )
    with around:
        return [step(batch) for batch in bench.problem.batches(settings)]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_stacks_train_alike(bench: SimpleNamespace, folder: Path, method: str) -> None:
    ours, theirs = (losses(bench, folder, s, method=method) for s in ("ours", "theirs"))
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert theirs[-1] < 0.99 * theirs[0]


def test_without_a_saving_the_losses_are_the_same(bench: SimpleNamespace, folder: Path) -> None:
    whole = losses(bench, folder, "ours")
    for saving in bench.plain.SAVINGS:
        assert losses(bench, folder, "ours", without=(saving,)) == pytest.approx(whole, rel=2e-3)


def test_undoing_is_undone_again(bench: SimpleNamespace) -> None:
    from lora_core.adapters.lora import LoRA
    from lora_core.adapters.lora_linear import LoRALinear
    from lora_core.models import CausalLM, gating, norm, rope

    def held() -> tuple[object, ...]:
        parts = (LoRA.forward, LoRALinear._taken_by_base, CausalLM.grades)
        return (*parts, norm.rms_norm, gating.swiglu, rope.rotary)

    before = held()
    with bench.plain.without(tuple(bench.plain.SAVINGS)):
        assert all(a is not b for a, b in zip(held(), before, strict=True))
    assert held() == before


def test_every_rung_adds_one_thing(bench: SimpleNamespace) -> None:
    ours = [settings for _, stack, settings in bench.ladder.rungs("smoke") if stack == "ours"]
    assert ours[0].without == tuple(bench.plain.SAVINGS)
    assert not ours[-1].without
    for before, after in pairwise(ours):
        changed = [k for k, v in vars(after).items() if v != vars(before)[k]]
        assert len(changed) == 1, changed


def test_packed_rows_hold_the_same_tokens(bench: SimpleNamespace) -> None:
    mixed = bench.problem.Settings(shape="smoke", batch=4, sequence=32, steps=2, mixed=True)
    padded = bench.problem.batches(mixed)
    packed = bench.problem.batches(replace(mixed, packing=64))
    assert any(int(b["attention_mask"].sum()) < b["input_ids"].numel() for b in padded)
    assert all(len(b["input_ids"]) == 1 and b["input_ids"].shape[1] <= 64 for b in packed)


def test_settings_travel(bench: SimpleNamespace) -> None:
    settings = bench.problem.Settings(without=("a", "b"), packing=7)
    assert bench.problem.Settings.from_json(settings.to_json()) == settings


def test_memory_is_read_from_the_system(bench: SimpleNamespace) -> None:
    assert bench.worker.resident("VmHWM") >= bench.worker.resident("VmRSS") > 1 << 20
    with pytest.raises(ValueError, match="has no VmNothing"):
        bench.worker.resident("VmNothing")
