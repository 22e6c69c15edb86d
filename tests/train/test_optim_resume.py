"""A run that was stopped and resumed is the run that was not, whatever keeps its state."""

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from lora_core import LoRAConfig, add_adapter
from lora_core.adapters import Adapted
from lora_core.train import AdamW8bit, PagedAdamW, TrainConfig, loop, optim, train
from lora_core.train.paged import CUT
from lora_core.train.state import Loaded

Make = Callable[..., Any]
STEPS = range(1, 8) if os.environ.get("LORA_TEST_FULL") == "1" else (3,)
KINDS = ["adamw", "adamw8bit", "adamw-paged"]
pytestmark = pytest.mark.usefixtures("no_plot")


@pytest.fixture
def eager_8bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes for the smallest tensors, and buckets as small as they get."""

    class Small(AdamW8bit):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, min_8bit_size=20, **kwargs)

    class Narrow(PagedAdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, bucket_bytes=8 * CUT, **kwargs)

    monkeypatch.setattr(optim, "AdamW8bit", Small)
    monkeypatch.setattr(optim, "PagedAdamW", Narrow)


def adapted(tiny: Make) -> nn.Module:
    """The tiny model with LoRA on all its layers, its embedding included."""
    model = tiny()
    torch.manual_seed(5)
    targets = ["embed", "0", "head"]
    add_adapter(model, LoRAConfig(r=4, alpha=8, dropout=0.1, targets=targets))
    assert sum(isinstance(m, Adapted) for m in model.modules()) == 4
    return model


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    def hook(record: dict[str, Any]) -> None:
        torch.rand(3), random.random(), numpy.random.rand()
        if record["step"] == step:
            raise KeyboardInterrupt

    return hook


def optimizer_kind(kind: str) -> type:
    return {"adamw": torch.optim.AdamW, "adamw8bit": AdamW8bit, "adamw-paged": PagedAdamW}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "lora_plus"), [("all", 1.0), ("lora", 1.0), ("lora", 16.0)])
@pytest.mark.parametrize("step", STEPS)
def test_stop_and_resume(
    tiny: Make,
    make_rows: Make,
    without_times: Make,
    eager_8bit: None,
    kind: str,
    what: str,
    lora_plus: float,
    step: int,
) -> None:
    rows = make_rows()
    make = tiny if what == "all" else lambda: adapted(tiny)
    straight, stopped, resumed = make(), make(), make()
    with tempfile.TemporaryDirectory() as folder:

        def setup(name: str, **kwargs: Any) -> TrainConfig:
            return TrainConfig(
                out=Path(folder) / name,
                optimizer=kind,
                lora_plus=lora_plus,
                lr=3e-3,
                weight_decay=0.1,
                batch_size=2,
                accumulate=2,
                epochs=2,
                progress=False,
                **kwargs,
            )

        whole = train(straight, rows, setup("a"), on_step=stop_after(-1))
        part = train(stopped, rows, setup("b"), on_step=stop_after(step))
        assert part.steps == step < whole.steps
        torch.manual_seed(999), random.seed(999), numpy.random.seed(999)
        rest = train(resumed, rows, setup("b", resume=True), on_step=stop_after(-1))
        last = [
            Loaded.read(Path(folder) / name / "checkpoints" / f"step-{whole.steps:08d}")
            for name in "ab"
        ]
    assert rest.resumed_from == step
    assert without_times(rest.history) == without_times(whole.history)
    for x, y in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(x, y)
    first, second = (loaded.optimizer for loaded in last)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(first[k].dtype == second[k].dtype for k in first)
    kinds = {str(t.dtype).removeprefix("torch.") for t in first.values()}
    assert kinds == ({"int8", "uint8", "float32"} if kind == "adamw8bit" else {"float32"})
    assert last[0].state["optimizer"] == last[1].state["optimizer"]


def test_a_state_that_is_cast_would_be_seen(
    tiny: Make,
    make_rows: Make,
    tmp_path: Path,
    eager_8bit: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own load_state_dict makes float32 of codes."""
    monkeypatch.delattr(AdamW8bit, "load_state_dict")
    setup = {"optimizer": "adamw8bit", "steps": 5, "progress": False, "out": tmp_path}
    train(tiny(), make_rows(), TrainConfig(**setup), on_step=stop_after(2))
    with pytest.raises(TypeError, match=r"codes are int8 and uint8, units float32; got float32"):
        train(tiny(), make_rows(), TrainConfig(**setup, resume=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_reports_the_usual_rate(
    tiny: Make, make_rows: Make, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    class Seen(loop.Run):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Run", Seen)
        config = TrainConfig(
            optimizer=kind, lora_plus=16.0, lr=1e-3, schedule="constant", warmup=0, steps=2
        )
        result = train(adapted(tiny), make_rows(), config)
    assert [record["lr"] for record in result.history] == [1e-3, 1e-3]
    optimizer = made[0].optimizer
    assert type(optimizer) is optimizer_kind(kind)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1.6e-2]
    told = "where paging only costs" in capsys.readouterr().err
    assert told is (kind == "adamw-paged")
