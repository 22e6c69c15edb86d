"""`--objective heads` from folder to folder: it learns, resumes, is saved, opened and asked."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.adapters import BottleneckConfig, LoRAConfig
from lora_core.checkpoint import save_model
from lora_core.checkpoint.heads import load_heads, read_heads
from lora_core.cli.main import main
from lora_core.data import load_tokenizer
from lora_core.data.task_rows import read_task
from lora_core.evaluate.head_figures import best_spans, entities, entity_counts, figures_of
from lora_core.evaluate.heads import measure
from lora_core.files import sha256_file
from lora_core.models import CausalLM, EncoderConfig, ModelConfig, build_model
from lora_core.models.multi_head import MultiHead
from lora_core.models.task_heads import Head, HeadShape
from lora_core.objectives.head_options import HeadsOptions
from lora_core.runs import FinetuneConfig, Finetuned, finetune, open_heads
from lora_core.train import TrainConfig
from lora_core.train.report import Metrics

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
PLACES, ANIMALS = ["rome", "oslo"], ["cat", "dog"]
FILLING = ["the", "sat", "ran", "on", "a", "mat", "in", "is", "far"]


@pytest.fixture(scope="module")
def folders(
    encoder_tokenizer_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A tiny random encoder and decoder."""
    found = {}
    for kind, tokenizer in (("encoder", encoder_tokenizer_folder), ("decoder", tokenizer_folder)):
        torch.manual_seed(0)
        size = load_tokenizer(tokenizer).vocab_size
        model: Any
        if kind == "encoder":
            config = EncoderConfig(
                vocab_size=size,
                pad_token_id=0,
                model_type="bert",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **SIZES,
            )
            model = build_model(config)
        else:
            model = CausalLM(ModelConfig(vocab_size=size, **SIZES))
        model.init_weights(0.15)
        found[kind] = tmp_path_factory.mktemp(kind)
        save_model(model, found[kind], source=tokenizer)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tasks on the same 48 sentences: what it is about, which word says so, where it is."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[Any]] = {"topic": [], "tags": [], "squad": []}
    for number in range(48):
        words = [draw.choice(FILLING) for _ in range(5)]
        name = draw.choice(PLACES + ANIMALS)
        words.insert(draw.randrange(6), name)
        text = " ".join(words)
        rows["topic"].append({"text": text, "label": "place" if name in PLACES else "animal"})
        tags = ["B-N" if word == name else "O" for word in words]
        rows["tags"].append({"tokens": words, "tags": tags})
        answers = [{"text": name, "start": text.index(name)}]
        if number % 6 == 0:
            text, answers = " ".join(word for word in words if word != name), []
        rows["squad"].append({"question": "who ?", "context": text, "answers": answers})
    found = {}
    for name, lines in rows.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def run(
    model: Path,
    files: dict[str, Path],
    out: Path,
    *,
    method: Any = "lora",
    options: HeadsOptions | None = None,
    data: tuple[str, ...] | None = None,
    settings: dict[str, Any] | None = None,
    **training: Any,
) -> Finetuned:
    named = data or tuple(map(str, files.values()))
    given = {"eval_fraction": 0.0, "max_length": 40, "device": "cpu"} | (settings or {})
    config = FinetuneConfig(
        objective="heads", model=str(model), data=named, out=str(out), method=method, **given
    )
    adapters: dict[str, Any] = {
        "lora": LoRAConfig(r=8, alpha=16), "qlora": LoRAConfig(r=8, alpha=16),
        "bottleneck": BottleneckConfig(reduction=4), "full": None,
    }  # fmt: skip
    usual = {"epochs": 8, "batch_size": 8, "accumulate": 3, "lr": 1e-2, "progress": False}
    loop = TrainConfig(out=str(out), **{**usual, **training})
    return finetune(config, adapters[method] if "adapter" not in given else None, loop, options)


