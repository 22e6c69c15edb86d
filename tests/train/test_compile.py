"""Compiled layers: how many graphs, the same losses, resume; and every method in one graph."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder

from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.cli.main import main
from lora_core.models import CausalLM, ModelConfig
from lora_core.quant import quantize_model
from lora_core.train import TrainConfig, loop, train
from lora_core.train.batches import make_batches
from lora_core.train.compile import check_compiler, compiled_layers
from lora_core.train.recompute import recomputed_layers

VOCABULARY = 17
# torch's own, about what it looks at while it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No test finds another's graphs."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` compiles without generating code, which takes a C++ compiler and its time."""
    replaced = functools.partial(compiled_layers, backend="aot_eager")
    monkeypatch.setattr(loop, "compiled_layers", replaced)


@pytest.fixture
def inductor() -> None:
    try:
        check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


def adapted(layers: int = 2, *, four_bits: bool = False, dropout: float = 0.0) -> CausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
    model = CausalLM(ModelConfig(**sizes))
    model.init_weights()
    if four_bits:
        quantize_model(model)
    add_adapter(model, LoRAConfig(r=2, dropout=dropout, targets=["q_proj", "down_proj"]))
    return model.train()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def run(
    model: nn.Module, batches: list[Any], forward: Callable[..., Any] | None = None
) -> tuple[list[float], list[Tensor]]:
    """Losses of the batches, and the sum of their gradients."""
    torch.manual_seed(1)
    model.zero_grad()
    losses = []
    for batch in batches:
        kept = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        loss = (forward or model)(**kept, keep_logits=False).loss
        loss.backward()
        losses.append(loss.item())
    return losses, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def rows(count: int) -> list[dict[str, list[int]]]:
    lengths = torch.randint(2, 200, (count,)).tolist()
    ids = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in lengths]
    return [{"input_ids": one, "labels": one} for one in ids]


# --- how many graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_batches_of_any_length_share_a_few_graphs(recompute: bool, full_run: bool) -> None:
    if not full_run and not recompute:
        pytest.skip("without recomputation in the full run")
    model = adapted(3, dropout=0.1)
    batches = list(make_batches(rows(60), 2, 0, few_lengths=True).epoch(0))
    lengths = {batch["input_ids"].shape[1] for batch in batches}
    expected = run(model, batches)
    with compiled_layers(model, backend="eager"), recomputed_layers(model, recompute):
        found = run(model, batches)
    assert len(batches) == 30
    assert len(lengths) >= 5
    # the first layer's input needs no gradient; a batch without padding has no mask
    assert graphs() <= 4
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(expected[1], found[1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_more_layers_are_no_more_graphs(full_run: bool) -> None:
    batches = list(make_batches(rows(4), 2, 0).epoch(0))
    made = []
    for layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        with compiled_layers(model := adapted(layers, four_bits=full_run), backend="eager"):
            run(model, batches)
        made.append(graphs())
    assert made[0] == made[1] > 0


def test_evaluation_runs_as_it_is_and_nothing_is_left() -> None:
    model, ids = adapted(), torch.arange(6)[None]
    with compiled_layers(model, backend="aot_eager"):
        model.eval()
        model(ids)
        assert graphs() == 0
    model.train()
    model(ids)
    assert graphs() == 0
    assert not any("forward" in vars(layer) for layer in model.model.layers)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("traced", "no_plot")
@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True}, {"dtype": "bfloat16"}])
def test_losses_of_a_run_equal_the_plain_ones(
    more: dict[str, Any], make_rows: Callable[..., Any], full_run: bool
) -> None:
    if not full_run and "activation_checkpointing" not in more:
        pytest.skip("the others in the full run")
    options: dict[str, Any] = {"steps": 20, "batch_size": 3, "accumulate": 1, "lr": 1e-2}
    options |= {"progress": False, **more}
    losses = []
    for on in (False, True):
        # no dropout: rows padded to one of a few lengths would be dropped at other places
        model = adapted(2 if full_run else 1, four_bits=True)
        result = train(model, make_rows(), TrainConfig(compile=on, **options))
        losses.append([record["loss"] for record in result.history])
    assert graphs() > 0
    rounding = 2e-2 if "dtype" in more else 1e-4
    assert losses[1] == pytest.approx(losses[0], rel=rounding)


@pytest.mark.usefixtures("traced", "no_plot")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(
    recompute: bool,
    tiny: Callable[..., nn.Module],
    make_rows: Callable[..., Any],
    without_times: Callable[..., Any],
    tmp_path: Path,
    full_run: bool,
) -> None:
    if not full_run and not recompute:
        pytest.skip("without recomputation in the full run")
    make = functools.partial(adapted, dropout=0.2) if full_run else tiny
    resumes(make, make_rows(), without_times, tmp_path, recompute)


