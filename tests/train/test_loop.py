"""The loop: what it reports, evaluates, keeps, refuses."""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.files import folder_lock
from lora_core.losses import masked_cross_entropy
from lora_core.quant import quantize_model
from lora_core.train import CausalLoss, NonFiniteError, TrainConfig, loop, train
from lora_core.train.report import Bar

Make = Callable[..., Any]


def config(**kwargs: Any) -> TrainConfig:
    return TrainConfig(
        **{"batch_size": 2, "accumulate": 3, "epochs": 2, "lr": 1e-2, "progress": False} | kwargs
    )


def test_the_loop_is_the_plain_loop(tiny: Make, make_rows: Make) -> None:
    from lora_core.data import collate

    rows, model, plain = make_rows(), tiny(dropout=0.0), tiny(dropout=0.0)
    setup = config(epochs=3, schedule="constant", warmup=0, clip=None, weight_decay=0.1)
    result = train(model, rows, setup)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    losses = []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(1_000_003 * epoch)
        order = torch.randperm(13, generator=generator).tolist()
        for start in range(0, 13, 6):
            batch = collate([rows[i] for i in order[start : start + 6]])
            loss = masked_cross_entropy(plain(batch["input_ids"]).logits, batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert [record["loss"] for record in result.history] == pytest.approx(losses, rel=1e-5)
    assert result.steps == 9 == len(result.history)
    assert [record["epoch"] for record in result.history] == [1] * 3 + [2] * 3 + [3] * 3


def test_the_record_and_the_result(tiny: Make, make_rows: Make, tmp_path: Path) -> None:
    rows, records = make_rows(sources=True), []
    setup = config(out=tmp_path / "run", warmup=2)
    result = train(tiny(), rows, setup, rows[:4], records.append, facts={"data": "abc"})
    assert records == result.history
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    assert [r["step"] for r in records] == list(range(1, 7))
    assert [r["lr"] for r in records[:3]] == [0.005, 0.01, 0.01]
    assert (
        result.tokens
        == sum(r["tokens"] for r in records)
        == 2 * sum(len(row["input_ids"]) for row in rows)
    )
    for record in records:
        assert record["seconds"] > 0
        assert record["tokens_per_second"] > 0
        assert record["peak_memory"] > 1 << 20
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 6]
    assert {"loss/a", "loss/b"} <= set(records[0])
    assert {"eval_loss/a", "eval_loss/b"} <= set(records[2])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["train"] == setup.to_dict()
    assert run["data"] == "abc"
    assert run["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "commit" in run
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not result.interrupted
    assert result.resumed_from is None


def test_without_matplotlib_it_says_so(
    tiny: Make,
    make_rows: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(tiny(), make_rows(), config(out=tmp_path, steps=1))
    assert not (tmp_path / "loss.png").exists()
    assert "no loss.png: matplotlib is not installed" in capsys.readouterr().err


def test_the_policy_is_said_before_the_first_step(
    tiny: Make, make_rows: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    def hook(record: dict[str, Any]) -> None:
        said.append(capsys.readouterr().err)

    train(tiny(), make_rows(), config(steps=2, dtype="bfloat16"), on_step=hook)
    assert "449 of 449 parameters (100.00%) for 2 steps, lr 0.01 cosine; bfloat16 on" in said[0]
    assert said[1] == ""


def test_progress_bar(tiny: Make, make_rows: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(), make_rows(), config(steps=2, progress=True), make_rows(3))
    shown = capsys.readouterr().err
    for part in ("loss=", "tok/s=", "peak=", "eval=", "2/2"):
        assert part in shown


def test_any_loss_and_any_rows() -> None:
    model = nn.Linear(3, 1)
    torch.manual_seed(0)
    xs = torch.randn(20, 3)
    rows = [(x, x @ torch.tensor([1.0, -2.0, 3.0]) + 0.5) for x in xs]

    class Squares:
        def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> torch.Tensor:
            return (model(batch[0]).squeeze(1) - batch[1]).pow(2).sum() / normalizer

        def count(self, batch: Any) -> float:
            return len(batch[0])

    def stack(rows: Any) -> list[torch.Tensor]:
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    result = train(
        model,
        rows,
        config(epochs=100, lr=0.1, schedule="linear", batch_size=5, accumulate=2),
        rows,
        loss=Squares(),
        collate=stack,
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        schedule=lambda step, total: 1.0,
    )
    # convex and noise-free: gradient descent goes to zero
    assert result.best_loss is not None
    assert result.best_loss < 1e-9
    truth = torch.tensor([[1.0, -2.0, 3.0]])
    torch.testing.assert_close(model.weight.data, truth, atol=1e-3, rtol=0)
    assert result.history[-1]["lr"] == 0.1


def test_evaluation_is_token_weighted_and_without_dropout_or_smoothing(
    tiny: Make, make_rows: Make
) -> None:
    from lora_core.evaluate import perplexity

    model, held_out = tiny(dropout=0.5), make_rows(7, seed=3)
    setup = config(steps=1, label_smoothing=0.2)
    result = train(model, make_rows(), setup, held_out)
    loss = perplexity(model, held_out).loss
    assert result.history[0]["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert model.training


@pytest.mark.parametrize("saved", [True, False])
def test_the_best_weights_come_back(
    tiny: Make, make_rows: Make, tmp_path: Path, saved: bool
) -> None:
    from lora_core.evaluate import perplexity

    held_out, model, snapshots = make_rows(7, seed=3), tiny(), {}

    def keep(record: dict[str, Any]) -> None:
        snapshots[record["step"]] = {k: v.clone() for k, v in model.state_dict().items()}

    # a rate this high overfits 13 random rows at once, so the best evaluation is an early one
    setup = config(out=tmp_path if saved else None, lr=0.1, epochs=4, eval_every=1, keep=1)
    result = train(model, make_rows(), setup, held_out, keep)
    evaluations = {r["step"]: r["eval_loss"] for r in result.history}
    assert result.best_step == min(evaluations, key=evaluations.__getitem__) < result.steps
    assert result.best_loss == evaluations[result.best_step]
    best = snapshots[result.best_step]
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    assert perplexity(model, held_out).loss == pytest.approx(result.best_loss, rel=1e-6)
    if saved:
        kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert kept == ["latest", f"step-{result.best_step:08d}", f"step-{result.steps:08d}"]
    last = tiny()
    train(last, make_rows(), config(lr=0.1, epochs=4, eval_every=1, keep_best=False), held_out)
    assert all(torch.equal(v, snapshots[12][k]) for k, v in last.state_dict().items())


def test_the_best_is_saved_when_no_checkpoint_is_due(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    held_out, snapshots = make_rows(7, seed=3), {}
    model = tiny()

    def keep(record: dict[str, Any]) -> None:
        snapshots[record["step"]] = {k: v.clone() for k, v in model.state_dict().items()}

    setup = config(out=tmp_path, lr=0.1, epochs=4, eval_every=1, save_every=1000)
    result = train(model, make_rows(), setup, held_out, keep)
    assert result.best_step < result.steps
    best = snapshots[result.best_step]
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())


def test_early_stopping(tiny: Make, make_rows: Make) -> None:
    setup = config(lr=0.1, epochs=50, eval_every=1, patience=3)
    result = train(tiny(), make_rows(), setup, make_rows(7, seed=3))
    assert result.stopped_early
    assert result.best_step is not None
    assert result.steps == result.best_step + 3
    assert all(r["eval_loss"] >= result.best_loss for r in result.history[-3:])


def test_activation_checkpointing_changes_no_number(tiny: Make, make_rows: Make) -> None:
    plain, recomputed, calls = tiny(), tiny(), []
    recomputed.layers[0][0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    first = train(plain, make_rows(), config())
    second = train(recomputed, make_rows(), config(activation_checkpointing=True))
    assert [r["loss"] for r in first.history] == [r["loss"] for r in second.history]
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True)
    )
    # each of the 14 batches runs the layer forward and again in backward
    assert len(calls) == 28
    assert "forward" not in vars(recomputed.layers[0])
    with pytest.raises(ValueError, match=r"needs the model's layers in an nn\.ModuleList.*Linear"):
        train(nn.Linear(2, 2), make_rows(), config(activation_checkpointing=True))


def test_a_nan_stops_with_the_batch_written_out(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    rows = make_rows(sources=True)
    rows[5]["input_ids"][0] = 16
    model = tiny()
    with torch.no_grad():
        model.embed.weight[16] = float("nan")
    for row in rows[:5] + rows[6:]:
        row["input_ids"] = [i % 16 for i in row["input_ids"]]
    setup = config(out=tmp_path, batch_size=1, accumulate=1)
    with pytest.raises(
        NonFiniteError,
        match=r"the loss is nan at step \d+, rows \[5\] of the data; the batch is in .*bad-step",
    ):
        train(model, rows, setup)
    (folder,) = tmp_path.glob("bad-step-*")
    batch = load_file(folder / "batch-0.safetensors")
    assert batch["input_ids"].tolist() == [rows[5]["input_ids"]]
    about = json.loads((folder / "batch-0.json").read_text())
    assert (about["row"], about["source"]) == ([5], ["b"])
    assert "nan" in about["why"]


def test_a_nan_in_ready_batches_and_in_evaluation(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    ids = torch.randint(0, 17, (2, 5))
    model = tiny()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    # one tensor under two names, which safetensors' own writer refuses
    with pytest.raises(NonFiniteError, match="the loss is nan at step 1; the batch is in"):
        train(model, [{"input_ids": ids, "labels": ids}], config(out=tmp_path))
    assert (tmp_path / "bad-step-00000001" / "batch-0.safetensors").is_file()

    class OnlyInEvaluation(CausalLoss):
        def __call__(self, model: nn.Module, *rest: Any) -> Any:
            loss, rows = super().__call__(model, *rest)
            return (loss if model.training else loss * float("nan")), rows

    loss, rows = OnlyInEvaluation(), make_rows()
    with pytest.raises(NonFiniteError, match=r"evaluation loss is nan at step 2, rows \[0, 1\]"):
        train(tiny(), rows, config(eval_every=2), rows, loss=loss)


def test_what_cannot_run(tiny: Make, make_rows: Make, tmp_path: Path) -> None:
    rows = make_rows()
    with pytest.raises(ValueError, match="steps must be given where the data set does not say"):
        train(tiny(), iter([]), config())
    with pytest.raises(ValueError, match=r"rows need labels beside input_ids.*got \['input_ids'\]"):
        train(tiny(), [{"input_ids": [1, 2]}], config())
    with pytest.raises(ValueError, match=r"it holds \['text'\]: give input_ids and labels, or a l"):
        train(tiny(), [{"text": "a"}], config())
    with pytest.raises(ValueError, match="no token of the evaluation data is graded"):
        train(tiny(), rows, config(), [{"input_ids": [1, 2], "labels": [3, -100]}])
    with pytest.raises(ValueError, match="patience counts evaluations: give eval_dataset"):
        train(tiny(), rows, config(patience=2))
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"evaluation data can be read only once.*give a list"):
        train(model, rows, config(), iter(rows))
    assert all(map(torch.equal, before, model.parameters()))  # said before the first step
    with (
        folder_lock(tmp_path),
        pytest.raises(ValueError, match=r"another run \(process \d+\) works in"),
    ):
        train(tiny(), rows, config(out=tmp_path))


def test_what_happened_before_the_run_does_not_count(tiny: Make, make_rows: Make) -> None:
    fresh, used = tiny(), tiny()
    used.expert = nn.Linear(1, 1)
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="2 of 11 trained parameters got no gradient: expert"):
        train(used, make_rows(), config(steps=1))
    del used.expert
    used.load_state_dict(fresh.state_dict())
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    histories = [train(model, make_rows(), config(steps=2)).history for model in (fresh, used)]
    norms = [[record["grad_norm"] for record in history] for history in histories]
    assert norms[0] == norms[1]


def test_a_step_without_a_graded_token_is_said(tiny: Make) -> None:
    with pytest.warns(UserWarning, match="a step had no graded token and taught nothing"):
        train(tiny(), [{"input_ids": [1, 2], "labels": [3, -100]}], config(steps=1))


def test_the_parameters_said_are_those_of_the_report(
    make_rows: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(17, 64), nn.Linear(64, 17)
    model.mid = nn.Linear(64, 64, bias=False)
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(
        logits=model.head(model.mid(model.embed(input_ids)))
    )
    quantize_model(model, skip=["head"])
    report = add_adapter(model, LoRAConfig(r=2, targets=["mid"]))
    train(model, make_rows(), config(steps=1))
    assert report.total == 17 * 64 + 64 * 64 + 17 * 65 + 4 * 64
    assert f"training {report.trainable:,} of {report.total:,} par" in capsys.readouterr().err


def test_a_parameter_may_go_without_a_gradient_after_the_first_step(
    tiny: Make, make_rows: Make
) -> None:
    class Sometimes:
        calls = 0

        def __call__(self, model: nn.Module, batch: Any, normalizer: float) -> torch.Tensor:
            self.calls += 1
            loss, _ = CausalLoss()(model, batch, normalizer)
            return loss + 0 * model.expert.weight.sum() if self.calls == self.reached else loss

    for reached, error in ((1, None), (2, "1 of 10 trained parameters got no gradient: expert.w")):
        model, loss = tiny(), Sometimes()
        loss.reached, model.expert = reached, nn.Linear(1, 1, bias=False)
        outcome = pytest.raises(ValueError, match=error) if error else contextlib.nullcontext()
        with outcome:
            assert train(model, make_rows(), config(steps=3, accumulate=1), loss=loss).steps == 3


def test_the_mode_is_left_as_found_and_threads_may_train(tiny: Make, make_rows: Make) -> None:
    model = tiny().eval()
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(train(model, make_rows(), config(steps=1)))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 1
    assert not model.training
    model.train()
    model.layers[0].eval()
    train(model, make_rows(), config(steps=1))
    assert model.layers[1].training
    assert not any(module.training for module in model.layers[0].modules())


def test_an_interruption_before_the_first_step(
    tiny: Make, make_rows: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Bar):
        def __enter__(self) -> "Late":
            signal.raise_signal(signal.SIGINT)
            return self

    monkeypatch.setattr(loop, "Bar", Late)
    result = train(tiny(), make_rows(), config())
    assert (result.interrupted, result.steps, result.tokens_per_second) == (True, 0, 0.0)


def test_a_full_disk_is_an_os_error_and_leaves_no_half_checkpoint(
    tiny: Make, make_rows: Make, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))  # bytes a file
    try:
        with pytest.raises(OSError, match=r"cannot write .*\.safetensors: .*too large"):
            train(tiny(), make_rows(), config(out=tmp_path, save_every=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "checkpoints").iterdir()) == []


SCRIPT = """
import signal, sys, time, os
from types import SimpleNamespace
import torch
from torch import nn
from lora_core.train import TrainConfig, train

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))

rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
config = TrainConfig(out=sys.argv[1], steps=1000, batch_size=2, accumulate=1, progress=False)

def hook(record):
    print(record["step"], flush=True)
    if record["step"] == 3:
        sys.stdin.readline()

result = train(Model(), rows, config, on_step=hook)
print("interrupted", result.interrupted, result.steps)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_ctrl_c_in_a_process_saves_and_ends_cleanly(tmp_path: Path, number: str) -> None:
    import signal

    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(getattr(signal, number))
        out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 0, err
    steps = int(out.split()[-1])
    assert out.splitlines()[-1] == f"interrupted True {steps}"
    assert 3 <= steps < 1000
    assert "interrupted: finishing this step and saving" in err
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step-{steps:08d}"
