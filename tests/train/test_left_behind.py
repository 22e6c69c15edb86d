"""What a run that fails leaves behind, and what the one that continues it finds."""

import json
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.data import collate
from lora_core.device import dtype_policy, out_of_memory
from lora_core.train import (
    CausalLoss,
    NonFiniteError,
    TrainConfig,
    snapshot,
    state,
    train,
    train_step,
)
from lora_core.train.batches import make_batches, to_device
from lora_core.train.probe import state_to_come
from lora_core.train.ranks import RankError, Ranks
from lora_core.train.recompute import recomputed_layers, repeated_layers
from lora_core.train.report import say, saying
from lora_core.train.state import Checkpoints

Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("no_plot")


def config(out: Path | None = None, **kwargs: Any) -> TrainConfig:
    settings = {"batch_size": 2, "accumulate": 3, "epochs": 4, "lr": 1e-2, "progress": False}
    return TrainConfig(**{"out": out, **settings, **kwargs})


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    def hook(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise KeyboardInterrupt

    return hook


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- too little memory ---


class Full(CausalLoss):
    """Fills the CPU's memory after a backward pass."""

    def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> Any:
        super().__call__(model, batch, normalizer)[0].backward()
        return torch.empty(1 << 62, dtype=torch.uint8)


def test_a_probe_that_fails_leaves_no_gradient_and_no_metrics(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    model = tiny()
    with pytest.raises(
        ValueError, match=r"the longest batch .* does not fit: .*; lower batch_size"
    ):
        train(model, make_rows(), config(tmp_path, probe=True), loss=Full())
    assert all(p.grad is None for p in model.parameters())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_cpu_out_of_memory_gets_the_same_advice(tiny: Make, make_rows: Make) -> None:
    words = r"^step 1: .*you tried to allocate 4611686018427387904 bytes.*; lower batch_size \(2\)"
    with pytest.raises(ValueError, match=words) as caught:
        train(tiny(), make_rows(), config(), loss=Full())
    assert "\n" not in str(caught.value)


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory.\nGPU 0")) == (
        "CUDA out of memory."
    )
    assert out_of_memory(MemoryError()) == "out of memory"
    windows = "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    assert out_of_memory(RuntimeError(windows)) == windows
    assert out_of_memory(RuntimeError("CUDA error: out of memory\nCUDA kernel")) is not None
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert out_of_memory(ValueError("out of memory")) is None


@pytest.mark.parametrize("setting", ["probe", "activation_checkpointing"])
def test_the_advice_can_be_followed_on_resume(
    tiny: Make, make_rows: Make, without_times: Make, tmp_path: Path, setting: str
) -> None:
    straight, resumed = tiny(), tiny()
    whole = train(straight, make_rows(), config())
    train(tiny(), make_rows(), config(tmp_path), on_step=stop_after(4))
    rest = train(resumed, make_rows(), config(tmp_path, resume=True, **{setting: True}))
    assert rest.resumed_from == 4
    assert without_times(rest.history) == without_times(whole.history)
    assert equal(straight, resumed)


@pytest.fixture
def four() -> Iterator[None]:
    """A process group of four of which the other three are made up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("four")
def test_of_weights_in_parts_a_part_of_the_state_is_set_aside() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,))
    part = nn.Parameter(distribute_tensor(torch.zeros(8, 16), mesh, [Shard(0)]))
    assert sum(t.nbytes for t in state_to_come(config(), [part])) == 8 * 128 / 4


# --- checkpoints ---


def test_a_checkpoint_of_another_format_is_not_taken_for_damage(
    tiny: Make, make_rows: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run would begin afresh, and remove it."""
    train(tiny(), make_rows(), config(tmp_path), on_step=stop_after(4))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(state, "FORMAT", state.FORMAT + 1)
    for resume in (True, False):
        with pytest.raises(
            ValueError, match=r"step-00000004 has format 2, and this .* reads 3: co"
        ):
            train(tiny(), make_rows(), config(tmp_path, resume=resume))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:checkpoint step-")
def test_checkpoints_that_cannot_be_read_today_are_kept(
    tiny: Make, make_rows: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(), make_rows(), config(tmp_path, save_every=2), on_step=stop_after(4))
    before = sorted(tmp_path.rglob("*"))

    def stale(path: Path) -> str:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(state, "sha256_file", stale)
        for resume in (True, False):
            with pytest.raises(OSError, match="Stale file handle"):
                train(tiny(), make_rows(), config(tmp_path, resume=resume))
    assert sorted(tmp_path.rglob("*")) == before
    assert train(tiny(), make_rows(), config(tmp_path, resume=True)).resumed_from == 4


def test_a_manifest_with_another_key_is_damaged(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    train(tiny(), make_rows(), config(tmp_path, save_every=2), on_step=stop_after(4))
    for key in ("bytes", "sha256"):
        manifest = tmp_path / "checkpoints" / "step-00000004" / "manifest.json"
        whole = manifest.read_text()
        manifest.write_text(whole.replace(f'"{key}"', '"axis"', 1))
        with pytest.warns(UserWarning, match="step-00000004 is damaged"):
            found = Checkpoints(tmp_path / "checkpoints").newest_good()
        assert found is not None
        assert found.progress.step == 2
        manifest.write_text(whole)


def test_an_error_after_a_damaged_checkpoint_names_the_good_one(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    train(tiny(), make_rows(), config(tmp_path, save_every=2), on_step=stop_after(4))
    (tmp_path / "checkpoints" / "step-00000004" / "state.json").unlink()

    def fails(record: dict[str, Any]) -> None:
        raise OSError("no")

    with (
        pytest.warns(UserWarning, match="step-00000004 is damaged"),
        pytest.raises(OSError, match=r"^no; the last good checkpoint is .*step-00000002; resume"),
    ):
        train(tiny(), make_rows(), config(tmp_path, save_every=9, resume=True), on_step=fails)


def test_generators_of_many_gpus_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name "cuda.10" comes before "cuda.2"; a GPU that is gone is left out."""
    tensors, plain = snapshot.generators()
    tensors = {"cpu": tensors["cpu"]} | {f"cuda.{i}": torch.tensor([i]) for i in range(12)}
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.append)
    for count in (12, 3, 0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=count: n)
        snapshot.restore_generators(tensors, plain)
    assert [[int(t) for t in states] for states in found] == [list(range(12)), [0, 1, 2]]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_data_loader_is_resumed_bit_for_bit(
    tiny: Make, make_rows: Make, without_times: Make, tmp_path: Path, stop: int
) -> None:
    """As it begins it draws from the generator that dropout draws from."""
    loader = DataLoader(make_rows(14), batch_size=2, collate_fn=collate)
    straight, resumed = tiny(), tiny()
    whole = train(straight, loader, config(steps=8))
    train(tiny(), loader, config(tmp_path, steps=8), on_step=stop_after(stop))
    rest = train(resumed, loader, config(tmp_path, steps=8, resume=True))
    assert rest.resumed_from == stop
    assert without_times(rest.history) == without_times(whole.history)
    assert equal(straight, resumed)


# --- the rest ---


def test_a_layer_that_is_used_twice_is_patched_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)] * 3)

    model = Shared()
    layer = model.layers[0]
    assert repeated_layers(model) == [layer]
    with recomputed_layers(model):
        assert "forward" in vars(layer)
        for each in model.layers:
            each(torch.ones(2, 4)).sum().backward()
    assert "forward" not in vars(layer)


def test_the_row_that_is_too_long_is_named(make_rows: Make) -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 4, 5, 30, 3, 4, 5, 3)]
    for seed in range(4):
        with pytest.raises(ValueError, match="row 3 of the data has 30 tokens, 1 of 8 rows have"):
            make_batches(rows, 2, seed, packing=8)


def test_the_rate_that_is_said_is_the_one_that_is_reported(
    small_decoder: Make, make_rows: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_decoder()
    add_adapter(model, LoRAConfig(r=2))
    result = train(model, make_rows(), config(steps=1, lora_plus=16, schedule="constant", warmup=0))
    assert "for 1 steps, lr 0.01 constant" in capsys.readouterr().err
    assert result.history[0]["lr"] == 0.01


def test_a_gradient_that_is_no_number_is_said_once(
    tiny: Make, make_rows: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes have the same sum of gradients; the first one writes the batches."""
    monkeypatch.setattr(Ranks, "sum", lambda self, *numbers: numbers)
    monkeypatch.setattr(Ranks, "reduce_gradients", lambda self, parameters: None)
    model, batches = tiny(), [collate(make_rows(2)), collate(make_rows(2, seed=1))]
    named = dict(model.named_parameters())
    model.head.weight.register_hook(lambda grad: grad * float("nan"))
    for rank, kind in ((0, NonFiniteError), (1, RankError)):
        with pytest.raises(kind, match="the gradient's norm is nan"):
            train_step(
                model,
                named,
                batches,
                torch.optim.SGD(model.parameters(), lr=1.0),
                torch.amp.GradScaler("cpu", enabled=False),
                dtype_policy("float32", "cpu"),
                loss=CausalLoss(),
                ranks=Ranks(rank, 2),
            )


def test_one_process_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    with saying(True):
        say("one")
        with saying(False):
            say("two")
            with saying(True):
                say("three")
        say("four")
    assert capsys.readouterr().err == "one\nfour\n"


Pair = namedtuple("Pair", ["x", "y"])


def test_nested_batches_are_moved() -> None:
    x = torch.ones(2)
    moved = to_device(Pair({"a": x}, ["text"]), torch.device("meta"))
    assert isinstance(moved, Pair)
    assert moved.x["a"].is_meta
    assert moved.y == ["text"]


class Item:
    """A batch of a kind of its own."""

    def __repr__(self) -> str:
        return "Item"


def test_a_nan_of_any_kind_of_batch_is_said(tiny: Make, tmp_path: Path) -> None:
    class Broken(CausalLoss):
        def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> Any:
            return sum(p.sum() for p in model.parameters()) * float("nan")

        def count(self, batch: Any) -> float:
            return 1

    with pytest.raises(NonFiniteError, match="the loss is nan at step 1; the batch is in"):
        train(tiny(), [Item(), Item()], config(tmp_path), loss=Broken())
    written = json.loads((tmp_path / "bad-step-00000001" / "batch-0.json").read_text())
    assert written["0"] == "Item"