def resumes(
    make: Callable[[], nn.Module],
    data: Any,
    without_times: Callable[..., Any],
    out: Path,
    recompute: bool = False,
) -> None:
    """Assert that stopping and resuming changes nothing, each run compiled anew."""

    def config(**more: Any) -> TrainConfig:
        options: dict[str, Any] = {"steps": 6, "batch_size": 3, "accumulate": 1, "lr": 1e-2}
        options |= {"activation_checkpointing": recompute, "compile": True, "progress": False}
        return TrainConfig(**options, **more)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    models = [make() for _ in range(3)]
    whole = train(models[0], data, config())
    torch._dynamo.reset()
    train(models[1], data, config(out=out), on_step=stop)
    torch._dynamo.reset()
    resumed = train(models[2], data, config(out=out, resume=True))
    assert resumed.resumed_from == 3
    assert without_times(whole.history) == without_times(resumed.history)
    pairs = zip(models[0].parameters(), models[2].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("inductor", "no_plot")
def test_generated_code_resumes_with_dropout_of_its_own(
    tiny: Callable[..., nn.Module],
    make_rows: Callable[..., Any],
    without_times: Callable[..., Any],
    tmp_path: Path,
    full_run: bool,
) -> None:
    if not full_run:
        pytest.skip("generating code takes its time: in the full run")
    resumes(tiny, make_rows(), without_times, tmp_path, recompute=True)


@pytest.mark.usefixtures("inductor", "no_plot")
@pytest.mark.parametrize("four_bits", [False, True])
def test_generated_code_gives_the_plain_losses(
    four_bits: bool, make_rows: Callable[..., Any], full_run: bool
) -> None:
    if not full_run:
        pytest.skip("generating code for a decoder takes a minute")
    options: dict[str, Any] = {"steps": 20, "batch_size": 3, "accumulate": 1, "lr": 1e-2}
    losses = []
    for on in (False, True):
        model = adapted(four_bits=four_bits)
        result = train(model, make_rows(), TrainConfig(compile=on, progress=False, **options))
        losses.append([record["loss"] for record in result.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# --- the model in one graph, by every method ----------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_a_training_step_is_one_graph(method: Any, padded: bool, full_run: bool) -> None:
    if padded and not full_run and method.name not in ("lora", "prefix"):
        pytest.skip("with padding too in the full run")
    model = method.model()
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "labels": ids} | ({"attention_mask": mask} if padded else {})
    # differentiated ahead of time for the operators' own sake; else tracing shows what breaks
    backend = "aot_eager" if full_run or method.name == "qlora" else "eager"

    def step(**call: Any) -> Any:
        # around the call, so that the model's hooks, as soft prompts have, are in the graph too
        return model(**call)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected, found = run(model, [batch]), run(model, [batch], compiled)
    assert graphs() == 1
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found[1]) == len(expected[1]) > 0
    for a, b in zip(expected[1], found[1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "parallel", "several", "dora"], indirect=True)
def test_layers_of_other_methods_compile_too(method: Any) -> None:
    model, ids = method.model(), torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "labels": ids}
    expected = run(model, [batch])
    with compiled_layers(model, backend="eager"), recomputed_layers(model):
        found = run(model, [batch])
    assert graphs() == 1
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


# --- what does not work --------------------------------------------------------------------------


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """As on a machine without g++."""
    cpp_builder.cpp_compiler_search.cache_clear()
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_cpp_compiler_one_line_says_so(
    tiny: Callable[..., nn.Module], make_rows: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler and finds none") as caught:
        train(tiny(), make_rows(), TrainConfig(compile=True, steps=1, progress=False))
    assert "\n" not in str(caught.value)


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs Triton on cuda"):
        check_compiler(torch.device("cuda"))


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if x.sum().item() > 0 else 1.0)


def test_a_layer_that_breaks_the_graph_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([Breaks(), Breaks()]))
    layer = model[1][0]
    with (
        compiled_layers(model, backend="eager"),
        pytest.raises(ValueError, match=r"^Breaks cannot be compiled .*: leave compile out$"),
    ):
        layer(torch.ones(3))


def test_a_model_without_layers_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"^compile needs the model's layers"),
        compiled_layers(nn.Linear(2, 2), backend="eager"),
    ):
        pass


# --- the command line ----------------------------------------------------------------------------


def finetune(model: Path, out: Path, *more: str) -> int:
    data = out.parent / "chats.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["finetune", "--model", str(model), "--data", str(data), "--out", str(out)]
    quick = ["--steps", "2", "--batch-size", "2", "--accumulate", "1", "--progress", "false"]
    return main([*words, *quick, "--eval-fraction", "0", "--device", "cpu", *more])


@pytest.mark.usefixtures("no_plot")
def test_finetune_compiles(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_run: bool
) -> None:
    if not full_run:
        monkeypatch.setattr(
            loop, "compiled_layers", functools.partial(compiled_layers, backend="eager")
        )
    switches = ("--compile", "--activation-checkpointing", "--method", "qlora")
    assert finetune(llama_folder, tmp_path / "run", *switches) == 0
    assert graphs() > 0
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2]


@pytest.mark.usefixtures("no_compiler")
def test_finetune_without_a_cpp_compiler_is_one_line(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(llama_folder, tmp_path / "run", "--compile") == 1
    said = capsys.readouterr().err
    assert "compile needs a C++ compiler and finds none" in said
    assert "Traceback" not in said