def mean_of(history: list[dict[str, Any]], name: str, steps: slice) -> float:
    found = [record[name] for record in history[steps] if name in record]
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_each_task_is_learned_together(
    kind: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    before = {file.name: sha256_file(file) for file in folders[kind].iterdir()}
    done = run(folders[kind], files, tmp_path)
    assert {file.name: sha256_file(file) for file in folders[kind].iterdir()} == before
    history = done.result.history
    for task in files:
        first, last = (
            mean_of(history, f"loss/{task}", part) for part in (slice(0, 4), slice(-8, None))
        )
        assert last < 0.75 * first, task
    opened = open_heads(tmp_path, device="cpu")
    topic, tags, squad = (opened.measure(files[task]) for task in files)
    assert topic["accuracy"].value > 0.85  # one in two by chance
    assert tags["f1"].value > 0.9
    assert squad["exact_match"].value > 0.7  # one in six has no answer
    assert squad["f1"].count == 48
    # what was saved is what was trained
    for task in files:
        assert opened.model.head(task).out.weight.equal(done.model.head(task).out.weight)


@pytest.mark.parametrize(
    ("method", "kind"), [("qlora", "encoder"), ("full", "decoder"), ("bottleneck", "encoder")]
)
def test_other_methods_and_surgery(
    method: str, kind: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    options = HeadsOptions(
        pcgrad=method == "bottleneck", task_rates="topic=2", task_weights="tags=0.5"
    )
    done = run(folders[kind], files, tmp_path, method=method, options=options, steps=4)
    assert done.result.steps == 4
    opened = open_heads(tmp_path, device="cpu")
    task = read_task(files["squad"], done.tok, max_length=40, causal=kind == "decoder")
    assert measure(opened.model, task) == measure(done.model, task)
    assert (tmp_path / "adapter_config.json").exists() == (method != "full")


def test_a_run_that_was_stopped_ends_bit_equal(
    folders: dict[str, Path],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(folders["encoder"], files, tmp_path / "a", steps=9, save_every=3)
    written = Metrics.write

    def crash(self: Any, record: dict[str, Any]) -> None:
        written(self, record)
        if record["step"] == 5:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", crash)
        with pytest.raises(ZeroDivisionError):
            run(folders["encoder"], files, tmp_path / "b", steps=9, save_every=3)
    again = run(folders["encoder"], files, tmp_path / "b", steps=9, save_every=3, resume=True)
    assert again.result.resumed_from == 3
    timed = {"seconds", "tokens_per_second", "peak_memory"}
    histories = [
        [{k: v for k, v in record.items() if k not in timed} for record in one.result.history]
        for one in (whole, again)
    ]
    assert histories[0] == histories[1]
    for name, parameter in whole.model.named_parameters():
        assert parameter.equal(again.model.get_parameter(name)), name


def test_the_adapter_and_its_heads_are_gone_on_with(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    run(folders["decoder"], files, tmp_path / "a", steps=3)
    held = load_heads(tmp_path / "a")
    topic = {"topic": files["topic"]}
    settings = {"adapter": str(tmp_path / "a")}
    on = run(folders["decoder"], topic, tmp_path / "b", settings=settings, steps=1, lr=1e-12)
    torch.testing.assert_close(on.model.head("topic").out.weight, held["topic"].out.weight)
    assert list(read_heads(tmp_path / "b")[0]) == ["topic"]
    other = tmp_path / "topic.jsonl"
    other.write_text('{"text": "cat", "label": "x"}\n{"text": "dog", "label": "y"}\n')
    with pytest.raises(ValueError, match="the head 'topic' of --adapter has the labels"):
        run(folders["decoder"], {"topic": other}, tmp_path / "c", settings=settings, steps=1)


def test_the_command_line(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    out, data = str(tmp_path / "out"), [str(files["topic"]), f"{files['tags']}:2"]
    words = ["finetune", "--objective", "heads", "--model", str(folders["encoder"])]
    words += ["--data", *data, "--out", out, "--steps", "3", "--device", "cpu", "--r", "2"]
    assert main([*words, "--eval-fraction", "0.2", "--max-length", "4000"]) == 0
    said = capsys.readouterr()
    assert "max_length is 48, the model's positions, not 4000" in said.err + said.out
    assert "topic: accuracy" in said.err + said.out
    assert f"lora-core generate --adapter {out} --label FILE.jsonl" in said.out
    label = ["generate", "--adapter", out, "--label", str(files["topic"]), "--device", "cpu"]
    assert main(label) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 48
    assert {line["label"] for line in lines} <= {"animal", "place"}
    assert main(["generate", "--adapter", out, "--prompt", "x"]) == 1
    assert "holds heads that label text and do not write it: topic (sequence), tags (token)" in (
        capsys.readouterr().err
    )
    assert main(["evaluate", "--adapter", out, "--data", str(files["topic"])]) == 1
    assert "holds heads that label text" in capsys.readouterr().err
    assert main([*label[:-2], "--device", "cpu", "--task", "topics"]) == 1
    assert "no head 'topics'; nearest names: 'topic'" in capsys.readouterr().err
    assert main(["generate", "--adapter", out, "--label", str(files["squad"])]) == 1
    assert (
        "holds rows for a span head: name one that is; there are topic" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"template": "chatml"}}, "--template is for text that is written"),
        ({"settings": {"train_on": "all"}}, "--train-on is for text that is written"),
        ({"settings": {"control_text": "keep"}}, "--control-text is for text that is written"),
        ({"settings": {"add_tokens": "<a>"}}, "--add-tokens is for text that is written"),
        ({"settings": {"eval_data": "x.jsonl"}}, "there are several tasks: give --eval-tasks"),
        ({"packing": 64}, "leave packing out"),
        ({"method": "full", "options": HeadsOptions(pcgrad=True)}, "method full has no adapter"),
        ({"options": HeadsOptions(task_weights="topics=2")}, "no task 'topics'; nearest names: 't"),
        ({"options": HeadsOptions(task_rates="tag=2")}, "task_rates: no task 'tag'"),
        ({"options": HeadsOptions(eval_tasks="tag=x")}, "eval_tasks: no task 'tag'"),
        ({"options": HeadsOptions(pooling="last")}, "cannot pool by 'last' here"),
    ],
)
def test_what_does_not_go_together(
    changes: dict[str, Any],
    message: str,
    folders: dict[str, Path],
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(folders["encoder"], files, tmp_path / "out", **changes)


def test_soft_prompts_equal_names_and_weights_without_use_are_refused(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["finetune", "--objective", "heads", "--model", str(folders["encoder"])]
    words += ["--out", str(tmp_path / "out"), "--data", str(files["topic"])]
    assert main([*words, "--method", "prompt"]) == 1
    assert main([*words, str(files["topic"])]) == 1
    weighted = (f"{files['topic']}:2", str(files["tags"]))
    with pytest.raises(ValueError, match="mixing balanced shows all tasks alike"):
        run(
            folders["encoder"], files, tmp_path / "out",
            data=weighted, options=HeadsOptions(mixing="balanced"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_weights": "topic"}, "task_weights: 'topic' is not TASK=VALUE"),
        ({"task_weights": "a=1,a=2"}, "task_weights names 'a' twice"),
        ({"task_rates": "a=0"}, "task_rates: a must have a number above 0; got '0'"),
        ({"task_rates": "a=x"}, "task_rates: a must have a number above 0; got 'x'"),
        ({"head_dropout": 1.0}, r"head_dropout must be in \[0, 1\); got 1.0"),
        ({"window_overlap": -1}, "window_overlap must not be negative; got -1"),
        ({"mix_temperature": 0.5}, "mix_temperature must be 1 or more; got 0.5"),
        ({"mix_temperature": 2.0, "mixing": "balanced"}, "belongs to mixing proportional"),
    ],
)
def test_what_options_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadsOptions(**fields)


# --- figures ---


def test_the_best_span_is_that_of_all_pairs() -> None:
    for seed in range(20):
        logits = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(seed))
        inside = torch.rand(1, 9, generator=torch.Generator().manual_seed(seed)) > 0.3
        inside[0, 0] = True
        pairs = [(i, j) for i, j in itertools.product(range(9), repeat=2) if i <= j]
        pairs = [(i, j) for i, j in pairs if inside[0, i] and inside[0, j]]
        best = max(pairs, key=lambda p: float(logits[0, p[0], 0] + logits[0, p[1], 1]))
        start, end = best_spans(logits, inside)
        assert (int(start), int(end)) == best


def test_entities_are_types_with_both_ends() -> None:
    tags = ["B-P", "I-P", "O", "I-L", "I-P", "B-P", "B-P"]
    assert entities(tags) == {
        ("P", 0, 2), ("L", 3, 4), ("P", 4, 5), ("P", 5, 6), ("P", 6, 7)
    }  # fmt: skip
    assert entity_counts(["B-P", "O", "B-L"], ["B-P", "I-P", "B-L"]) == (2, 4)


def test_figures_add_up_over_batches() -> None:
    tags = HeadShape(kind="token", labels=("B-P", "I-P", "O"))
    truth = torch.tensor([[2, 0, 1, -100], [0, 2, 2, 0]])
    said = torch.tensor([[2, 0, 2, 0], [0, 2, 2, 0]])
    found = figures_of(tags, torch.nn.functional.one_hot(said, 3).float(), {"labels": truth})
    assert found == {"accuracy": (6.0, 7.0), "f1": (4.0, 6.0)}
    many = HeadShape(kind="sequence", labels=("a", "b"), problem="multi_label_classification")
    logits = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    batch = {"labels": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    assert figures_of(many, logits, batch) == {"accuracy": (1.0, 2.0), "f1": (4.0, 5.0)}
    numbers = HeadShape(kind="sequence", problem="regression")
    found = figures_of(numbers, torch.tensor([[1.0], [3.0]]), {"labels": torch.tensor([1.0, 1.0])})
    assert found == {"squared_error": (4.0, 2.0)}


def test_the_best_window_speaks(folders: dict[str, Path], tmp_path: Path) -> None:
    """A head that knows the word finds it in a context of several windows."""
    from lora_core.checkpoint import load_model

    tok = load_tokenizer(folders["encoder"])
    context = " ".join(["the mat"] * 12 + ["oslo"] + ["a mat"] * 12)
    row = {"question": "where ?", "context": context}
    rows = [{**row, "answers": [{"text": "oslo", "start": context.index("oslo")}]}]
    rows += [{**row, "context": "mat sat", "answers": []}]
    file = tmp_path / "squad.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    task = read_task(file, tok, max_length=16, overlap=4)
    assert len(task.rows) > 4
    model = MultiHead(load_model(folders["encoder"]), {"squad": Head(HeadShape(kind="span"), 32)})
    oslo, first = tok.encode("oslo")[0], 1

    def knowing(states: Any, mask: Any, pooled: Any) -> torch.Tensor:
        return states

    head: Any = model.head("squad")
    head.forward = knowing
    model.states = lambda ids, mask, types: (  # type: ignore[method-assign, assignment]
        (5.0 * (ids == oslo) + 1.0 * (ids == first))[..., None].expand(-1, -1, 2), None
    )  # fmt: skip
    found = {name: figure.value for name, figure in measure(model, task).items()}
    assert found == {"exact_match": 1.0, "f1": 1.0}


def test_numbers_and_several_labels_end_to_end(
    folders: dict[str, Path], tmp_path: Path, jsonl_in: Callable[..., Path]
) -> None:
    words = PLACES + ANIMALS
    stars = jsonl_in("stars", *({"text": w, "label": float(w in PLACES)} for w in words))
    many = jsonl_in("many", *({"text": w, "label": [w, "all"]} for w in words))
    files = {"stars": stars, "many": many}
    options = HeadsOptions(pooling="mean")
    run(
        folders["encoder"],
        files,
        tmp_path / "out",
        options=options,
        epochs=30,
        lr=3e-2,
        accumulate=2,
    )
    opened = open_heads(tmp_path / "out", device="cpu")
    assert opened.measure(stars)["squared_error"].value < 0.1
    assert opened.measure(many)["accuracy"].value > 0.7
    said = opened.predict(many)
    assert all("all" in one["label"] and one["scores"]["all"] > 0.5 for one in said)


@pytest.fixture
def jsonl_in(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *rows: Any) -> Path:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def test_evaluation_files_by_task(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    options = HeadsOptions(eval_tasks=f"tags={files['tags']}", mix_temperature=2.0)
    done = run(folders["encoder"], files, tmp_path, options=options, steps=2)
    record = done.result.history[-1]
    assert {name for name in record if name.startswith("eval_tags/")} == {
        "eval_tags/accuracy", "eval_tags/f1"
    }  # fmt: skip
